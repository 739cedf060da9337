"""Linear combinations of task vectors: running average, WiSE-FT, moving average, task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from cil.errors import ConfigError
from cil.merging.base import Rule, TaskNorms, TaskStatistics
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.numerics import require_finite
from cil.merging.store import State, StateSpec


class SumRule(Rule):
    """A rule whose state is one tensor per entry, of the entry's shape.

    State:
        sum: Accumulated update in the computing dtype. It is a sum, because the rounding of running means adds up.
    """

    def state_spec(self, entry: Entry) -> StateSpec:
        return {"sum": (entry.shape, self.layout.dtype)}

    def update(self, entry: Entry, state: State, tau: Tensor, task: TaskNorms, stats: TaskStatistics | None) -> State:
        return {"sum": state["sum"] + tau}


class Average(SumRule):
    """Running mean of the models: θ = θ_0 + Σ τ_t / T (model soups, arXiv 2203.05482, one model after the other).

    The rule is exact and order-free. For orthogonal updates of equal norm the norm of the result falls as 1/√T.
    """

    summary = "mean of the models"
    paper = "arXiv 2203.05482"

    def read(self, entry: Entry, state: State, statistic: float) -> Tensor:
        return state["sum"] / int(self.count)


class WiseFT(SumRule):
    """Interpolation of every new model with the merged one: A_t = (1 − α) A_{t−1} + α τ_t (WiSE-FT, arXiv 2109.01903).

    WiSE-FT itself interpolates one fine-tuned model with its initial weights, where α in [0, 1] is chosen on validation
    data and is otherwise 0.5; this is the first task here. For more tasks the formula can be read in two ways. For
    models fine-tuned from θ_0 it is a moving average, in which a task merged k tasks ago has weight α(1 − α)^k. For
    models fine-tuned from the last merged one, each is interpolated with its initial weights. The models that are
    passed to ``add`` decide between the two.

    Args:
        alpha: Weight α of the new model, in [0, 1].

    Raises:
        ConfigError: ``alpha`` is not in [0, 1].
    """

    summary = "interpolation of the merged model with each new one"
    paper = "arXiv 2109.01903"
    order_free = False

    def __init__(self, alpha: float = 0.5, *, finalisers: Sequence[Finaliser] = ()) -> None:
        super().__init__(finalisers)
        if not 0 <= alpha <= 1:
            raise ConfigError(f"{type(self).__name__}: alpha is {alpha}; it must be in [0, 1]")
        self.alpha = alpha

    def update(self, entry: Entry, state: State, tau: Tensor, task: TaskNorms, stats: TaskStatistics | None) -> State:
        return {"sum": (1 - self.alpha) * state["sum"] + self.alpha * tau}

    def read(self, entry: Entry, state: State, statistic: float) -> Tensor:
        return state["sum"]


class EMA(WiseFT):
    """Exponential moving average of the models: A_1 = τ_1, then A_t = (1 − α) A_{t−1} + α τ_t.

    It differs from :class:`WiseFT` at the first task, whose model is taken as it is and not interpolated with θ_0. With
    α = 1 the result is the newest model, with α = 0 the first. LAE (arXiv 2303.10070) averages after every optimiser
    step, this rule after every task.

    Args:
        alpha: Weight α of the new model, in [0, 1].

    Raises:
        ConfigError: ``alpha`` is not in [0, 1].
    """

    summary = "exponential moving average of the models"
    paper = ""

    def update(self, entry: Entry, state: State, tau: Tensor, task: TaskNorms, stats: TaskStatistics | None) -> State:
        return super().update(entry, state, tau, task, stats) if int(self.count) else {"sum": tau}


class TaskArithmetic(SumRule):
    """θ = θ_0 + s Σ τ_t (arXiv 2212.04089), or s/T in place of s. The rule is exact and order-free.

    ``peft.utils.merge_utils.task_arithmetic`` computes the same for equal weights s from the stacked tensors of all
    tasks; this rule adds one task after the other.

    Args:
        scale: Factor s, finite. OPCM's authors use 0.3 for 8 tasks and 0.1 for 14 and 20 in their experiments.
        divide: ``none``, or ``tasks`` to divide by the number of tasks T, for streams of unknown length.

    Raises:
        ConfigError: An argument is out of range.
    """

    summary = "scaled sum of the updates"
    paper = "arXiv 2212.04089"

    def __init__(
        self, scale: float = 0.3, divide: Literal["none", "tasks"] = "none", *, finalisers: Sequence[Finaliser] = ()
    ) -> None:
        super().__init__(finalisers)
        require_finite("TaskArithmetic", scale)
        if divide not in ("none", "tasks"):
            raise ConfigError(f"TaskArithmetic: divide is {divide!r}; it must be 'none' or 'tasks'")
        self.scale, self.divide = scale, divide

    def read(self, entry: Entry, state: State, statistic: float) -> Tensor:
        return state["sum"] * (self.scale / (int(self.count) if self.divide == "tasks" else 1))
