"""Class means and covariances, stored as sums."""

from __future__ import annotations

import torch
from torch import Tensor

from cil.classifiers.base import Array, StatisticsClassifier
from cil.utils.precision import exact

CONSTANT = 1e-12
"""A variance below this share of the mean square is rounding error of the sum of squares: the feature is constant."""


class ClassMoments(StatisticsClassifier):
    """First and second moments of every class. A cached solution for a class is valid until the class gets new samples.

    Buffers:
        sums: float64 [C, F]; outers: float64 [C, F, F], Σ x xᵀ; counts: int64 [C].
    """

    per_class = ("sums", "outers", "counts")
    sums: Tensor
    outers: Tensor

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim)
        self.register_buffer("sums", torch.zeros(0, feature_dim, dtype=torch.float64))
        self.register_buffer("outers", torch.zeros(0, feature_dim, feature_dim, dtype=torch.float64))

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
        constant = centred.diagonal() <= CONSTANT * second.diagonal()
        centred[constant] = 0
        centred[:, constant] = 0
        return centred / max(1, n - 1)

    def _forget(self, labels: Tensor | None = None) -> None:
        if labels is None:
            self._solved.clear()
            return
        changed = set(labels.tolist())
        for key in [key for key in self._solved if key[0] in changed]:
            del self._solved[key]
