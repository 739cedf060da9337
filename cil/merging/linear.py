"""Linear combinations of task vectors: running average, WiSE-FT, moving average, task arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from cil.errors import ConfigError
from cil.merging.base import Rule, Task, TaskStatistics
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.store import Slots, State


class SumRule(Rule):
    """A rule whose state is one tensor of every entry's shape.

    Slots:
        sum: the accumulated update, in the computing dtype. Sums, not means: convex updates drift.
    """

    def slots(self, entry: Entry) -> Slots:
        return {"sum": (entry.shape, self.layout.dtype)}

    def update(self, entry: Entry, state: State, tau: Tensor, task: Task, stats: TaskStatistics | None) -> State:
        return {"sum": state["sum"] + tau}


class Average(SumRule):
    """Running mean of the models: θ = θ_0 + Σ τ_t / T (model soups, arXiv 2203.05482, one model after the other).

    Exact and order-free. For orthogonal updates of equal norm the norm of the result falls as 1/√T.
    """

    def read(self, entry: Entry, state: State, surveyed: float) -> Tensor:
        return state["sum"] / int(self.count)


class WiseFT(SumRule):
    """Interpolation of every new model with the merged one: A_t = (1 − α) A_{t−1} + α τ_t (WiSE-FT, arXiv 2109.01903).

    WiSE-FT itself interpolates one fine-tuned model with its start, α in [0, 1] chosen on validation data and 0.5
    otherwise; that is the first task here. Two sequential readings share the formula: models fine-tuned from θ_0 make
    it a moving average, in which a task merged k tasks ago weighs α(1 − α)^k; models fine-tuned from the last merged
    one are each interpolated with their start. Which of them it is depends on what is handed to ``add``.

    Raises:
        ConfigError: ``alpha`` is not in [0, 1].
    """

    order_free = False

    def __init__(self, alpha: float = 0.5, *, finalisers: Sequence[Finaliser] = ()) -> None:
        super().__init__(finalisers)
        if not 0 <= alpha <= 1:
            raise ConfigError(f"{type(self).__name__}: alpha is {alpha}; it must be in [0, 1]")
        self.alpha = alpha

    def update(self, entry: Entry, state: State, tau: Tensor, task: Task, stats: TaskStatistics | None) -> State:
        return {"sum": (1 - self.alpha) * state["sum"] + self.alpha * tau}

    def read(self, entry: Entry, state: State, surveyed: float) -> Tensor:
        return state["sum"]


class EMA(WiseFT):
    """Exponential moving average of the models: A_1 = τ_1, then A_t = (1 − α) A_{t−1} + α τ_t.

    WiSE-FT but for its start: the first model counts whole, not as far as α away from θ_0. With α = 1 the newest model
    stays, with α = 0 the first. LAE (arXiv 2303.10070) averages after every optimiser step, this after every task.

    Raises:
        ConfigError: ``alpha`` is not in [0, 1].
    """

    def update(self, entry: Entry, state: State, tau: Tensor, task: Task, stats: TaskStatistics | None) -> State:
        return super().update(entry, state, tau, task, stats) if int(self.count) else {"sum": tau}


class TaskArithmetic(SumRule):
    """θ = θ_0 + s Σ τ_t (arXiv 2212.04089), or s/T in place of s. Exact and order-free.

    What ``peft.utils.merge_utils.task_arithmetic`` computes for equal weights s; that one stacks all tasks' tensors,
    this one adds one task after the other.

    Args:
        scale: s, finite. The continual-merging experiments of OPCM's authors use 0.3 for 8 tasks and 0.1 for 14 and 20.
        divide: ``none``, or ``tasks``: by the number of tasks T, for streams whose length is not known.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self, scale: float = 0.3, divide: Literal["none", "tasks"] = "none", *, finalisers: Sequence[Finaliser] = ()
    ) -> None:
        super().__init__(finalisers)
        if not math.isfinite(scale):
            raise ConfigError(f"TaskArithmetic: scale is {scale}; it must be finite")
        if divide not in ("none", "tasks"):
            raise ConfigError(f"TaskArithmetic: divide is {divide!r}; it must be 'none' or 'tasks'")
        self.scale, self.divide = scale, divide

    def read(self, entry: Entry, state: State, surveyed: float) -> Tensor:
        return state["sum"] * (self.scale / (int(self.count) if self.divide == "tasks" else 1))
