"""MagMax: the largest change of every weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cil.merging.base import TaskNorms, TaskStatistics
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.linear import SumRule
from cil.merging.numerics import require_finite
from cil.merging.store import State


class MagMax(SumRule):
    """Per weight the update of largest magnitude over tasks: θ = θ_0 + s τ_max (MagMax, arXiv 2407.06322).

    This is a running maximum, so it is exact in constant memory. Among equal magnitudes the later task wins; except for
    such ties the rule is order-free.

    Args:
        scale: Factor s, finite.

    Raises:
        ConfigError: ``scale`` is not finite.
    """

    summary = "largest change of every weight"
    paper = "arXiv 2407.06322"

    def __init__(self, scale: float = 0.5, *, finalisers: Sequence[Finaliser] = ()) -> None:
        super().__init__(finalisers)
        require_finite("MagMax", scale)
        self.scale = scale

    def update(self, entry: Entry, state: State, tau: Tensor, task: TaskNorms, stats: TaskStatistics | None) -> State:
        return {"sum": torch.where(tau.abs() >= state["sum"].abs(), tau, state["sum"])}

    def read(self, entry: Entry, state: State, statistic: float) -> Tensor:
        return self.scale * state["sum"]
