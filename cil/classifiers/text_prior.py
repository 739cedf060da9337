"""Classifiers for which a class's text is worth a number of images: LDA and ridge regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cil.classifiers.base import Array
from cil.classifiers.lda import LDA
from cil.classifiers.memory import DOUBLE
from cil.classifiers.ridge import Ridge
from cil.utils.packed import add_packed_gram_
from cil.utils.precision import exact


def expected_means(sums: Tensor, counts: Tensor, texts: Tensor) -> Tensor | None:
    """What texts say of class means: m_c = x̄ + γ (t_c − t̄), float64 [C, d].

    x̄ is the mean of all images, t̄ that of the prototypes of classes with images, and
    γ = Σ_c n_c ⟨μ_c − x̄, t_c − t̄⟩ / Σ_c n_c ‖t_c − t̄‖²: one number, from sums, that fits the spread of texts to that
    of images.

    Args:
        sums: Sum of each class's features, float64 [C, d].
        counts: Number of them, int64 [C].
        texts: Prototypes, [C, d] or more rows.

    Returns:
        The means, x̄ for a class without images; None if fewer than two classes have images: one text has no spread.
    """
    seen = counts > 0
    if int(seen.sum()) < 2:
        return None
    weights = counts.double()[:, None]
    prototypes = texts[: len(counts)].to(sums)
    centre = sums.sum(0) / weights.sum()
    apart = torch.where(seen[:, None], prototypes - prototypes[seen].mean(0), 0.0)
    fitted = ((sums - weights * centre) * apart).sum() / (weights * apart.square()).sum().clamp(min=1e-12)
    return centre + fitted * apart


class TextLDA(LDA):
    """LDA with κ virtual images per class at :func:`expected_means`.

    A class mean is (n_c μ_c + κ m_c) / (n_c + κ), and Σ is that of the images. κ = 0 is LDA, κ → ∞ compares with texts
    alone, and the prior fades as images come.

    Args:
        feature_dim: Width d of the joint space.
        texts: The prototypes so far, [C, d].
        prior: κ ≥ 0.
        more: Arguments of :class:`LDA`.
    """

    def __init__(self, feature_dim: int, texts: Callable[[], Tensor], prior: float, **more: Any) -> None:
        super().__init__(feature_dim, **{"shrinkage": "samples", "priors": "uniform", **more})
        self._texts, self.prior = texts, prior

    @property
    def decision_means(self) -> Tensor:
        expected = expected_means(self.sums, self.counts, self._texts()) if self.prior else None
        if expected is None:
            return self.means
        counts = self.counts.double()[:, None]
        return (counts * self.means + self.prior * expected) / (counts + self.prior)


class TextRidge(Ridge):
    """Ridge regression with κ virtual images per class at :func:`expected_means`.

    They enter G and Q only where W is solved: the sums stay those of the images, and so does the choice of λ. With
    ``balance`` a virtual image weighs as much as an image of its class.

    Args:
        feature_dim: Width d of the joint space.
        texts: The prototypes so far, [C, d].
        prior: κ ≥ 0.
        more: Arguments of :class:`Ridge`.

    Buffers:
        sums: float64 [C, d], sum of each class's features before the projection.
    """

    per_class = (*Ridge.per_class, "sums")
    sums: Tensor

    def __init__(self, feature_dim: int, texts: Callable[[], Tensor], prior: float, *more: Any) -> None:
        super().__init__(feature_dim, *more)
        self._texts, self.prior = texts, prior
        self.register_buffer("sums", torch.zeros(0, feature_dim, dtype=torch.float64))

    def peak_bytes(self, classes: int, width: int) -> float:
        return super().peak_bytes(classes, width) + DOUBLE * width**2

    @exact()
    def partial_fit(self, features: Array, labels: Array, *args: Any, **more: Any) -> TextRidge:
        super().partial_fit(features, labels, *args, **more)
        features, labels = self.prepare_fit(features, labels)
        self.sums.index_add_(0, labels, features)
        return self

    def _virtual(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Which classes have virtual images, bool [C], their H, and what each is worth; None without any."""
        expected = expected_means(self.sums, self.counts, self._texts()) if self.prior else None
        if expected is None:
            return None
        seen = self.counts > 0
        worth = (self.prior * self.totals[seen].double() / self.counts[seen])[:, None]
        return seen, self.expand(expected[seen]), worth

    def solved_triangle(self) -> Tensor:
        triangle, virtual = super().solved_triangle(), self._virtual()
        if virtual is not None:
            triangle = triangle.clone()
            add_packed_gram_(triangle, virtual[2].sqrt() * virtual[1])
        return triangle

    def solved_targets(self) -> Tensor:
        virtual = self._virtual()
        if virtual is None:
            return super().solved_targets()
        seen, h, worth = virtual
        targets = self.targets.clone()
        targets[seen] += worth * h
        return targets
