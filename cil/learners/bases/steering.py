"""Losses of RSIAT, CDS and MACIL, and RSIAT's projector, which limit feature drift while a tuner is trained on."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from cil.utils.precision import without_autocast


@without_autocast()
def pairwise_loss(features: Tensor, labels: Tensor, alpha: float = 1.0, margin: float = 0.4) -> Tensor:
    """mean_{i≠j, y_i=y_j} (1 − S_ij) + α · mean_{y_i≠y_j} max(0, S_ij − m), where S are the cosines within the batch.

    The first term pulls images of one class together; the second pushes different classes apart until their cosines
    are at most m. With m = −1 the second term is 1 + S_ij, as in the paper. A mean over no pairs is 0.

    Args:
        features: Features of a batch, [B, F].
        labels: Labels, int64 [B].
        alpha: Weight α ≥ 0 of the second term.
        margin: Cosine m in [−1, 1].

    Returns:
        A scalar, float32 (float64 for float64 features).
    """
    directions = F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)
    cosines = directions @ directions.T
    same = labels[:, None] == labels
    same, different = same.fill_diagonal_(False), labels[:, None] != labels
    pull = ((1 - cosines) * same).sum() / same.sum().clamp(min=1)
    push = (F.relu(cosines - margin) * different).sum() / different.sum().clamp(min=1)
    return pull + alpha * push


class Projector(nn.Module):
    """P(f) = f + AE(f), AE = Linear(F→64) GELU Linear(64→c) GELU Linear(c→64) GELU Linear(64→F); initially P(f) = f.

    Args:
        feature_dim: Feature width F.
        code: Width c of the middle layer.
        bottleneck: Width of the layers around it (64 above).
    """

    def __init__(self, feature_dim: int, code: int = 256, bottleneck: int = 64) -> None:
        super().__init__()
        widths = [feature_dim, bottleneck, code, bottleneck, feature_dim]
        # skip_init: the constructor of nn.Linear draws from the global random state
        self.layers = nn.ModuleList(skip_init(nn.Linear, width, after) for width, after in pairwise(widths))
        self.reset(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw weights and biases from U(±1/√width), as torch does for a linear layer; the last layer is 0."""
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
        correction: Tensor = self.layers[-1](hidden)
        return features + correction


def projected_distance(
    features: Tensor, old: Tensor, means: Tensor, projector: nn.Module, beta: float = 1.0, gamma: float = 0.5
) -> Tensor:
    """β · MSE(φ_t(x), P(φ_{t−1}(x))) + γ · mean_{c,i} |cos(P(μ_c), P(φ_{t−1}(x_i)))|.

    The first term keeps new features near the projected old ones. The second keeps the projections of new images
    orthogonal to those of old class means; its gradient reaches P only.

    Args:
        features: New features φ_t(x), [B, F].
        old: Old features φ_{t−1}(x) of the same images, [B, F].
        means: Means μ_c of old classes, [C, F], C ≥ 1.
        projector: Projector P.
        beta: Weight β ≥ 0 of the first term.
        gamma: Weight γ ≥ 0 of the second term.

    Returns:
        The loss, a scalar; a mean over the batch.
    """
    projected, centres = projector(old), projector(means)
    cosines = F.normalize(centres, dim=1) @ F.normalize(projected, dim=1).T
    return beta * F.mse_loss(features, projected) + gamma * cosines.abs().mean()


@without_autocast()
def similarity_change(features: Tensor, old: Tensor, means: Tensor) -> Tensor:
    """mean_i Σ_c (cos(φ_t(x_i), μ_c) − cos(φ_{t−1}(x_i), μ_c))²: new images keep their similarities to old classes.

    Args:
        features: New features φ_t(x), [B, F].
        old: Old features φ_{t−1}(x) of the same images, [B, F].
        means: Means μ_c of old classes, [C, F], C ≥ 1.

    Returns:
        The loss, a scalar of the type of ``means``, a mean over the batch; it ignores the lengths of all features.
    """
    turned = F.normalize(features.to(means), dim=1) - F.normalize(old.to(means), dim=1)
    return (turned @ F.normalize(means, dim=1).T).square().sum(1).mean()


@without_autocast()
def distance_change(features: Tensor, old: Tensor, labels: Tensor, whitening: Tensor) -> Tensor:
    """(1/B) Σ_{i<j, y_i=y_j} |d(φ_t(x_i), φ_t(x_j)) − d(φ_{t−1}(x_i), φ_{t−1}(x_j))|: classes keep their shape (MACIL).

    d(a, b) = ‖L_c⁻¹ (a/‖a‖ − b/‖b‖)‖ is the Mahalanobis distance of a class c with covariance L_c L_cᵀ. A distance of 0
    has no gradient.

    Args:
        features: New features φ_t(x), [B, F].
        old: Old features φ_{t−1}(x) of the same images, [B, F].
        labels: Rows of ``whitening``, int64 [B].
        whitening: L_c⁻¹ of each class, [C, F, F].

    Returns:
        A scalar of the type of ``whitening``.
    """
    total = whitening.new_zeros(())
    for c in labels.unique():
        rows = labels == c
        new, before = (torch.pdist(F.normalize(x[rows].to(whitening), dim=1) @ whitening[c].T) for x in (features, old))
        total = total + (new - before).abs().sum()
    return total / max(1, len(labels))


@without_autocast()
def patch_change(patches: Tensor, old: Tensor, classes: Tensor) -> Tensor:
    """mean over images and patches of (angle(c, p) / π) · ‖p/‖p‖ − p'/‖p'‖‖: patches that differ from c stay (MACIL).

    Args:
        patches: New patch tokens p, [B, N, D].
        old: Old patch tokens p' of the same images, [B, N, D].
        classes: New class tokens c, [B, D]; the angles get no gradient.

    Returns:
        A float32 scalar.
    """
    patches, old, classes = patches.float(), old.float(), classes.float()
    cosines = F.cosine_similarity(classes[:, None], patches, dim=2).detach().clamp(-1, 1)
    moved = torch.linalg.vector_norm(F.normalize(patches, dim=2) - F.normalize(old, dim=2), dim=2)
    return (cosines.acos() / math.pi * moved).mean()
