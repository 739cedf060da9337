"""Linear maps of which each task adds one to the sum of the earlier ones, and a loss of pairs (ENGINE)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def zero_map(width: int) -> nn.Linear:
    """A linear map with bias, all zero and frozen, made without global random numbers."""
    linear = nn.utils.skip_init(nn.Linear, width, width)
    for p in linear.requires_grad_(False).parameters():
        p.data.zero_()
    return linear


def new_map(like: nn.Linear, generator: torch.Generator) -> nn.Linear:
    """A map to train, uniform in ±1/√d as PyTorch's linear layers."""
    linear = zero_map(like.in_features).to(like.weight.device)
    for p in linear.parameters():
        drawn = torch.rand(p.shape, generator=generator, device=generator.device)
        p.data.copy_((2 * drawn - 1) / math.sqrt(like.in_features))
    return linear


def add_map(total: nn.Linear, new: nn.Linear) -> None:
    """Add a trained map to the sum of all tasks' maps, which are applied to one vector: a single matrix is enough."""
    for sum_, part in zip(total.parameters(), new.parameters(), strict=True):
        sum_.data += part.detach()


def mapped(linear: nn.Linear, x: Tensor) -> Tensor:
    """The map in the precision of x."""
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


def info_nce(logits: Tensor) -> Tensor:
    """Cross-entropy of [b, b] scores with the diagonal."""
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
