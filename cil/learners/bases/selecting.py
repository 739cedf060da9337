"""The key ``select``: which features a classifier made of sums uses."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from cil.classifiers.selection import Score, Selection
from cil.config import Section


class SelectionConfig(Section):
    """Features that a classifier uses; see :mod:`cil.classifiers.selection`."""

    fraction: float = Field(0.5, gt=0, le=1, description="share of the features that the classifier uses")
    score: Score = Field(
        "ridge",
        description="rank of a feature; ridge: by its weights in the solution on all features; f: by its variance "
        "between classes over that within them",
    )


def _as_selection(raw: Any) -> Any:
    """Expand a bare share to a section: ``0.1`` to ``{fraction: 0.1}``."""
    return {"fraction": raw} if isinstance(raw, int | float) and not isinstance(raw, bool) else raw


Selected = Annotated[
    Annotated[SelectionConfig | None, BeforeValidator(_as_selection)],
    Field(
        description="features that the classifier uses, chosen again after every task from its sums over all of "
        "them: a share, or a section; null: all"
    ),
]
"""Type of the key ``select``."""


def selection_of(config: SelectionConfig | None) -> Selection | None:
    """The selection that a configuration names."""
    return None if config is None else Selection(config.fraction, config.score)
