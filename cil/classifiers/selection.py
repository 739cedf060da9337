"""Selection of features from a classifier's sums: Head2Toe in closed form.

Head2Toe (Evci et al., ICML 2022, arXiv 2201.03529) trains a linear head on all features with a group lasso, keeps the
features with the largest weights, and trains a head on these. If a classifier keeps sums over *all* features, a head on
some of them needs no image: its sums are parts of these. The selection is therefore that of joint training, whatever
the order of the samples, and later tasks may change it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cil.classifiers.base import StatisticsClassifier
from cil.classifiers.moments import CONSTANT
from cil.errors import ConfigError
from cil.utils.precision import exact

Score = Literal["ridge", "f"]
"""``ridge``: how much a feature takes part in the scores of the solution on all features. ``f``: variance between
classes over variance within them."""


@dataclass(frozen=True)
class Selection:
    """Which features a classifier uses.

    Args:
        fraction: Share of the features that is used, in (0, 1]; at least one feature is.
        score: What they are ranked by.

    Raises:
        ConfigError: An argument is out of range.
    """

    fraction: float
    score: Score = "ridge"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"select: fraction is {self.fraction}; it must be above 0 and at most 1")
        if self.score not in get_args(Score):
            raise ConfigError(f"select: score is {self.score!r}; it must be {' or '.join(get_args(Score))}")

    def columns(self, scores: Tensor) -> Tensor:
        """The best features, int64 [k], ascending, given the score of each, [M]; of equal ones the first."""
        count = max(1, round(self.fraction * len(scores)))
        return scores.argsort(descending=True, stable=True)[:count].sort().values


class SelectsFeatures(StatisticsClassifier):
    """A classifier that may use a selection of its features.

    Attributes:
        select: The selection; None: all features.
    """

    select: Selection | None = None

    @property
    def selected(self) -> Tensor | None:
        """The columns in use, int64 [k], ascending; None: all of them."""
        return None if self.select is None else self.cached("selected", self._select)

    @abstractmethod
    def feature_scores(self, score: Score) -> Tensor | None:
        """The score of every feature, float64 [M]; None while the samples are too few to tell."""

    @exact()
    def _select(self) -> Tensor | None:
        if self.select is None or (scores := self.feature_scores(self.select.score)) is None:
            return None
        return None if self.select.fraction == 1 else self.select.columns(scores)


def variances_within(second: Tensor, means: Tensor, totals: Tensor) -> Tensor:
    """Variance of each feature around the class means, float64 [M]; 0 for a feature that is constant in every class.

    Args:
        second: Σ x² of each feature over all samples, [M]: the diagonal of Σ x xᵀ.
        means: Class means, [C, M].
        totals: Weight of each class in the sums, [C].
    """
    centred = second - totals.to(means) @ means.square()
    return torch.where(centred > CONSTANT * second, centred, 0.0) / totals.sum().clamp(min=1)


def variance_ratios(second: Tensor, means: Tensor, totals: Tensor) -> Tensor:
    """Variance between classes over variance within them of each feature, float64 [M]: its F statistic, but a factor.

    0 for a constant feature, infinite for one that is constant within classes alone. Arguments as in
    :func:`variances_within`.
    """
    weights = totals.to(means) / totals.sum().clamp(min=1)
    between = weights @ (means - weights @ means).square()
    between = torch.where(between > CONSTANT * second / totals.sum().clamp(min=1), between, 0.0)
    return (between / variances_within(second, means, totals)).nan_to_num(nan=0.0, posinf=torch.inf)
