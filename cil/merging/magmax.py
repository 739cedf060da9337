"""The largest change of every weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cil.errors import ConfigError
from cil.merging.base import Task, TaskStatistics
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.linear import SumRule
from cil.merging.store import State


class MagMax(SumRule):
    """Per weight the update of largest magnitude over tasks: θ = θ_0 + s τ_max (MagMax, arXiv 2407.06322).

    A running maximum, so exact in constant memory. Of equal magnitudes the later task's wins; but for those it is
    order-free.

    Args:
        scale: s, finite.

    Raises:
        ConfigError: ``scale`` is not finite.
    """

    def __init__(self, scale: float = 0.5, *, finalisers: Sequence[Finaliser] = ()) -> None:
        super().__init__(finalisers)
        if not math.isfinite(scale):
            raise ConfigError(f"MagMax: scale is {scale}; it must be finite")
        self.scale = scale

    def update(self, entry: Entry, state: State, tau: Tensor, task: Task, stats: TaskStatistics | None) -> State:
        return {"sum": torch.where(tau.abs() >= state["sum"].abs(), tau, state["sum"])}

    def read(self, entry: Entry, state: State, surveyed: float) -> Tensor:
        return self.scale * state["sum"]
