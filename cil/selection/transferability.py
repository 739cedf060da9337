"""Transferability scores: how well frozen features suit a classifier, computed from training features only.

Pure functions of features [N, F] and labels [N], in float64. Features are neither centred nor scaled, because the
library's classifiers do not do so either. The two leave-one-out accuracies are exact, and are those of
:class:`cil.classifiers.NCM` and of :class:`cil.classifiers.Ridge` without a projection; no image is held out. LogME is
the log evidence of You et al. (ICML 2021). No score needs training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from torch import Tensor

from cil.classifiers.base import Array
from cil.classifiers.ncm import NCM, Metric
from cil.classifiers.ridge import RESOLVED, STRENGTHS
from cil.errors import DataError
from cil.utils.precision import exact

RANKING = ("ncm", "ridge", "logme")
"""Fields of :class:`Scores` for which a higher value is better."""
SCORES = (*RANKING, "effective_rank")
"""Fields of :class:`Scores` that are compared between backbones."""
RANK_TOLERANCE = 1e-10
"""Singular values below this fraction of the largest count as zero."""


@dataclass(frozen=True)
class Scores:
    """Scores of one backbone's features on labelled images.

    Attributes:
        ncm: Leave-one-out accuracy of the nearest class mean (cosine), in [0, 1].
        ridge: Leave-one-out accuracy of ridge regression onto one-hot labels, in [0, 1].
        logme: Log evidence per sample and class; comparable only between backbones on the same images.
        effective_rank: exp(H(s²/Σs²)) of the features' singular values s, in [1, min(N, F)]; it is near 1 if one
            direction, such as the mean of uncentred features, dominates. It is descriptive and not used for ranking.
        ridge_strength: λ with which ``ridge`` was computed.
    """

    ncm: float
    ridge: float
    logme: float
    effective_rank: float
    ridge_strength: float


@exact()
def scores(features: Array, labels: Array) -> Scores:
    """All scores, from one singular value decomposition.

    Args:
        features: [N, F], floating point and finite.
        labels: int [N], from 0.

    Raises:
        DataError: Shapes, types or values are wrong, there are fewer than two classes, or no class has two samples.
    """
    x, y = _checked(features, labels)
    u, s = _svd(x)
    accuracy, strength = _ridge(u, s, y)
    return Scores(ncm_leave_one_out(x, y), accuracy, _logme(u, s, x.shape[1], y), _effective_rank(s), strength)


@exact()
def ncm_leave_one_out(features: Array, labels: Array, metric: Metric = "cosine") -> float:
    """Accuracy of :class:`cil.classifiers.NCM` on each sample, with that sample left out of its class mean; in [0, 1].

    μ_{c,−i} = (n_c μ_c − f_i)/(n_c − 1); the other classes' means are complete. The only sample of a class is not
    counted, but its class competes for the other samples.

    Raises:
        DataError: As :func:`scores`.
    """
    x, y = _checked(features, labels)
    ncm = NCM(x.shape[1], metric).partial_fit(x, y)
    others = ncm.counts[y] - 1
    counted = others > 0
    mean = (ncm.sums[y] - x) / others.clamp(min=1)[:, None]
    logits = ncm.logits(x)
    own = F.cosine_similarity(x, mean) if metric == "cosine" else (x * mean).sum(1) - mean.square().sum(1) / 2
    logits[torch.arange(len(y)), y] = own
    return (logits.argmax(1) == y)[counted].double().mean().item()


@exact()
def ridge_leave_one_out(features: Array, labels: Array) -> tuple[float, float]:
    """Accuracy in [0, 1] of one-hot ridge regression on each sample when fitted to all others, and its λ.

    X = U diag(s) Vᵀ, d_i = s_i²/(s_i² + λ), Ŷ = U diag(d) UᵀY, h = rowsum(U² diag(d)); without sample i the prediction
    is (Ŷ_i − h_i Y_i)/(1 − h_i) (PRESS; Allen 1974). λ is the one in 10^-8…10^8 with the smallest mean squared
    leave-one-out error, as ``Ridge(strength="loo")`` chooses it; a λ with some 1 − h_i < 10^-8 is excluded.

    Raises:
        DataError: As :func:`scores`.
    """
    x, y = _checked(features, labels)
    return _ridge(*_svd(x), y)


@exact()
def logme(features: Array, labels: Array) -> float:
    """Log evidence per sample of Bayesian linear regression onto each class's indicator t, mean over classes.

    ln N(t; 0, β⁻¹I + α⁻¹FFᵀ)/N at the α and β of MacKay's fixed point (You et al., ICML 2021; arXiv 2110.10545). The
    published fixed-point code omits (F − rank) ln α from the log determinant, which matters if N < F or features are
    linearly dependent; here it is included.

    Raises:
        DataError: As :func:`scores`.
    """
    x, y = _checked(features, labels)
    return _logme(*_svd(x), x.shape[1], y)


@exact()
def effective_rank(features: Array) -> float:
    """exp(H(p)) with p = s²/Σs² over the singular values s of the uncentred features [N, F]; in [1, min(N, F)]."""
    return _effective_rank(torch.linalg.svdvals(torch.as_tensor(features).double()))


def agreement(columns: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float | None]]:
    """Kendall's τ-b between every two columns of numbers about the same candidates.

    It is None if there is only one candidate or a column is constant.
    """

    def tau(one: str, other: str) -> float | None:
        if len(columns[one]) < 2:
            return None
        value = float(kendalltau(columns[one], columns[other]).statistic)
        return None if math.isnan(value) else value

    return {one: {other: tau(one, other) for other in columns if other != one} for one in columns}


def _checked(features: Array, labels: Array) -> tuple[Tensor, Tensor]:
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


def _svd(x: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors [N, k] and singular values [k] up to the numerical rank k."""
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    nonzero = s > RANK_TOLERANCE * s[0]
    return u[:, nonzero], s[nonzero]


def _ridge(u: Tensor, s: Tensor, y: Tensor) -> tuple[float, float]:
    targets = F.one_hot(y).double()
    right = u.T @ targets
    best = math.inf, 0.0, 0.0
    for strength in STRENGTHS:
        d = s.square() / (s.square() + strength)
        rest = 1 - u.square() @ d
        if float(rest.min()) < RESOLVED:
            continue
        left_out = (u * d @ right - (1 - rest)[:, None] * targets) / rest[:, None]
        error = (left_out - targets).square().mean().item()
        if error < best[0]:
            best = error, (left_out.argmax(1) == y).double().mean().item(), strength
    if math.isinf(best[0]):
        raise DataError("scores of features: they are too large; ridge regression interpolates at every strength")
    return best[1:]


def _logme(u: Tensor, s: Tensor, width: int, y: Tensor) -> float:
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


def _effective_rank(s: Tensor) -> float:
    p = s.square() / s.square().sum()
    return torch.special.entr(p).sum().exp().item()
