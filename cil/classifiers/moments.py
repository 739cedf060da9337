"""Class means and covariances, stored as sums."""

from __future__ import annotations

import torch
from torch import Tensor

from cil.classifiers.base import Array, StatisticsClassifier
from cil.classifiers.memory import DOUBLE
from cil.utils.precision import exact

CONSTANT = 1e-12
"""A variance below this share of the mean square is rounding error of the sum of squares: the feature is constant."""


def zero_constant_(centred: Tensor, second: Tensor) -> Tensor:
    """Set rows and columns of constant features to 0 in place: centred sums of squares [F, F] beside uncentred ones."""
    constant = centred.diagonal() <= CONSTANT * second.diagonal()
    centred[constant] = 0
    centred[:, constant] = 0
    return centred


class ClassMoments(StatisticsClassifier):
    """First and second moments of every class. A cached solution for a class is valid until the class gets new samples.

    Buffers:
        sums: float64 [C, F]; outers: float64 [C, F, F], Σ x xᵀ; counts: int64 [C].
    """

    per_class = ("sums", "outers", "counts")
    removed_with = "nothing"
    over_classes = ()
    sums: Tensor
    outers: Tensor

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim)
        self.require_memory()
        self.register_buffer("sums", torch.zeros(0, feature_dim, dtype=torch.float64))
        self.register_buffer("outers", torch.zeros(0, feature_dim, feature_dim, dtype=torch.float64))

    def kept_bytes(self, classes: int, width: int) -> float:
        return super().kept_bytes(classes, width) + DOUBLE * classes * width**2

    def peak_bytes(self, classes: int, width: int) -> float:
        """Copies of the matrices while they grow, a solution per class, and what solving one class takes.

        The factor is what ``scripts/bench/growth.py`` measured for 1,000 classes.
        """
        return 3.6 * self.kept_bytes(classes, width) + 5 * DOUBLE * width**2

    @exact()
    def partial_fit(self, features: Array, labels: Array) -> ClassMoments:
        features, labels = self.prepare_fit(features, labels)
        features = self.transform(features)
        self.sums.index_add_(0, labels, features)
        self.counts += torch.bincount(labels, minlength=self.num_classes)
        for c in labels.unique().tolist():
            x = features[labels == c]
            self.outers[c].addmm_(x.T, x)
        return self

    def transform(self, features: Tensor) -> Tensor:
        """Transform features [N, F] before their moments are computed; by default they stay as they are."""
        return features

    @property
    def means(self) -> Tensor:
        """Class means, float64 [C, F]; zero for a class without samples."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    def covariance(self, c: int) -> Tensor:
        """Unbiased covariance of class c, float64 [F, F]; exactly symmetric; zero for fewer than two samples."""
        n = int(self.counts[c])
        second = (self.outers[c] + self.outers[c].T) / 2
        centred = second - torch.outer(self.sums[c], self.sums[c]) / max(1, n)
        return zero_constant_(centred, second) / max(1, n - 1)

    @property
    def flat(self) -> Tensor:
        """Whether a class has no variance: a single sample, equal samples, or no sample; bool [C]."""
        second = self.outers.diagonal(dim1=1, dim2=2)
        centred = second - self.sums.square() / self.counts.clamp(min=1)[:, None]
        return (centred <= CONSTANT * second).all(1)

    def own_or_pooled(self, c: int) -> Tensor:
        """Covariance of class c, or the pooled one of all others if it has no variance; float64 [F, F]."""
        covariance = self.covariance(c)
        return covariance if bool(covariance.any()) else self.pooled()

    def pooled(self) -> Tensor:
        """Σ_c (n_c − 1) Σ_c / Σ_c (n_c − 1) over the classes with variance, float64 [F, F]; zero without any."""
        total = torch.zeros_like(self.outers[0])
        varied = (~self.flat).nonzero().flatten().tolist()
        for c in varied:
            total += (self.counts[c] - 1) * self.covariance(c)
        return total / max(1, sum(int(self.counts[c]) - 1 for c in varied))

    def _forget(self, labels: Tensor | None = None) -> None:
        if labels is None:
            self._solved.clear()
            return
        changed = {*labels.tolist(), *self.flat.nonzero().flatten().tolist()}  # these borrow from all others
        for key in [key for key in self._solved if key[0] in changed]:
            del self._solved[key]
