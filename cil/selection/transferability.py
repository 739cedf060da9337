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

import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from torch import Tensor

from cil.classifiers.base import Array
from cil.classifiers.leave_one_out import left_out_predictions, mean_log_evidence, scorable, thin_svd
from cil.classifiers.ncm import NCM, Metric
from cil.utils.precision import exact

ALWAYS = ("ncm", "ridge", "logme")
"""Fields of :class:`Scores` for which a higher value is better, and that all backbones have."""
RANKING = (*ALWAYS, "leep")
"""Fields of :class:`Scores` for which a higher value is better."""
SCORES = (*ALWAYS, "effective_rank")
"""Fields of :class:`Scores` that are compared between backbones."""


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
        leep: Log likelihood per sample of the labels, given the classes that the backbone was pre-trained on; None if
            its classifier was not kept.
    """

    ncm: float
    ridge: float
    logme: float
    effective_rank: float
    ridge_strength: float
    leep: float | None = None


@exact()
def scores(features: Array, labels: Array) -> Scores:
    """All scores, from one singular value decomposition.

    Args:
        features: [N, F], floating point and finite.
        labels: int [N], from 0.

    Raises:
        DataError: Shapes, types or values are wrong, there are fewer than two classes, or no class has two samples.
    """
    x, y = scorable(features, labels)
    u, s = thin_svd(x)
    predictions, strength = left_out_predictions(u, s, y)
    evidence = mean_log_evidence(u, s, x.shape[1], y)
    return Scores(ncm_leave_one_out(x, y), _accuracy(predictions, y), evidence, _effective_rank(s), strength)


@exact()
def ncm_leave_one_out(features: Array, labels: Array, metric: Metric = "cosine") -> float:
    """Accuracy of :class:`cil.classifiers.NCM` on each sample, with that sample left out of its class mean; in [0, 1].

    μ_{c,−i} = (n_c μ_c − f_i)/(n_c − 1); the other classes' means are complete. The only sample of a class is not
    counted, but its class competes for the other samples.

    Raises:
        DataError: As :func:`scores`.
    """
    x, y = scorable(features, labels)
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
    x, y = scorable(features, labels)
    predictions, strength = left_out_predictions(*thin_svd(x), y)
    return _accuracy(predictions, y), strength


@exact()
def logme(features: Array, labels: Array) -> float:
    """Log evidence per sample of Bayesian linear regression onto each class's indicator t, mean over classes.

    ln N(t; 0, β⁻¹I + α⁻¹FFᵀ)/N at the α and β of MacKay's fixed point (You et al., ICML 2021; arXiv 2110.10545). The
    published fixed-point code omits (F − rank) ln α from the log determinant, which matters if N < F or features are
    linearly dependent; here it is included.

    Raises:
        DataError: As :func:`scores`.
    """
    x, y = scorable(features, labels)
    return mean_log_evidence(*thin_svd(x), x.shape[1], y)


@exact()
def leep(probabilities: Array, labels: Array) -> float:
    """Log expected empirical prediction (Nguyen et al., ICML 2020, arXiv 2002.12462), in (−∞, 0].

    With p_i(z) the probability of the backbone's own class z for sample i: P(y, z) = Σ_{i: y_i = y} p_i(z)/N, and the
    score is the mean over i of ln Σ_z P(y_i | z) p_i(z).

    Args:
        probabilities: p [N, Z], rows of sum 1.
        labels: int [N], from 0.
    """
    p, y = torch.as_tensor(probabilities).double(), torch.as_tensor(labels)
    joint = F.one_hot(y).double().T @ p / len(p)
    given = joint / joint.sum(0).clamp(min=torch.finfo(p.dtype).tiny)
    return (given[y] * p).sum(1).log().mean().item()


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


def _accuracy(predictions: Tensor, y: Tensor) -> float:
    return (predictions.argmax(1) == y).double().mean().item()


def _effective_rank(s: Tensor) -> float:
    p = s.square() / s.square().sum()
    return torch.special.entr(p).sum().exp().item()
