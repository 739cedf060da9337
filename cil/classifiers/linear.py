"""A linear head that grows with the classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearHead(nn.Module):
    """logits = f Wᵀ + b, one row a class; rows are added as classes appear and old rows keep their values.

    Args:
        feature_dim: Feature width F.
        std: New rows are drawn from a truncated normal with this deviation, biases start at 0 (timm's head).

    Parameters:
        weight: [C, F]; bias: [C].
    """

    def __init__(self, feature_dim: int, std: float = 0.02) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.zeros(0, feature_dim))
        self.bias = nn.Parameter(torch.zeros(0))

    def grow(self, classes: int, generator: torch.Generator) -> None:
        """Make room for labels 0…classes−1, drawing the new rows from ``generator``."""
        new = classes - len(self.bias)
        if new <= 0:
            return
        rows = torch.empty(new, self.weight.shape[1])
        nn.init.trunc_normal_(rows, std=self.std, a=-2 * self.std, b=2 * self.std, generator=generator)
        self.weight = nn.Parameter(torch.cat([self.weight.detach(), rows.to(self.weight)]))
        self.bias = nn.Parameter(torch.cat([self.bias.detach(), self.bias.new_zeros(new)]))

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, F] → logits [B, C]."""
        return F.linear(features, self.weight, self.bias)
