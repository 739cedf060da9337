"""The Gaussians of ENGINE's code: class means, and one precision matrix that each task averages."""

from __future__ import annotations

import torch
from torch import Tensor

from cil.classifiers.base import Array, Classifier
from cil.classifiers.ncm import NCM
from cil.errors import DataError
from cil.utils.precision import exact, without_autocast


class AveragedPrecision(Classifier):
    """g_c = f P μ_c − μ_c P μ_c / 2 − log C, with P as ENGINE's authors update it; for their published numbers.

    A call brings N samples of new classes. With S their unbiased covariance around the class means, they give
    P' = F ((N − 1) S + tr(S) I)⁺, and with k classes before and c after it
    P ← (k P + (c − k) P') / c + k (c − k) / c³ · Δ Δᵀ, where Δ is the mean of the old class means minus that of the new
    ones. Neither the mean of inverses nor the last term is exact: :class:`~cil.classifiers.LDA` is, from sums. So P
    depends on how classes are divided over calls.

    Buffers:
        precision: P, float64 [F, F]. The class means are those of ``classes``, an :class:`~cil.classifiers.NCM`.
    """

    precision: Tensor

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim)
        self.classes = NCM(feature_dim)
        self.register_buffer("precision", torch.zeros(feature_dim, feature_dim, dtype=torch.float64))

    @property
    def num_classes(self) -> int:
        return self.classes.num_classes

    def grow(self, classes: int) -> None:
        self.classes.grow(classes)

    @property
    def counts(self) -> Tensor:
        """Number of samples of each class, int64 [C]."""
        return self.classes.counts

    @exact()
    def partial_fit(self, features: Array, labels: Array) -> AveragedPrecision:
        x, y = self.prepare_fit(features, labels)
        new = torch.bincount(y, minlength=self.num_classes) > 0
        old = self.counts > 0
        if bool((new & old).any()):
            raise DataError(f"AveragedPrecision: class {int((new & old).nonzero()[0])} has samples already")
        means = self.classes.partial_fit(x, y).means
        centred = x - means[y]
        covariance = centred.T @ centred / max(1, len(x) - 1)
        spread = torch.eye(self.feature_dim).to(covariance) * covariance.trace()
        precision = self.feature_dim * torch.linalg.pinv((len(x) - 1) * covariance + spread, hermitian=True)
        if not bool(old.any()):
            self.precision.copy_(precision)
            return self
        before, added = int(old.sum()), int(new.sum())
        share = before / (before + added)
        apart = means[old].mean(0) - means[new].mean(0)
        mixed = share * self.precision + (1 - share) * precision
        self.precision.copy_(mixed + share * (1 - share) / (before + added) * torch.outer(apart, apart))
        return self

    @without_autocast()
    def logits(self, features: Array) -> Tensor:
        features = self.checked(features)
        weights, bias = self.cached("rule", self._solve)
        return self.classes.only_seen(features @ weights.T.to(features.dtype) + bias.to(features.dtype))

    def _solve(self) -> tuple[Tensor, Tensor]:
        means = self.classes.means
        weights = means @ self.precision
        bias = -(weights * means).sum(1) / 2 - (self.counts > 0).sum().clamp(min=1).double().log()
        return weights, bias
