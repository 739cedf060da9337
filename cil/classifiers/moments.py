"""Class means and covariances, stored as sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cil.classifiers.base import Array, Classifier, StatisticsClassifier
from cil.classifiers.low_rank import LowRank, leading
from cil.classifiers.memory import DOUBLE
from cil.errors import ConfigError
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

    With a ``rank`` r, only r leading directions of a class's covariance are kept, and the rest of each variance on the
    diagonal: (Σ (x − μ)(x − μ)ᵀ) ≈ RᵀR + diag(d). Variances are exact, and so is all of a class whose samples came in
    calls, moves and sums that leave it r directions or fewer, e.g. of r + 1 samples. Otherwise samples that come in
    several calls give other directions than those that come in one.

    Args:
        feature_dim: Feature width F.
        rank: Number r ≥ 1 of directions; F if it is larger; None: whole covariances.

    Buffers:
        sums: float64 [C, F]; triangles: float64 [C, F (F + 1) / 2], the lower triangles of Σ x xᵀ, row by row; counts:
        int64 [C]. A stored state of before, whose ``outers`` [C, F, F] are whole matrices, can be loaded, too. With a
        rank, rows: float64 [C, r, F], R, and rest: float64 [C, F], d, are in place of the triangles.

    Raises:
        ConfigError: ``rank`` is not positive.
    """

    per_class: tuple[str, ...] = ("sums", "triangles", "counts")
    removed_with = "nothing"
    over_classes = ()
    sums: Tensor
    triangles: Tensor
    rows: Tensor
    rest: Tensor

    def __init__(self, feature_dim: int, rank: int | None = None) -> None:
        super().__init__(feature_dim)
        if rank is not None and rank < 1:
            raise ConfigError(f"{type(self).__name__}: rank is {rank}; it must be at least 1, or None")
        self.rank = rank if rank is None else min(rank, feature_dim)
        self.require_memory()
        self.register_buffer("sums", torch.zeros(0, feature_dim, dtype=torch.float64))
        if self.rank is None:
            self.register_buffer("triangles", torch.zeros(0, packed_size(feature_dim), dtype=torch.float64))
        else:
            self.per_class = ("sums", "rows", "rest", "counts")
            self.register_buffer("rows", torch.zeros(0, self.rank, feature_dim, dtype=torch.float64))
            self.register_buffer("rest", torch.zeros(0, feature_dim, dtype=torch.float64))

    def kept_bytes(self, classes: int, width: int) -> float:
        spread = packed_size(width) if self.rank is None else (min(self.rank, width) + 1) * width
        return super().kept_bytes(classes, width) + DOUBLE * classes * spread

    def peak_bytes(self, classes: int, width: int) -> float:
        """Copies of what is kept while it grows, that of a solution per class, and what solving one class takes."""
        solving = 8 * width**2
        if self.rank is not None:  # what classes without variance borrow has the directions of all others
            solving = 3 * min(width, classes * self.rank) ** 2
        return 3 * self.kept_bytes(classes, width) + DOUBLE * solving

    @property
    def narrower(self) -> str:
        low = "keep few directions of each covariance (`covariance_rank`, where the learner has it), or "
        return (low if self.rank is None else "") + super().narrower

    def unlike(self, other: Classifier) -> str | None:
        if (found := super().unlike(other)) is not None or not isinstance(other, ClassMoments):
            return found
        return None if other.rank == self.rank else "rank of covariances"

    @exact()
    def partial_fit(self, features: Array, labels: Array) -> ClassMoments:
        features, labels = self.prepare_fit(features, labels)
        features = self.transform(features)
        if self.rank is not None:
            for c in labels.unique().tolist():
                x = features[labels == c]
                total = x.sum(0)
                self._merge(c, x - total / len(x), torch.zeros_like(total), total, len(x))
            return self
        self.sums.index_add_(0, labels, features)
        self.counts += torch.bincount(labels, minlength=self.num_classes)
        for c in labels.unique().tolist():
            x = features[labels == c]
            self.set_outer(c, self.outer(c).addmm_(x.T, x))
        return self

    def _merge(self, c: int, rows: Tensor, rest: Tensor, total: Tensor, count: int) -> None:
        """Add ``count`` samples with the sum ``total`` [F] and the squares RᵀR + diag(d) around their mean to class c.

        Squares around the common mean have one direction more, that between both means.
        """
        n = int(self.counts[c])
        if count:
            apart = self.sums[c] / max(1, n) - total / count
            between = (n * count / (n + count)) ** 0.5 * apart
            self.widen(c, torch.cat([rows, between[None]]), rest)
        self.sums[c] += total
        self.counts[c] += count

    def widen(self, c: int, rows: Tensor, rest: Tensor | None = None) -> None:
        """Add rowsᵀ rows + diag(``rest``) to the squares of class c around its mean, with a rank."""
        rest = self.rest[c] if rest is None else self.rest[c] + rest
        self.rows[c], self.rest[c] = leading(torch.cat([self.rows[c], rows]), rest, len(self.rows[c]))

    def _add_classes(self, other: ClassMoments, place: Tensor) -> None:
        if self.rank is None:
            super()._add_classes(other, place)
            return
        for i, c in enumerate(place.tolist()):
            rows, rest, total = (kept[i].to(self.device) for kept in (other.rows, other.rest, other.sums))
            self._merge(c, rows, rest, total, int(other.counts[i]))

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
        if self.rank is not None:
            return self.low_rank_covariance(c).dense()
        n = int(self.counts[c])
        second = self.outer(c)
        centred = second - torch.outer(self.sums[c], self.sums[c]) / max(1, n)
        return zero_constant_(centred, second) / max(1, n - 1)

    def low_rank_covariance(self, c: int) -> LowRank:
        """The covariance of class c as it is kept with a rank; as :meth:`covariance`."""
        n, kept = int(self.counts[c]), LowRank(self.rows[c], self.rest[c])
        varied = kept.variances > CONSTANT * (kept.variances + self.sums[c].square() / max(1, n))
        return LowRank(kept.rows * varied, kept.rest * varied) / max(1, n - 1)

    @property
    def variation(self) -> Tensor:
        """Σ (x_f − μ_f)² of each class and feature, float64 [C, F]."""
        if self.rank is not None:
            return self.rows.square().sum(1) + self.rest
        return self.squares - self.sums.square() / self.counts.clamp(min=1)[:, None]

    @property
    def squares(self) -> Tensor:
        """Σ x_f² of each class and feature, float64 [C, F]."""
        if self.rank is not None:
            return self.variation + self.sums.square() / self.counts.clamp(min=1)[:, None]
        return diagonals(self.triangles, self.feature_dim)

    @property
    def flat(self) -> Tensor:
        """Whether a class has no variance: a single sample, equal samples, or no sample; bool [C]."""
        return (self.variation <= CONSTANT * self.squares).all(1)

    def own_or_pooled(self, c: int) -> Tensor:
        """Covariance of class c, or the pooled one of all others if it has no variance; float64 [F, F]."""
        if self.rank is not None:
            return self.low_rank(c).dense()
        covariance = self.covariance(c)
        return covariance if bool(covariance.any()) else self.cached(("pooled",), self.pooled)

    def low_rank(self, c: int) -> LowRank:
        """:meth:`own_or_pooled`, as it is kept with a rank."""
        own = self.low_rank_covariance(c)
        return own if bool(own.variances.any()) else self.cached(("pooled",), self.low_rank_pooled)

    def low_rank_pooled(self) -> LowRank:
        """:meth:`pooled`, with the rank of each class."""
        varied = ~self.flat
        rows, rest = self.rows[varied].flatten(0, 1), self.rest[varied].sum(0)
        return leading(rows, rest, self.rows.shape[1]) / max(1, int((self.counts[varied] - 1).sum()))

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
