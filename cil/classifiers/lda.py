"""Linear discriminant analysis with one covariance for all classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from cil.classifiers.base import Array
from cil.classifiers.drift import AffineMap
from cil.classifiers.few_shots import Calibration
from cil.classifiers.memory import DOUBLE
from cil.classifiers.moments import zero_constant_
from cil.classifiers.selection import Score, Selection, SelectsFeatures, variance_ratios, variances_within
from cil.errors import ConfigError
from cil.utils.linalg import BLOCK, add_gram_, eigh_, generalised_errors, symmetric_inverse
from cil.utils.precision import exact, without_autocast

Priors = Literal["counts", "uniform"]
Shrinkage = float | Literal["gcv", "samples"]

RATIOS = tuple(10.0 ** (exponent / 4) for exponent in range(-24, 13))
"""Candidates for s / (1 − s), from 10⁻⁶ to 10³."""
UNCHOSEN = 1e-4
"""The candidate in use while the samples are too few to choose by: the default shrinkage, nearly."""


def shrink_(covariance: Tensor, shrinkage: float, scale: float) -> Tensor:
    """(1 − s) Σ + s · ``scale`` · I, in place, of Σ [F, F] and s in [0, 1]."""
    covariance.mul_(1 - shrinkage).diagonal().add_(shrinkage * scale)
    return covariance


class LDA(SelectsFeatures):
    """logit_c = xᵀΣ⁻¹μ_c − ½ μ_cᵀΣ⁻¹μ_c + log π_c with one within-class covariance Σ for all classes.

    Σ = (Σ x xᵀ − Σ_c n_c μ_c μ_cᵀ) / N, shrunk to (1 − s) Σ + s · tr(Σ)/F · I. This is scikit-learn's
    ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)``, and with frozen features the batch form of Deep SLDA
    (Hayes and Kanan, arXiv 1909.01520). Its s = 10⁻⁴ is the default: it is enough to invert Σ when there are fewer
    samples than features, and hardly changes a well-estimated Σ. Without shrinkage, directions without variance get the
    mean variance. If no direction has variance (equal images, or one image per class), the nearest mean wins.

    The shrinkage ``gcv`` is chosen by generalised cross-validation on all samples so far. LDA with Σ + λ/N · I is
    optimal scoring with ridge penalty λ: the regression, with intercept, of the C − 1 orthonormal scores of the classes
    on the features (Hastie, Buja, Tibshirani, Penalized Discriminant Analysis, 1995). With the total scatter
    T = V diag(t) Vᵀ and the between-class scatter B, its residual is C − 1 − Σ_k (VᵀBV)_kk (t_k + 2λ) / (t_k + λ)²,
    and 1 + Σ_k t_k / (t_k + λ) of N directions are fitted. Both scatters are sums, so s needs no image and is that of
    joint training, however the samples are split over calls. It needs one eigendecomposition of T, and the memory of
    three more matrices of this size, after every change of the statistics. Every part of the features (``blocks``) has
    its own s.

    The shrinkage ``samples`` is F / (N − 1 + F) for N samples so far: the estimate of Kubokawa and Srivastava (2008)
    that Wang et al. (ICLR 2024) use.

    Args:
        feature_dim: Feature width F.
        shrinkage: Shrinkage s in [0, 1], ``gcv`` or ``samples``; with 1 the distances to the class means are Euclidean.
        priors: Class priors π_c; ``counts``: the classes' shares of the samples, ``uniform``: equal for all classes
            with samples. Every sample has the same weight in Σ under both.
        blocks: Number of equal parts of the features, or the widths of the parts, with sum F. Σ is taken to be 0
            between parts, so logits are sums over parts.
        balance: Whether every class has the same weight in Σ, as if all had the same number of samples. All samples of
            a class must come in one call.
        calibration: Calibration of the means of few samples, in the scores and not in Σ; None for none.
        select: Features that are used: the discriminant is that of these alone, with their own shrinkage. A feature's
            score ``ridge`` is Σ_c (w_c − w̄)² of its weights w = Σ⁻¹μ_c on all features, times its variance within
            classes. None: all.

    Buffers:
        sums: float64 [C, F]; outer: float64 [F, F], Σ x xᵀ over all classes; counts: int64 [C].

    Raises:
        ConfigError: An argument is out of range.
    """

    per_class = ("sums", "counts")
    removed_with = "samples"
    over_classes = ("outer",)
    sums: Tensor
    outer: Tensor

    def __init__(
        self,
        feature_dim: int,
        shrinkage: Shrinkage = 1e-4,
        priors: Priors = "counts",
        blocks: int | Sequence[int] = 1,
        balance: bool = False,
        calibration: Calibration | None = None,
        select: Selection | None = None,
    ) -> None:
        super().__init__(feature_dim)
        if shrinkage not in ("gcv", "samples") and not (isinstance(shrinkage, int | float) and 0 <= shrinkage <= 1):
            raise ConfigError(f"LDA: shrinkage is {shrinkage!r}; it must be in [0, 1], 'gcv' or 'samples'")
        if isinstance(blocks, int) and (blocks < 1 or feature_dim % blocks):
            raise ConfigError(f"LDA: blocks is {blocks}; {feature_dim} features do not divide into equal parts")
        widths = (feature_dim // blocks,) * blocks if isinstance(blocks, int) else tuple(blocks)
        if not widths or min(widths) < 1 or sum(widths) != feature_dim:
            raise ConfigError(f"LDA: blocks are {list(widths)}; give widths ≥ 1 with the sum {feature_dim}")
        if priors not in ("counts", "uniform"):
            raise ConfigError(f"LDA: priors is {priors!r}; it must be 'counts' or 'uniform'")
        self.shrinkage, self.priors, self.blocks, self.balance = shrinkage, priors, widths, balance
        self.calibration, self.select = calibration, select
        self.require_memory()
        self.register_buffer("sums", torch.zeros(0, feature_dim, dtype=torch.float64))
        self.register_buffer("outer", torch.zeros(feature_dim, feature_dim, dtype=torch.float64))

    def kept_bytes(self, classes: int, width: int) -> float:
        return super().kept_bytes(classes, width) + DOUBLE * width**2

    def peak_bytes(self, classes: int, width: int) -> float:
        matrices = 5 if self.shrinkage == "gcv" else 4
        return 3 * super().kept_bytes(classes, width) + DOUBLE * (BLOCK * width + matrices * width**2)

    @exact()
    def partial_fit(self, features: Array, labels: Array) -> LDA:
        features, labels = self.prepare_fit(features, labels)
        roots = self.roots(labels)
        self.sums.index_add_(0, labels, features)
        self.counts += torch.bincount(labels, minlength=self.num_classes)
        for x in (features if roots is None else features * roots).split(BLOCK):
            add_gram_(self.outer, x)
        return self

    def _subtract(self, features: Tensor) -> None:
        taken = torch.zeros_like(self.outer)
        for x in features.split(BLOCK):
            add_gram_(taken, x)
        self.outer -= taken

    @exact()
    def transport(self, drift: AffineMap) -> LDA:
        """Apply ``drift`` to means and covariance, as if every sample had been mapped."""
        weighted = self.means.sum(0) if self.balance else self.sums.sum(0)
        self.outer = drift.outer(self.outer, weighted, self.totals.sum())
        self.sums = drift.sums(self.sums, self.counts)
        self._forget()
        return self

    @without_autocast()
    def logits(self, features: Array) -> Tensor:
        features, columns = self.checked(features), self.selected
        weights, bias, _ = self.cached("rule", lambda: self._solve(columns))
        if columns is not None:
            features = features[:, columns]
        return self.only_seen(features @ weights.T.to(features.dtype) + bias.to(features.dtype))

    @property
    def shrinkages(self) -> list[float]:
        """The shrinkage s in use for each part of the features."""
        return self.cached("rule", lambda: self._solve(self.selected))[2]

    def feature_scores(self, score: Score) -> Tensor | None:
        moments = self.outer.diagonal(), self.means, self.totals
        variances = variances_within(*moments)
        if not bool(variances.any()):
            return None
        if score == "f":
            return variance_ratios(*moments)
        weights = self._solve()[0][self.counts > 0]
        return variances * (weights - weights.mean(0)).square().sum(0)

    @property
    def means(self) -> Tensor:
        """Class means, float64 [C, F]; zero for a class without samples."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    @property
    def covariance(self) -> Tensor:
        """Within-class covariance Σ before shrinkage, float64 [F, F]."""
        between = (self.totals[:, None] * self.means).T @ self.means
        within = (between + between.T).div_(2)
        del between  # features may be wide: no more than two matrices beside ``outer``
        torch.sub(self.outer, within, out=within)
        return zero_constant_(within, self.outer).div_(self.totals.sum().clamp(min=1))

    @property
    def decision_means(self) -> Tensor:
        """The class means in the decision rule, float64 [C, F]; a subclass may know more than the samples."""
        return self.means

    def _parts(self, columns: Tensor | None) -> list[tuple[slice, slice | Tensor]]:
        """Every part of the features, by its place among ``columns`` and by its features; only parts with columns."""
        ends = list(accumulate(self.blocks, initial=0))
        if columns is None:
            return [(slice(a, b), slice(a, b)) for a, b in pairwise(ends)]
        found = torch.searchsorted(columns, torch.tensor(ends, device=columns.device)).tolist()
        return [(slice(a, b), columns[a:b]) for a, b in pairwise(found) if a < b]

    def _solve(self, columns: Tensor | None = None) -> tuple[Tensor, Tensor, list[float]]:
        """The rule on the features ``columns`` (None: on all): weights [C, k], biases [C], shrinkage of each part."""
        covariance, means = self.covariance, self.decision_means
        if columns is not None:
            covariance, means = covariance[columns[:, None], columns], means[:, columns]
        unit = self.scale_of(covariance)
        parts, centres, shrinkages = [], [], []
        for place, part in self._parts(columns):
            block = covariance[place, place]
            scale = float(block.diagonal().mean()) or unit
            chosen = self._shrinkage_of(block, part, scale)
            shrunk, centre = shrink_(block, chosen, scale), means[:, place].contiguous()
            if self.calibration is not None:
                centre = self.calibration.calibrated(centre, self.counts, shrunk)
            parts.append(centre @ symmetric_inverse(shrunk, scale))
            centres.append(centre)
            shrinkages.append(chosen)
        weights = torch.cat(parts, dim=1)
        bias = -(weights * torch.cat(centres, dim=1)).sum(1) / 2
        if self.priors == "counts":
            shares = self.counts / self.counts.sum().clamp(min=1)
            bias = bias + shares.double().clamp(min=torch.finfo(torch.float64).tiny).log()
        else:
            bias = bias - float((self.counts > 0).sum().clamp(min=1).double().log())
        return weights, bias, shrinkages

    def _shrinkage_of(self, covariance: Tensor, part: slice | Tensor, scale: float) -> float:
        """The shrinkage of the features ``part`` with within-class covariance [F', F']."""
        if self.shrinkage == "samples":
            return len(covariance) / max(len(covariance), int(self.counts.sum()) - 1 + len(covariance))
        return self._choose(covariance, part, scale) if isinstance(self.shrinkage, str) else self.shrinkage

    def _choose(self, covariance: Tensor, part: slice | Tensor, scale: float) -> float:
        """The shrinkage with the smallest error for the features ``part`` with within-class covariance [F', F']."""
        errors = self.generalised_errors(covariance, part, scale)
        best = RATIOS[errors.index(min(errors))] if math.isfinite(min(errors)) else UNCHOSEN
        return best / (1 + best)

    def generalised_errors(self, covariance: Tensor, part: slice | Tensor, scale: float) -> list[float]:
        """The error of every candidate on all samples so far; see the class."""
        samples, seen = int(self.counts.sum()), self.counts > 0
        if samples < 1:
            return [math.inf] * len(RATIOS)
        means, weights = self.means[seen][:, part], self.totals[seen].double()
        weight = float(weights.sum())
        offsets = weights.sqrt()[:, None] * (means - weights @ means / weight)
        total = covariance * weight
        add_gram_(total, offsets)
        values, vectors = eigh_(total)
        strengths = [ratio * scale * weight for ratio in RATIOS]
        explained = (offsets @ vectors).square().sum(0)
        return generalised_errors(values, explained, len(offsets) - 1, samples, strengths, fitted=1)

    def scale_of(self, covariance: Tensor) -> float:
        """Mean variance in a covariance [F, F]; without any, a positive number that fits the features."""
        return float(covariance.diagonal().mean()) or self._spread() / 1e4 or 1.0

    def _spread(self) -> float:
        """Mean variance of the means of classes with samples; the metric if no class has variance.

        A share of it is small enough that distances, and not the priors, decide.
        """
        means = self.means[self.counts > 0]
        return float((means - means.mean(0)).square().mean()) if len(means) else 0.0
