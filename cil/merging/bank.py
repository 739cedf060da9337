"""A bank of all tasks' updates, from which every function of them can be read exactly; it grows with each task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from cil.errors import ConfigError
from cil.merging.base import Rule, TaskNorms, TaskStatistics, Track, Updates
from cil.merging.finalisers import Finaliser
from cil.merging.layout import HEADS, Entry
from cil.merging.numerics import norm, thin_svd
from cil.merging.store import Buffers, State, StateSpec, Store, slot_name
from cil.utils.precision import exact

R = TypeVar("R", bound=Rule)
B = TypeVar("B", bound="ExpertBank")
StoredDtype = Literal["bfloat16", "float32"]


class ExpertBank(Rule):
    """Keeps the update τ_t of every task, so that rules which need all of them at once are exact in sequence.

    An update Δ = U diag(σ) Vᵀ [m, n] of a linear weight is kept as U √σ [m, r] and √σ Vᵀ [r, n], with the directions
    σ_i > 8 ε ‖Δ‖_F, if that is smaller than Δ itself: r (m + n) < m n. Otherwise Δ is kept whole, as all other tensors
    are. A tensor that a task does not change takes no space. So the bank is exact up to rounding, and it grows with
    each task (:attr:`bytes`): for LoRA of rank r by r (m + n) numbers per linear weight, for full fine-tuning by P.

    Weights that were rounded to their dtype differ from θ_0 by Δ and by noise of full rank. For tasks that come as
    models (:meth:`add`, not :meth:`add_update`), directions with σ_i ≤ ε rms(θ_0) (√m + √n), ε of the stored dtype,
    are such noise, and a factorised update leaves them out.

    A subclass states how the updates of one tensor are merged (:meth:`merge`); the bank itself takes their mean.
    :meth:`merged_by` reads a bank by any other rule, :meth:`vector` returns one task's update, and a
    :class:`cil.merging.experts.ExpertRule` computes one model per task from all updates. A task needs one thin SVD per
    linear weight, or two if the state is in a file.

    Args:
        max_rank: Largest number of directions kept per factorised weight, the leading ones; None: all.
        dtype: Dtype of what is kept, ``bfloat16`` (relative error ≤ 2⁻⁸ per entry) or ``float32``; None: the computing
            dtype.

    State:
        left_0, right_0, left_1 …: Factors of task 0, 1 …. whole_0, whole_1 …: Updates that are kept whole.

    Raises:
        ConfigError: ``max_rank`` is not positive, or ``dtype`` is unknown.
    """

    summary = "mean of the models, from all updates"
    state_size = "every update, at its rank"
    grows = True

    def __init__(
        self,
        max_rank: int | None = None,
        dtype: StoredDtype | None = None,
        *,
        finalisers: Sequence[Finaliser] = (),
    ) -> None:
        super().__init__(finalisers)
        name = type(self).__name__
        if max_rank is not None and max_rank < 1:
            raise ConfigError(f"{name}: max_rank is {max_rank}; it must be positive, or None")
        if dtype not in (None, "bfloat16", "float32"):
            raise ConfigError(f"{name}: dtype is {dtype!r}; it must be 'bfloat16', 'float32' or None")
        self.max_rank, self.dtype = max_rank, dtype
        self._kept: dict[str, StateSpec] = {}  # by the part of slot names that stands for the entry
        self._ready: dict[str, State] = {}  # the current task's parts, until they are stored
        self._rounded = False  # whether the current task's updates are differences of rounded weights

    def merge(self, entry: Entry, updates: Sequence[Tensor]) -> Tensor:
        """Return the merged update of a tensor, given those of all tasks in order, each of the tensor's shape."""
        return sum(updates[1:], updates[0]) / len(updates)

    # --- what a rule defines ----------------------------------------------------------------------------------------

    def state_spec(self, entry: Entry) -> StateSpec:
        return self._kept.get(_key(entry), {})

    def adopt(self, slots: StateSpec) -> None:
        self._kept = {}
        for name, kept in slots.items():
            slot, _, key = name.partition(":")
            if key:
                self._kept.setdefault(key, {})[slot] = kept

    def measure(self, updates: Updates, stats: TaskStatistics | None) -> dict[str, float]:
        """Decide what is kept of the task: a file needs all shapes before its first tensor."""
        task, in_memory = int(self.count), isinstance(self._store, Buffers)
        self._ready = {}
        for entry, tau in updates():
            parts = self._parts(entry, tau)
            earlier = {slot: kept for slot, kept in self.state_spec(entry).items() if _task(slot) < task}
            new = {f"{part}_{task}": (tuple(value.shape), value.dtype) for part, value in parts.items()}
            self._kept[_key(entry)] = earlier | new
            if in_memory:
                self._ready[_key(entry)] = parts
        return {}

    def update(self, entry: Entry, state: State, tau: Tensor, task: TaskNorms, stats: TaskStatistics | None) -> State:
        parts = self._ready.pop(_key(entry)) if _key(entry) in self._ready else self._parts(entry, tau)
        return state | {f"{part}_{int(self.count)}": value for part, value in parts.items()}

    def read(self, entry: Entry, state: State, statistic: float) -> Tensor:
        return self.merge(entry, [self._vector(entry, state, task) for task in range(int(self.count))])

    # --- what callers use -------------------------------------------------------------------------------------------

    def start(
        self: B,
        pretrained: Mapping[str, Tensor],
        *,
        exclude: Sequence[str] = HEADS,
        names: Iterable[str] | None = None,
        linear: Iterable[str] | None = None,
        store: Store | None = None,
    ) -> B:
        self._kept = {}
        return super().start(pretrained, exclude=exclude, names=names, linear=linear, store=store)

    def add(
        self: B, finetuned: Mapping[str, Tensor], stats: TaskStatistics | None = None, track: Track | None = None
    ) -> B:
        self._rounded = True
        try:
            return super().add(finetuned, stats, track)
        finally:
            self._rounded = False

    @property
    def bytes(self) -> int:
        """Size of all updates that are kept, in bytes."""
        parts = (part for spec in self._kept.values() for part in spec.values())
        return sum(math.prod(shape) * torch.empty((), dtype=dtype).element_size() for shape, dtype in parts)

    @exact()
    def vectors(self, entry: Entry) -> list[Tensor]:
        """Return the updates of a tensor by all tasks, in the computing dtype."""
        state = self._store.get(entry)
        return [self._vector(entry, state, task) for task in range(int(self.count))]

    @exact()
    def vector(self, task: int) -> dict[str, Tensor]:
        """Return τ_t of a task, counted from 0, by name, in the computing dtype.

        Raises:
            ConfigError: There is no such task.
        """
        self.require(task)
        return {entry.name: self._vector(entry, self._store.get(entry), task) for entry in self.layout.entries}

    def products(self, task: int) -> dict[str, tuple[Tensor, ...]]:
        """Return what is kept of a task by name, as it is kept: two factors L [m, r] and R [r, n], or one tensor.

        Tensors that the task did not change are left out.

        Raises:
            ConfigError: There is no such task.
        """
        self.require(task)
        found = {}
        for entry in self.layout.entries:
            state = self._store.get(entry)
            kept = tuple(state[slot] for slot in (f"left_{task}", f"right_{task}", f"whole_{task}") if slot in state)
            if kept:
                found[entry.name] = kept
        return found

    @exact()
    def factors(self, entry: Entry, task: int) -> tuple[Tensor, Tensor]:
        """Return L [m, r] and R [r, n] with L R = Δ_t of a linear weight, in the computing dtype; r may be 0."""
        self.require(task)
        state = self._store.get(entry)
        if f"left_{task}" in state:
            return self._wide(state[f"left_{task}"]), self._wide(state[f"right_{task}"])
        u, sigma, v = thin_svd(self._vector(entry, state, task))
        known = int((sigma > 0).sum())
        return _split(u[:, :known], sigma[:known], v[:, :known])

    def require(self, task: int) -> None:
        """Refuse a task that is not in the bank.

        Raises:
            ConfigError: There is no such task.
        """
        if not 0 <= task < int(self.count):
            raise ConfigError(f"{type(self).__name__}: there is no task {task}; the bank has {int(self.count)}, from 0")

    def merged_by(self, rule: Rule, finalisers: Sequence[Finaliser] = ()) -> dict[str, Tensor]:
        """Return the model into which another rule merges the tasks of this bank, in their order.

        Raises:
            DataError: The rule needs statistics of the tasks, which a bank does not have.
        """
        return self.given_to(rule).merged(finalisers)

    def given_to(self, rule: R) -> R:
        """Start a rule at the same weights and add all tasks of this bank to it."""
        entries = self.layout.entries
        rule.to(self.count.device)
        rule.start(
            self._pretrained,
            exclude=(),
            names=[entry.name for entry in entries],
            linear=[entry.name for entry in entries if entry.linear],
        )
        for task in range(int(self.count)):
            rule.add_update(self.vector(task))
        return rule

    # --- parts ------------------------------------------------------------------------------------------------------

    def _parts(self, entry: Entry, tau: Tensor) -> State:
        """What is kept of an update: two factors, or the whole, or nothing if it is zero."""
        dtype = tau.dtype if self.dtype is None else getattr(torch, self.dtype)
        if not bool(tau.any()):
            return {}
        if entry.linear:
            (m, n), (u, sigma, v) = entry.shape, thin_svd(tau)
            noise = 8 * torch.finfo(tau.dtype).eps * norm(tau)
            if self._rounded:
                theta = self._pretrained[entry.name]
                noise = max(noise, torch.finfo(theta.dtype).eps * norm(theta) * (1 / math.sqrt(m) + 1 / math.sqrt(n)))
            r = min(int((sigma > noise).sum()), self.max_rank or len(sigma))
            if r * (m + n) < m * n:
                left, right = _split(u[:, :r], sigma[:r], v[:, :r])
                return {"left": left.to(dtype), "right": right.to(dtype)} if r else {}
        return {"whole": tau.to(dtype, copy=True).contiguous()}

    def _vector(self, entry: Entry, state: State, task: int) -> Tensor:
        if f"whole_{task}" in state:
            return self._wide(state[f"whole_{task}"])
        if f"left_{task}" in state:
            return self._wide(state[f"left_{task}"]) @ self._wide(state[f"right_{task}"])
        return torch.zeros(entry.shape, dtype=self.layout.dtype, device=self.count.device)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if f"{prefix}count" in state_dict:  # the slots are those of the saved tasks, whichever there are now
            for name in [name for name in self._buffers if ":" in name]:
                del self._buffers[name]
            for name, value in _slots(state_dict, prefix):
                self.register_buffer(name, torch.empty_like(value, device=self.count.device))
            self.adopt({name: (tuple(value.shape), value.dtype) for name, value in _slots(state_dict, prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args)


def _split(u: Tensor, sigma: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """U √σ [m, r] and √σ Vᵀ [r, n]."""
    root = sigma.sqrt()
    return (u * root).contiguous(), (v * root).T.contiguous()


def _key(entry: Entry) -> str:
    """The part of the names of an entry's slots that stands for the entry."""
    return slot_name(entry, "").removeprefix(":")


def _task(slot: str) -> int:
    return int(slot.rpartition("_")[2])


def _slots(state_dict: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    own = ((name.removeprefix(prefix), value) for name, value in state_dict.items() if name.startswith(prefix))
    return ((name, value) for name, value in own if ":" in name)
