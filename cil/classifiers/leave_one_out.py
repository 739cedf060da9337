"""Closed forms on the singular values of features: leave-one-out predictions of ridge regression, and LogME's evidence.

:mod:`cil.selection.transferability` scores backbones with them, and :mod:`cil.classifiers.joined` weights several.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classifiers.base import Array
from cil.classifiers.ncm import NCM
from cil.classifiers.ridge import RESOLVED, STRENGTHS
from cil.errors import DataError

RANK_TOLERANCE = 1e-10
"""Singular values below this fraction of the largest count as zero."""


def scorable(features: Array, labels: Array) -> tuple[Tensor, Tensor]:
    """(features float64 [N, F], labels int64 [N] in 0…C−1), checked as a classifier checks them and to be scorable."""
    width = np.shape(features)[1] if np.ndim(features) == 2 else 1
    x, y = NCM(max(width, 1)).prepare_fit(features, labels)
    y, counts = torch.unique(y, return_inverse=True, return_counts=True)[1:]
    if len(counts) < 2:
        raise DataError("scores of features need samples of at least two classes, got one")
    if int(counts.max()) < 2:
        raise DataError("scores of features leave samples out one at a time, and no class has two")
    if not bool(x.any()):
        raise DataError("scores of features: all features are zero")
    return x, y


def thin_svd(x: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors [N, k] and singular values [k] up to the numerical rank k."""
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    nonzero = s > RANK_TOLERANCE * s[0]
    return u[:, nonzero], s[nonzero]


def left_out_predictions(u: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """One-hot ridge predictions of every sample when fitted to all others, float64 [N, C], and their λ.

    Args:
        u: Left singular vectors of the features, [N, k].
        s: Singular values [k].
        y: Labels 0…C−1, int64 [N].

    Raises:
        DataError: Every λ interpolates a sample.
    """
    targets = F.one_hot(y).double()
    right = u.T @ targets
    best = math.inf, targets, 0.0
    for strength in STRENGTHS:
        d = s.square() / (s.square() + strength)
        rest = 1 - u.square() @ d
        if float(rest.min()) < RESOLVED:
            continue
        left_out = (u * d @ right - (1 - rest)[:, None] * targets) / rest[:, None]
        error = (left_out - targets).square().mean().item()
        if error < best[0]:
            best = error, left_out, strength
    if math.isinf(best[0]):
        raise DataError("scores of features: they are too large; ridge regression interpolates at every strength")
    return best[1:]


def mean_log_evidence(u: Tensor, s: Tensor, width: int, y: Tensor) -> float:
    """LogME: the log evidence per sample of the features U diag(s) Vᵀ of that width, mean over classes."""
    targets = F.one_hot(y).double()
    alpha, beta = fixed_point(u, s, targets)
    return (log_evidence(u, s, width, targets, alpha, beta) / len(y)).mean().item()


def fixed_point(u: Tensor, s: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """α and β [C] of maximal evidence for each column of the targets [N, C], by MacKay's iteration (σ = s², τ = α/β):

    γ = Σσ/(σ+τ), m² = Σ σx²/(σ+τ)², e² = Σ x²(τ/(σ+τ))² + ρ, α ← γ/(m² + 10^-5), β ← (N − γ)/(e² + 10^-5)
    with x = Uᵀt and ρ the part of ‖t‖² outside U.
    """
    n, sigma = len(targets), s.square()[:, None]
    x2, rho = _projected(u, targets)
    alpha = beta = targets.new_ones(targets.shape[1])
    for _ in range(1000):
        tau = alpha / beta
        gamma = (sigma / (sigma + tau)).sum(0)
        alpha = gamma / ((sigma * x2 / (sigma + tau).square()).sum(0) + 1e-5)
        beta = (n - gamma) / ((x2 * (tau / (sigma + tau)).square()).sum(0) + rho + 1e-5)
        if bool(((alpha / beta - tau).abs() <= 1e-8 * tau).all()):
            break
    return alpha, beta


def posterior_means(x: Tensor, y: Tensor) -> Tensor:
    """The linear maps of maximal evidence from features to each class's indicator, float64 [C, F].

    Row c is (XᵀX + τ_c I)⁻¹ Xᵀ t_c with τ_c = α_c/β_c of :func:`fixed_point`: the posterior mean of LogME's weights.

    Args:
        x: Features X, float64 [N, F].
        y: Labels 0…C−1, int64 [N].
    """
    (u, s), targets = thin_svd(x), F.one_hot(y).double()
    alpha, beta = fixed_point(u, s, targets)
    return (u.T @ targets / (s.square()[:, None] + alpha / beta)).T @ u.T @ x


def log_evidence(u: Tensor, s: Tensor, width: int, targets: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """ln N(t; 0, β⁻¹I + α⁻¹FFᵀ) for each column of the targets [N, C] and features F = U diag(s) Vᵀ; [C].

    Exact at every α > 0 and β > 0, not only at the fixed point.
    """
    n, sigma, tau = len(targets), s.square()[:, None], alpha / beta
    x2, rho = _projected(u, targets)
    m2 = (sigma * x2 / (sigma + tau).square()).sum(0)
    e2 = (x2 * (tau / (sigma + tau)).square()).sum(0) + rho
    determinant = (alpha + beta * sigma).log().sum(0) + (width - len(s)) * alpha.log()
    evidence = width * alpha.log() + n * beta.log() - determinant - beta * e2 - alpha * m2 - n * math.log(2 * math.pi)
    return evidence / 2


def _projected(u: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Squared coordinates of the targets in U [k, C], and the part of their squared norm outside U [C]."""
    x2 = (u.T @ targets).square()
    return x2, (targets.square().sum(0) - x2.sum(0)).clamp(min=0)
