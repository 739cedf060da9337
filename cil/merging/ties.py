"""TIES-Merging (trim, elect a sign, merge what agrees): exact in constant memory, and in published continual form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cil.errors import ConfigError
from cil.merging.base import Rule, TaskNorms, TaskStatistics, Updates
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.numerics import kth_largest_magnitude, require_finite
from cil.merging.store import State, StateSpec

Combination = Literal["sum", "mean", "max"]
Trim = Literal["model", "tensor"]


class _Ties(Rule):
    def __init__(self, density: float, merge: Combination, scale: float, finalisers: Sequence[Finaliser]) -> None:
        super().__init__(finalisers)
        name = type(self).__name__
        if not 0 < density <= 1:
            raise ConfigError(f"{name}: density is {density}; it must be in (0, 1]")
        if merge not in ("sum", "mean", "max"):
            raise ConfigError(f"{name}: merge is {merge!r}; it must be 'sum', 'mean' or 'max'")
        require_finite(name, scale)
        self.density, self.merge, self.scale = density, merge, scale

    def threshold(self, updates: Updates) -> float:
        """Return the smallest magnitude that trimming keeps, over the flattened model."""
        if self.density == 1:
            return 0.0
        size = sum(math.prod(entry.shape) for entry in self.layout.entries)
        keep = max(1, int(self.density * size))
        return kth_largest_magnitude(lambda: (tau for _, tau in updates()), keep, self.layout.dtype)


class TIES(_Ties):
    """TIES-Merging (arXiv 2306.01708), exact and order-free, with a state of two or four tensors per entry, not T.

    1. Trim: keep the ``density`` share of largest magnitudes of every τ_t.
    2. Elect: γ = sign(Σ_t τ_t) per entry; where the sum is 0, the sign of the sum of all elected signs.
    3. Merge: the sum, mean or largest magnitude of the entries whose sign is γ (a mean over those that are not 0).
    4. θ = θ_0 + s · result.

    Each task is trimmed separately, so the sums of positive and of negative trimmed entries (with their numbers or
    extremes) are sufficient for steps 2 and 3. This is our observation; the tests check it against the batch form.

    Args:
        density: Share of the entries that is kept, in (0, 1]: exactly int(density · P), at least one, and all entries
            whose magnitude equals the threshold (the authors' code keeps one entry more).
        merge: How agreeing entries are combined: ``sum``, ``mean`` or ``max``.
        scale: Factor s, finite.
        trim: ``model``: the share is of the flattened model, as in the authors' code; ``tensor``: of every tensor by
            itself, by ``peft.utils.merge_utils.prune``. PEFT's ``ties`` is ``trim="tensor", merge="mean", scale=1``.

    State:
        positive, negative: Sums of trimmed entries of either sign.
        positives, negatives: Numbers of such entries, int32 (``mean``). largest, smallest: Their extremes (``max``).

    Raises:
        ConfigError: An argument is out of range.
    """

    summary = "small changes dropped, a sign elected for every weight, the rest merged"
    paper = "arXiv 2306.01708"
    state_size = "2 P to 4 P"
    needs_global_statistic = True

    def __init__(
        self,
        density: float = 0.2,
        merge: Combination = "sum",
        scale: float = 0.3,
        trim: Trim = "model",
        *,
        finalisers: Sequence[Finaliser] = (),
    ) -> None:
        super().__init__(density, merge, scale, finalisers)
        if trim not in ("model", "tensor"):
            raise ConfigError(f"TIES: trim is {trim!r}; it must be 'model' or 'tensor'")
        self.trim = trim

    def state_spec(self, entry: Entry) -> StateSpec:
        slots = {"positive": (entry.shape, self.layout.dtype), "negative": (entry.shape, self.layout.dtype)}
        if self.merge == "mean":
            slots |= {"positives": (entry.shape, torch.int32), "negatives": (entry.shape, torch.int32)}
        if self.merge == "max":
            slots |= {"largest": (entry.shape, self.layout.dtype), "smallest": (entry.shape, self.layout.dtype)}
        return slots

    def measure(self, updates: Updates, stats: TaskStatistics | None) -> dict[str, float]:
        return {"threshold": self.threshold(updates)} if self.trim == "model" else {}

    def update(self, entry: Entry, state: State, tau: Tensor, task: TaskNorms, stats: TaskStatistics | None) -> State:
        if self.trim == "tensor":
            if self.density < 1:
                from peft.utils.merge_utils import prune  # takes seconds to import

                tau = prune(tau, self.density, method="magnitude")
        else:
            tau = trimmed(tau, task["threshold"])
        new = {"positive": state["positive"] + tau.clamp(min=0), "negative": state["negative"] + tau.clamp(max=0)}
        if self.merge == "mean":
            new |= {"positives": state["positives"] + (tau > 0), "negatives": state["negatives"] + (tau < 0)}
        if self.merge == "max":
            new |= {"largest": state["largest"].maximum(tau), "smallest": state["smallest"].minimum(tau)}
        return new

    def global_statistic(self, entry: Entry, state: State) -> float:
        return float((state["positive"] + state["negative"]).sign().sum(dtype=torch.float64))

    def read(self, entry: Entry, state: State, statistic: float) -> Tensor:
        total = state["positive"] + state["negative"]
        elected = (total > 0) | ((total == 0) & (statistic > 0))
        if self.merge == "max":
            return self.scale * torch.where(elected, state["largest"], state["smallest"])
        side = torch.where(elected, state["positive"], state["negative"])
        if self.merge == "mean":
            side = side / torch.where(elected, state["positives"], state["negatives"]).clamp(min=1)
        return self.scale * side


class ContinualTIES(_Ties):
    """TIES as published for continual merging (the C-TIES of OPCM's and MINGLE's tables), read from FusionBench's code.

    A_1 = s τ_1, untrimmed; A_t = A_{t−1} + s · TIES({A_{t−1}, τ_t}). The merged update is counted again at every step,
    so it grows, and published results are erratic. This rule is a faithful baseline; :class:`TIES` is the method.

    Args:
        density, merge: Arguments of :class:`TIES`, over the flattened model.
        scale: Factor s, finite; 0.5 in the reference's configuration, 0.3 and 0.1 in its experiments on 8 and on 14 or
            more tasks.

    State:
        sum: A_t.

    Raises:
        ConfigError: An argument is out of range.
    """

    summary = "TIES of the merged and the new update, task after task"
    order_free = False

    def __init__(
        self,
        density: float = 0.2,
        merge: Combination = "sum",
        scale: float = 0.5,
        *,
        finalisers: Sequence[Finaliser] = (),
    ) -> None:
        super().__init__(density, merge, scale, finalisers)

    def state_spec(self, entry: Entry) -> StateSpec:
        return {"sum": (entry.shape, self.layout.dtype)}

    def measure(self, updates: Updates, stats: TaskStatistics | None) -> dict[str, float]:
        if not int(self.count):
            return {}
        old = self.threshold(lambda: ((entry, self._store.get(entry)["sum"]) for entry in self.layout.entries))
        task = {"old": old, "new": self.threshold(updates)}
        pairs = ((trimmed(self._store.get(e)["sum"], task["old"]), trimmed(tau, task["new"])) for e, tau in updates())
        task["signs"] = math.fsum(float((a + b).sign().sum(dtype=torch.float64)) for a, b in pairs)
        return task

    def update(self, entry: Entry, state: State, tau: Tensor, task: TaskNorms, stats: TaskStatistics | None) -> State:
        if not int(self.count):
            return {"sum": self.scale * tau}
        pair = torch.stack([trimmed(state["sum"], task["old"]), trimmed(tau, task["new"])])
        total = pair.sum(0)
        elected = (total > 0) | ((total == 0) & (task["signs"] > 0))
        agreeing = torch.where(elected, pair.clamp(min=0), pair.clamp(max=0))
        if self.merge == "max":
            merged = torch.where(elected, agreeing.amax(0), agreeing.amin(0))
        else:
            merged = agreeing.sum(0) / ((agreeing != 0).sum(0).clamp(min=1) if self.merge == "mean" else 1)
        return {"sum": state["sum"] + self.scale * merged}

    def read(self, entry: Entry, state: State, statistic: float) -> Tensor:
        return state["sum"]


def trimmed(tensor: Tensor, threshold: float) -> Tensor:
    """Set entries whose magnitude is below the threshold to zero."""
    return torch.where(tensor.abs() >= threshold, tensor, 0)
