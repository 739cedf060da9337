"""A sum of linear discriminants, each on its own part of the features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from cil.classifiers.base import Array, Classifier, StatisticsClassifier
from cil.classifiers.lda import LDA, Shrinkage
from cil.errors import ConfigError
from cil.utils.precision import exact, without_autocast


class PartsLDA(StatisticsClassifier):
    """logit_c = mean over parts k of logit_c of an :class:`LDA` with equal priors on the features' columns of part k.

    Every part has its own covariance and its own shrinkage; between parts there is none, as if they were independent
    given the class. For K parts of equal width this takes 1/K of the memory and 1/K² of the time of one LDA on all
    features, and it has fewer covariances to estimate.

    Args:
        feature_dim: Feature width F.
        parts: The columns of every part; a column may be in several parts or in none.
        shrinkage: Shrinkage s of every part in [0, 1], or ``gcv``.

    Buffers:
        counts: int64 [C]. heads.k.…: the sums of part k, see :class:`LDA`.

    Raises:
        ConfigError: An argument is out of range.
    """

    over_classes = ()
    removed_with = "samples"

    def __init__(self, feature_dim: int, parts: Sequence[Sequence[int]], shrinkage: Shrinkage = "gcv") -> None:
        super().__init__(feature_dim)
        if not parts or not all(parts) or not all(0 <= column < feature_dim for part in parts for column in part):
            raise ConfigError(f"PartsLDA: every part needs columns, and columns are from 0 to {feature_dim - 1}")
        self.heads = nn.ModuleList(LDA(len(part), shrinkage, "uniform") for part in parts)
        self._columns = [torch.tensor(list(part)) for part in parts]
        self.require_memory()

    def kept_bytes(self, classes: int, width: int) -> float:
        return sum(head.kept_bytes(classes, part) for head, part in self._scaled(width))

    def peak_bytes(self, classes: int, width: int) -> float:
        """What all parts keep, and what solving the widest takes: parts are solved one after the other."""
        solving = [
            head.peak_bytes(classes, part) - head.kept_bytes(classes, part) for head, part in self._scaled(width)
        ]
        return self.kept_bytes(classes, width) + max(solving)

    def _scaled(self, width: int) -> list[tuple[LDA, int]]:
        """Every part's LDA, with its width if all features were ``width`` wide."""
        return [(head, -(-head.feature_dim * width // self.feature_dim)) for head in self._lda()]

    def _lda(self) -> list[LDA]:
        return [head for head in self.heads if isinstance(head, LDA)]

    @exact()
    def grow(self, classes: int) -> None:
        super().grow(classes)
        for head in self._lda():
            head.grow(self.num_classes)

    def _parts(self, features: Tensor) -> Iterator[tuple[LDA, Tensor]]:
        """Every part's LDA, with its columns of features [N, F]."""
        for head, columns in zip(self._lda(), self._columns, strict=True):
            yield head, features[:, columns.to(features.device)]

    def unlike(self, other: Classifier) -> str | None:
        if (found := super().unlike(other)) is not None or not isinstance(other, PartsLDA):
            return found
        same = len(self._columns) == len(other._columns) and all(map(torch.equal, self._columns, other._columns))
        return None if same else "choice of parts"

    @exact()
    def add(self, others: Sequence[tuple[PartsLDA, Sequence[int]]]) -> PartsLDA:
        super().add(others)
        for k, head in enumerate(self._lda()):
            head.add([(other._lda()[k], rows) for other, rows in others])
        return self

    @exact()
    def clear(self) -> PartsLDA:
        for head in self._lda():
            head.clear()
        return super().clear()

    @exact()
    def remove(self, label: int, features: Array | None = None) -> PartsLDA:
        super().remove(label, features)
        if features is None:  # the class has no samples
            return self
        for head, part in self._parts(self.checked(features)):
            head.remove(label, part)
        return self

    @exact()
    def partial_fit(self, features: Array, labels: Array) -> PartsLDA:
        features = self.checked(features)
        labels = self.checked_labels(labels, len(features))
        for head, part in self._parts(features):
            head.partial_fit(part, labels)
        self.grow(max(head.num_classes for head in self._lda()))
        self.counts += torch.bincount(labels, minlength=self.num_classes)
        return self

    @without_autocast()
    def logits(self, features: Array) -> Tensor:
        features = self.checked(features)
        return torch.stack([head.logits(part) for head, part in self._parts(features)]).mean(0)

    @property
    def shrinkages(self) -> list[float]:
        """The shrinkage in use for each part."""
        return [s for head in self._lda() for s in head.shrinkages]
