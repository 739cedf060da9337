"""What holds a representation in shape while it goes on training: RSIAT's metric loss and its residual projector."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from cil.precision import without_autocast


@without_autocast()
def pairwise_loss(features: Tensor, labels: Tensor, alpha: float = 1.0, margin: float = 0.4) -> Tensor:
    """mean_{i≠j, y_i=y_j} (1 − S_ij) + α · mean_{y_i≠y_j} max(0, S_ij − m), S the cosines within the batch.

    Pulls a class together and pushes classes apart until their cosines are at most m; with m = −1 the second term is
    1 + S_ij, which is how the paper has it, and pushes until they are opposite. A mean over no pairs is 0.

    Args:
        features: [B, F].
        labels: int64 [B].
        alpha: α ≥ 0.
        margin: m, a cosine in [−1, 1].

    Returns:
        A scalar, float32 (float64 for float64 features).
    """
    directions = F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)
    cosines = directions @ directions.T
    same = labels[:, None] == labels
    together, apart = same.fill_diagonal_(False), labels[:, None] != labels
    pull = ((1 - cosines) * together).sum() / together.sum().clamp(min=1)
    push = (F.relu(cosines - margin) * apart).sum() / apart.sum().clamp(min=1)
    return pull + alpha * push


class Projector(nn.Module):
    """P(f) = f + AE(f), AE = Linear(F→64) GELU Linear(64→c) GELU Linear(c→64) GELU Linear(64→F): the identity at first.

    Args:
        feature_dim: Feature width F.
        code: c, the width in the middle.
        bottleneck: The 64.
    """

    def __init__(self, feature_dim: int, code: int = 256, bottleneck: int = 64) -> None:
        super().__init__()
        widths = [feature_dim, bottleneck, code, bottleneck, feature_dim]
        # skip_init: the constructor of nn.Linear draws from the global random state
        self.layers = nn.ModuleList(skip_init(nn.Linear, width, after) for width, after in pairwise(widths))
        self.reset(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Weights and biases U(±1/√width), torch's own for a linear layer; the last layer 0."""
        for layer in self.layers:
            bound = 1 / math.sqrt(layer.in_features)  # type: ignore[arg-type]
            for p in (layer.weight, layer.bias):
                p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))  # type: ignore[operator, arg-type]
        for p in self.layers[-1].parameters():
            p.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, F] → [B, F]."""
        hidden = features
        for layer in self.layers[:-1]:
            hidden = F.gelu(layer(hidden))
        moved: Tensor = self.layers[-1](hidden)
        return features + moved


def projected_distance(
    features: Tensor, old: Tensor, means: Tensor, projector: nn.Module, beta: float = 1.0, gamma: float = 0.5
) -> Tensor:
    """β · MSE(φ_t(x), P(φ_{t−1}(x))) + γ · mean_{c,i} |cos(P(μ_c), P(φ_{t−1}(x_i)))|.

    The first term holds new features near the projected old ones; the second keeps the projections of new images
    orthogonal to those of old classes, and moves P alone.

    Args:
        features: φ_t(x), [B, F].
        old: φ_{t−1}(x) of the same images, [B, F].
        means: μ_c of old classes, [C, F], C ≥ 1.
        projector: P.
        beta: β ≥ 0.
        gamma: γ ≥ 0.

    Returns:
        A scalar, a mean over the batch.
    """
    projected, centres = projector(old), projector(means)
    cosines = F.normalize(centres, dim=1) @ F.normalize(projected, dim=1).T
    return beta * F.mse_loss(features, projected) + gamma * cosines.abs().mean()
