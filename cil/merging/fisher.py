"""Fisher merging: an average of the models, weighted by their diagonal Fisher information."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cil.errors import ConfigError, DataError
from cil.merging.base import Rule, TaskNorms, TaskStatistics, Updates
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.numerics import norm
from cil.merging.store import State, StateSpec


class Fisher(Rule):
    """Fisher-weighted averaging (arXiv 2111.09832), per weight j: θ_j = Σ_t w_t (F_tj + ε) θ_tj / Σ_t w_t (F_tj + ε).

    Numerator (of updates, around θ_0) and denominator are sums, so the rule is exact and order-free. With ``normalize``
    w_t = 1/(‖F_t‖₂ + ε), with norms over the whole model: a task with large gradients does not outvote the others. ε
    determines the result for weights without Fisher information: their mean, weighted by w.

    ``add`` needs ``stats.fisher``: the diagonal Fisher information of every merged tensor, of its shape. A tensor that
    the task did not change (τ = 0) may have none; its information then counts as 0.

    Args:
        epsilon: Constant ε > 0, in units of F.
        normalize: Whether to divide by the norm of F.

    State:
        numerator: Σ w (F + ε) τ. denominator: Σ w (F + ε).

    Raises:
        ConfigError: ``epsilon`` is not positive.
    """

    summary = "mean of the models, weighted by Fisher information"
    paper = "arXiv 2111.09832"
    state_size = "2 P"
    needs = "fisher"

    def __init__(self, epsilon: float = 1e-6, normalize: bool = True, *, finalisers: Sequence[Finaliser] = ()) -> None:
        super().__init__(finalisers)
        if not 0 < epsilon < math.inf:
            raise ConfigError(f"Fisher: epsilon is {epsilon}; it must be positive and finite")
        self.epsilon, self.normalize = epsilon, normalize

    def state_spec(self, entry: Entry) -> StateSpec:
        return {"numerator": (entry.shape, self.layout.dtype), "denominator": (entry.shape, self.layout.dtype)}

    def inspect(self, entry: Entry, tau: Tensor, stats: TaskStatistics | None) -> None:
        information = _information(entry, stats)
        if information is None:
            if bool(tau.any()):
                raise DataError(f"Fisher: the statistics have no Fisher information of {entry.name}, which was trained")
            return
        if tuple(information.shape) != entry.shape:
            raise DataError(
                f"Fisher: the information of {entry.name} has shape {list(information.shape)}; "
                f"expected {list(entry.shape)}"
            )
        if not (math.isfinite(norm(information)) and bool((information >= 0).all())):
            raise DataError(f"Fisher: the information of {entry.name} has negative, NaN or infinite entries")

    def measure(self, updates: Updates, stats: TaskStatistics | None) -> dict[str, float]:
        if not self.normalize:
            return {"weight": 1.0}
        known = (_information(entry, stats) for entry in self.layout.entries)
        return {"weight": 1 / (math.hypot(*(norm(f) for f in known if f is not None)) + self.epsilon)}

    def update(self, entry: Entry, state: State, tau: Tensor, task: TaskNorms, stats: TaskStatistics | None) -> State:
        information = _information(entry, stats)
        plus = self.epsilon if information is None else information.to(tau) + self.epsilon
        weight = task["weight"] * plus
        return {"numerator": state["numerator"] + weight * tau, "denominator": state["denominator"] + weight}

    def read(self, entry: Entry, state: State, statistic: float) -> Tensor:
        return state["numerator"] / state["denominator"]


def _information(entry: Entry, stats: TaskStatistics | None) -> Tensor | None:
    return None if stats is None else stats.fisher.get(entry.name)


def fisher_pair(new: Tensor, old: Tensor, new_fisher: Tensor, old_fisher: Tensor, alpha: float) -> Tensor:
    """Merge two models, (α F θ + (1 − α) F' θ') / (α F + (1 − α) F') per weight (CoFiMA, arXiv 2312.08977).

    Weights without information in either model are α-averaged, where the quotient is 0/0.

    Args:
        new: Weights θ.
        old: Weights θ', of the same shape.
        new_fisher: Diagonal Fisher information F ≥ 0 of θ, of the same shape.
        old_fisher: The same of θ'.
        alpha: Weight α of the new model, in [0, 1].
    """
    mine, theirs = alpha * new_fisher.double(), (1 - alpha) * old_fisher.double()
    total = mine + theirs
    return torch.lerp(old, new, torch.where(total > 0, mine / total, alpha).to(new))
