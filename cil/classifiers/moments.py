"""Class means and covariances, stored as sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cil.classifiers.base import Array, StatisticsClassifier
from cil.classifiers.memory import DOUBLE
from cil.utils.packed import diagonals, pack, packed_size, unpack
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
        sums: float64 [C, F]; triangles: float64 [C, F (F + 1) / 2], the lower triangles of Σ x xᵀ, row by row; counts:
        int64 [C]. A stored state of before, whose ``outers`` [C, F, F] are whole matrices, can be loaded, too.
    """

    per_class = ("sums", "triangles", "counts")
    removed_with = "nothing"
    over_classes = ()
    sums: Tensor
    triangles: Tensor

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim)
        self.require_memory()
        self.register_buffer("sums", torch.zeros(0, feature_dim, dtype=torch.float64))
        self.register_buffer("triangles", torch.zeros(0, packed_size(feature_dim), dtype=torch.float64))

    def kept_bytes(self, classes: int, width: int) -> float:
        return super().kept_bytes(classes, width) + DOUBLE * classes * packed_size(width)

    def peak_bytes(self, classes: int, width: int) -> float:
        """Copies of the triangles while they grow, that of a solution per class, and what solving one class takes."""
        return 3 * self.kept_bytes(classes, width) + 8 * DOUBLE * width**2

    @exact()
    def partial_fit(self, features: Array, labels: Array) -> ClassMoments:
        features, labels = self.prepare_fit(features, labels)
        features = self.transform(features)
        self.sums.index_add_(0, labels, features)
        self.counts += torch.bincount(labels, minlength=self.num_classes)
        for c in labels.unique().tolist():
            x = features[labels == c]
            self.set_outer(c, self.outer(c).addmm_(x.T, x))
        return self

    def transform(self, features: Tensor) -> Tensor:
        """Transform features [N, F] before their moments are computed; by default they stay as they are."""
        return features

    def outer(self, c: int) -> Tensor:
        """Σ x xᵀ of class c, float64 [F, F]; exactly symmetric; a new tensor."""
        return unpack(self.triangles[c], self.feature_dim)

    def set_outer(self, c: int, outer: Tensor) -> None:
        """Set Σ x xᵀ of class c to the mean of ``outer`` [F, F] and its transpose."""
        pack((outer + outer.T) / 2, out=self.triangles[c])

    @property
    def means(self) -> Tensor:
        """Class means, float64 [C, F]; zero for a class without samples."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    def covariance(self, c: int) -> Tensor:
        """Unbiased covariance of class c, float64 [F, F]; exactly symmetric; zero for fewer than two samples."""
        n = int(self.counts[c])
        second = self.outer(c)
        centred = second - torch.outer(self.sums[c], self.sums[c]) / max(1, n)
        return zero_constant_(centred, second) / max(1, n - 1)

    @property
    def flat(self) -> Tensor:
        """Whether a class has no variance: a single sample, equal samples, or no sample; bool [C]."""
        second = diagonals(self.triangles, self.feature_dim)
        centred = second - self.sums.square() / self.counts.clamp(min=1)[:, None]
        return (centred <= CONSTANT * second).all(1)

    def own_or_pooled(self, c: int) -> Tensor:
        """Covariance of class c, or the pooled one of all others if it has no variance; float64 [F, F]."""
        covariance = self.covariance(c)
        return covariance if bool(covariance.any()) else self.cached(("pooled",), self.pooled)

    def pooled(self) -> Tensor:
        """Σ_c (n_c − 1) Σ_c / Σ_c (n_c − 1) over the classes with variance, float64 [F, F]; zero without any."""
        total = self.triangles.new_zeros(self.feature_dim, self.feature_dim)
        varied = (~self.flat).nonzero().flatten().tolist()
        for c in varied:
            total += (self.counts[c] - 1) * self.covariance(c)
        return total / max(1, sum(int(self.counts[c]) - 1 for c in varied))

    def _forget(self, labels: Tensor | None = None) -> None:
        if labels is None:
            self._solved.clear()
            return
        flat = self.flat.nonzero().flatten().tolist()  # these borrow from all others
        changed = {*labels.tolist(), *flat, "pooled"}
        for key in [key for key in self._solved if key[0] in changed]:
            del self._solved[key]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        outers = state_dict.pop(f"{prefix}outers", None)
        if outers is not None:
            triangles = outers.new_empty(len(outers), packed_size(outers.shape[1]))
            for outer, triangle in zip(outers, triangles, strict=True):
                pack((outer + outer.T) / 2, out=triangle)
            state_dict[f"{prefix}triangles"] = triangles
        super()._load_from_state_dict(state_dict, prefix, *args)
