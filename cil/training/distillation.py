"""Losses that hold what a model computes near what a teacher computes: scores, features, tokens, relations of images.

They are functions of tensors. Those of single images are means over the images of a batch, so that micro-batches and
several processes give the same step. Those that compare images with one another need all images of a step
(:func:`cil.training.processes.across_processes`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.utils.precision import without_autocast

ANGLES = 2.0
"""Weight of the angles beside that of the distances, 1, in the runs of RKD's own code."""


@without_autocast()
def score_distance(scores: Tensor, teacher: Tensor, temperature: float | None = 2.0) -> Tensor:
    """τ² KL(softmax(t/τ) ‖ softmax(z/τ)) of the scores of one set of classes, a mean over the batch.

    The factor τ² keeps the size of the gradients at any τ (Hinton et al., arXiv 1503.02531). For τ → ∞ the loss is
    ‖z̄ − t̄‖² / (2C), where z̄ and t̄ are scores without their mean over the classes; τ = None is this limit.

    Args:
        scores: z, [B, C].
        teacher: t, [B, C].
        temperature: τ > 0, or None.
    """
    z, t = _precise(scores), _precise(teacher)
    if temperature is None:
        return (_centred(z) - _centred(t)).square().sum(1).mean() / (2 * z.shape[1])
    log_p, target = (z / temperature).log_softmax(1), (t / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(log_p, target, reduction="batchmean", log_target=True)


@without_autocast()
def feature_distance(features: Tensor, teacher: Tensor) -> Tensor:
    """‖f − t‖² / F of features [B, F], a mean over the batch."""
    return (_precise(features) - _precise(teacher)).square().mean()


@without_autocast()
def token_distance(tokens: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Σ_l ½ ‖Z_l − T_l‖² / (N D) over blocks l with outputs [B, N, D], a mean over the batch.

    This is DELTA (Li et al., ICLR 2019, arXiv 1901.09229) without its attention over channels, which takes a pass per
    channel and block. Published code sums over batch and positions instead, with a weight of 0.01.
    """
    pairs = zip(tokens, teacher, strict=True)
    return torch.stack([(_precise(z) - _precise(t)).square().mean() / 2 for z, t in pairs]).sum()


@without_autocast()
def relation_distance(features: Tensor, teacher: Tensor) -> Tensor:
    """How far distances and angles between the images of a step are from those of a teacher, a scalar.

    RKD (Park et al., CVPR 2019, arXiv 1904.05068): the Huber loss (δ = 1) of the distances of all pairs, each divided
    by the mean of the distances that are not zero, and, with the weight :data:`ANGLES`, of the cosines of the angles
    at the middle image of all triplets. It does not notice a shift, a rotation or a scale of either side, and the
    widths may differ. With b images the angles take b³ numbers.

    Args:
        features: [b, F].
        teacher: [b, F'].
    """
    f, t = _precise(features), _precise(teacher).to(_precise(features).dtype)
    return F.huber_loss(_relative(f), _relative(t)) + ANGLES * F.huber_loss(_cosines(f), _cosines(t))


@without_autocast()
def spectral_shrinkage(features: Tensor, count: int = 1) -> Tensor:
    """Σ of the squares of the ``count`` smallest singular values of features [b, F], b ≤ F (BSS).

    Batch spectral shrinkage (Chen et al., NeurIPS 2019) takes away directions of features that carry little. They are
    the smallest eigenvalues of X Xᵀ [b, b]; with more images than features these would be zero.
    """
    x = _precise(features)
    return torch.linalg.eigvalsh(x @ x.T)[:count].sum()


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def _gaps(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_i − x_j as [j, i, F], their lengths [j, i, 1], and which are not 0 (there the length is 1)."""
    gaps = x[None] - x[:, None]
    squares = gaps.square().sum(2, keepdim=True)
    apart = squares > 0
    return gaps, torch.where(apart, squares, 1.0).sqrt(), apart


def _relative(x: Tensor) -> Tensor:
    """Distances of all pairs [b, b, 1], in units of the mean of those that are not zero."""
    _, lengths, apart = _gaps(x)
    distances = lengths * apart
    return distances / (distances.sum() / apart.sum().clamp(min=1)).clamp(min=torch.finfo(x.dtype).tiny)


def _cosines(x: Tensor) -> Tensor:
    """Cosines of the angles at image j between images i and k, [j, i, k]; 0 where two of them are one point."""
    gaps, lengths, _ = _gaps(x)
    directions = gaps / lengths
    return directions @ directions.mT
