"""The base of all merging rules: checked input, a state of constant size, one tensor at a time.

A rule is an accumulator. :meth:`Rule.add` takes one fine-tuned state dict and adds its task vector τ_t = θ_t − θ_0 to
the state; :meth:`Rule.merged` computes the merged model. Neither ever needs an earlier task again. Both process the
tensors one by one, so with a mapping that reads lazily and a store on disk the same code merges models that do not fit
into memory (:mod:`cil.merging.on_disk`).

A new rule defines what it keeps per tensor (:meth:`Rule.state_spec`), how a task changes it (:meth:`Rule.update`) and
how the merged update of the tensor follows from it (:meth:`Rule.read`). Numbers for the task as a whole that are needed
before its first tensor (its norm, a threshold) come from :meth:`Rule.measure`; the number for the whole state that is
needed before the first tensor is read comes from :meth:`Rule.global_statistic`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cil.errors import BackboneError, ConfigError, DataError, nearest
from cil.merging.finalisers import Finaliser
from cil.merging.layout import HEADS, Entry, Layout, check_names, layout, source
from cil.merging.numerics import norm
from cil.merging.store import Buffers, State, StateSpec, Store
from cil.utils.precision import exact

R = TypeVar("R", bound="Rule")
TaskNorms = dict[str, float]
"""Numbers for a task as a whole: its ``norm``, and those of :meth:`Rule.measure`."""
Updates = Callable[[], Iterator[tuple[Entry, Tensor]]]
"""Iterates over a task's vector, one tensor at a time; it can be called as often as needed."""
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Wraps an iterable in a progress bar: (iterable, description, length) → iterable."""


class TaskStatistics(Protocol):
    """Statistics of one task by name of the weight, e.g. a :class:`cil.merging.statistics.Statistics`."""

    @property
    def fisher(self) -> Mapping[str, Tensor]: ...

    @property
    def grams(self) -> Mapping[str, Tensor]: ...


class Rule(nn.Module, ABC):
    """Merges state dicts into one::

        rule = OPCM(alpha=0.5).start(pretrained)
        for finetuned in tasks:
            rule.add(finetuned)
        model.load_state_dict(rule.merged())

    All of a rule's state is in buffers, so ``state_dict()`` can be loaded into a new rule after ``start`` with the same
    pre-trained weights (which are not part of it). Its size does not depend on the number of tasks, unless the rule
    ``grows``, and inside a learner it is saved with the learner. A rule computes in float32, or in float64 if the
    pre-trained weights are float64; half precision is widened first. Norms are float64. All computation is on the
    device of the buffers.

    Args:
        finalisers: Finalisers that are applied, in this order, whenever the merged update is read, before those passed
            to :meth:`merged`.

    Buffers:
        count: int64, number of tasks so far. norm\\_sum: float64, Σ_t ‖τ_t‖₂, each over all merged tensors. The state
            of every merged tensor.
    """

    summary: ClassVar[str] = ""
    """What the rule does, in a phrase for lists."""
    paper: ClassVar[str] = ""
    """Where the rule comes from."""
    state_size: ClassVar[str] = "P"
    """What is kept, in words: P is one number per merged weight, in the computing dtype."""
    needs: ClassVar[Literal["fisher", "grams"] | None] = None
    """Statistics of every task that :meth:`add` requires."""
    order_free: ClassVar[bool] = True
    """Whether the order of the tasks does not matter (up to rounding)."""
    matrices: ClassVar[bool] = False
    """Whether the rule treats the matrices of linear layers specially; without any it reduces to a mean or a sum."""
    grows: ClassVar[bool] = False
    """Whether the state grows with every task, as that of a :class:`cil.merging.ExpertBank`; else its size is fixed."""
    needs_global_statistic: ClassVar[bool] = False
    """Whether :meth:`read` needs the sum of :meth:`global_statistic` over all entries."""

    count: Tensor
    norm_sum: Tensor

    def __init__(self, finalisers: Sequence[Finaliser] = ()) -> None:
        super().__init__()
        self.finalisers = tuple(finalisers)
        with exact():
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("norm_sum", torch.zeros((), dtype=torch.float64))
        self._layout: Layout | None = None
        self._pretrained: Mapping[str, Tensor] = {}
        self._store: Store = Buffers(self, self.state_spec)

    # --- what a rule defines ----------------------------------------------------------------------------------------

    @abstractmethod
    def state_spec(self, entry: Entry) -> StateSpec:
        """Return the state of a tensor as slot → shape and dtype. All slots start at zero."""

    @abstractmethod
    def update(self, entry: Entry, state: State, tau: Tensor, task: TaskNorms, stats: TaskStatistics | None) -> State:
        """Return the state of a tensor after one more task with update τ; ``count`` does not include that task yet."""

    @abstractmethod
    def read(self, entry: Entry, state: State, statistic: float) -> Tensor:
        """Return the merged update of a tensor, before finalisers; ``statistic`` is the summed global statistic."""

    def inspect(self, entry: Entry, tau: Tensor, stats: TaskStatistics | None) -> None:
        """Refuse statistics that do not fit. This is called for every entry before anything changes.

        Raises:
            DataError: The statistics of the entry are missing or do not fit.
        """

    def prepare(self, entry: Entry, tau: Tensor) -> Tensor:
        """Return the update for :meth:`measure` and :meth:`update`; the task's norm is always that of τ itself."""
        return tau

    def measure(self, updates: Updates, stats: TaskStatistics | None) -> dict[str, float]:
        """Return the numbers for the task as a whole that :meth:`update` needs in addition to its norm."""
        return {}

    def global_statistic(self, entry: Entry, state: State) -> float:
        """Return a number for an entry; :meth:`read` receives the sum over all entries."""
        return 0.0

    def adopt(self, slots: StateSpec) -> None:
        """Prepare for a saved state with these slots, by their names in it; a rule that ``grows`` must know them."""

    # --- what callers use -------------------------------------------------------------------------------------------

    def start(
        self: R,
        pretrained: Mapping[str, Tensor],
        *,
        exclude: Sequence[str] = HEADS,
        names: Iterable[str] | None = None,
        linear: Iterable[str] | None = None,
        store: Store | None = None,
    ) -> R:
        """Start at the pre-trained weights θ_0, and forget all tasks that were added before.

        Args:
            pretrained: State dict, kept by reference; it is never changed, and the caller must not change it either.
            exclude, names, linear: Choice of the merged tensors, see :func:`cil.merging.layout.layout`.
            store: Store of the state; by default it is in this module's buffers.

        Raises:
            ConfigError, BackboneError: See :func:`cil.merging.layout.layout`, or a finaliser does not fit.
        """
        plan = layout(pretrained, exclude=exclude, names=names, linear=linear)
        for finaliser in self.finalisers:  # one that does not fit must fail before the work, not after it
            finaliser.factors(dict.fromkeys((entry.name for entry in plan.entries), 1.0), 1.0, 1)
        self._layout, self._pretrained = plan, pretrained
        self.count.zero_()
        self.norm_sum.zero_()
        own = Buffers(self, self.state_spec)
        with exact():
            own.allocate(self.layout.entries if store is None else (), self.count.device)
        self._store = own if store is None else store
        return self

    @property
    def layout(self) -> Layout:
        """The merged tensors.

        Raises:
            ConfigError: The rule has not been started yet.
        """
        if self._layout is None:
            raise ConfigError(f"{type(self).__name__}: call start(pretrained) first")
        return self._layout

    @property
    def mean_norm(self) -> float:
        """n̄, the mean of ‖τ_t‖₂ over the tasks so far; 0 before the first."""
        return float(self.norm_sum) / max(1, int(self.count))

    def add(
        self: R, finetuned: Mapping[str, Tensor], stats: TaskStatistics | None = None, track: Track | None = None
    ) -> R:
        """Add a model that was fine-tuned from the pre-trained weights.

        Raises:
            BackboneError: Names, shapes or values do not fit; nothing is added then.
            DataError: Statistics that the rule needs are missing or do not fit; nothing is added then.
        """
        check_names(finetuned, self._pretrained, self.layout)
        where = source(finetuned, "the fine-tuned model")
        for alias, name in self.layout.tied.items():
            if alias in finetuned and name in finetuned and not torch.equal(finetuned[alias], finetuned[name]):
                raise BackboneError(
                    f"{where}: {alias} and {name} are one tensor in the pre-trained model but differ here; tie them, "
                    "or leave one out with exclude"
                )

        def tau(entry: Entry) -> Tensor:
            name = self.layout.held(entry, finetuned) or entry.name
            return self._wide(finetuned[name]) - self._wide(self._pretrained[entry.name])

        return self._add(tau, where, stats, track)

    def add_update(
        self: R, update: Mapping[str, Tensor], stats: TaskStatistics | None = None, track: Track | None = None
    ) -> R:
        """Add a task by its updates ΔW, such as ``PeftTuner.delta()``; tensors without an update did not change.

        Raises:
            BackboneError: A name is not merged, or a shape or value does not fit; nothing is added then.
            DataError: Statistics are missing or do not fit, as in :meth:`add`.
        """
        entries, where = {entry.name: entry for entry in self.layout.entries}, source(update, "update")
        for name, value in update.items():
            if name not in entries:
                raise BackboneError(f"{where}: {name} is not among the merged tensors{nearest(name, entries)}")
            if tuple(value.shape) != entries[name].shape or not value.is_floating_point():
                raise BackboneError(
                    f"{where}: {name} is {str(value.dtype).removeprefix('torch.')} {list(value.shape)}; expected "
                    f"floating point numbers {list(entries[name].shape)}"
                )

        def tau(entry: Entry) -> Tensor:
            if entry.name in update:
                return self._wide(update[entry.name])
            return torch.zeros(entry.shape, dtype=self.layout.dtype, device=self.count.device)

        return self._add(tau, where, stats, track)

    def merged(self, finalisers: Sequence[Finaliser] = ()) -> dict[str, Tensor]:
        """Return the merged model, θ_0 + Δ, under all names of the pre-trained state dict and in its dtypes.

        Tensors that are not merged, and those that no task has changed, are bit-identical to the pre-trained ones.

        Raises:
            ConfigError: The rule has not been started, or a finaliser does not fit.
        """
        return dict(self.items(finalisers))

    def items(self, finalisers: Sequence[Finaliser] = (), track: Track | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the items of :meth:`merged`, one tensor at a time."""
        shared: dict[str, Tensor] = {}  # tied tensors stay one tensor
        shared_names = set(self.layout.tied.values())
        deltas = self.deltas(finalisers, track)
        merged = {entry.name for entry in self.layout.entries}
        for name in self._pretrained:
            if name in merged:
                _, delta = next(deltas)
                with exact():
                    value = self._pretrained[name].detach()
                    if bool(delta.any()):  # an unchanged tensor stays bit-identical, including the signs of zeros
                        value = (self._wide(value) + delta).to(value)
                if name in shared_names:
                    shared[name] = value
                yield name, value
            else:
                yield name, shared[self.layout.tied[name]] if name in self.layout.tied else self._pretrained[name]

    def deltas(
        self, finalisers: Sequence[Finaliser] = (), track: Track | None = None
    ) -> Iterator[tuple[Entry, Tensor]]:
        """Yield every entry with its merged update Δ, after finalisers, one at a time.

        With finalisers every entry is read twice, or once if the state is in memory.
        """
        entries, total = self.layout.entries, len(self.layout.entries)
        track = track or _untracked
        statistic = 0.0
        with exact():
            if self.needs_global_statistic and int(self.count):
                statistic = math.fsum(
                    self.global_statistic(e, self._store.get(e)) for e in track(entries, "measuring", total)
                )
        finalisers = (*self.finalisers, *finalisers)
        factors: dict[str, float] = {}
        cached: dict[str, Tensor] = {}
        if finalisers and int(self.count):
            norms = {}
            for entry in track(entries, "measuring", total):
                delta = self._read(entry, statistic)
                norms[entry.name] = norm(delta)
                if isinstance(self._store, Buffers):
                    cached[entry.name] = delta
            factors = dict.fromkeys(norms, 1.0)
            for finaliser in finalisers:
                scaled_norms = {name: factors[name] * value for name, value in norms.items()}
                further = finaliser.factors(scaled_norms, self.mean_norm, int(self.count))
                factors = {name: factors[name] * further[name] for name in norms}
        for entry in track(entries, "writing", total):
            delta = cached.pop(entry.name) if entry.name in cached else self._read(entry, statistic)
            if entry.name in factors:
                with exact():
                    delta = delta * factors[entry.name]
            yield entry, delta

    def _read(self, entry: Entry, statistic: float) -> Tensor:
        with exact():
            if not int(self.count):
                return torch.zeros(entry.shape, dtype=self.layout.dtype, device=self.count.device)
            return self.read(entry, self._store.get(entry), statistic).to(self.layout.dtype)

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.count.device, self.layout.dtype)

    def _add(
        self: R, tau: Callable[[Entry], Tensor], where: str, stats: TaskStatistics | None, track: Track | None
    ) -> R:
        entries, total = self.layout.entries, len(self.layout.entries)
        track = track or _untracked
        if self.needs and (stats is None or not getattr(stats, self.needs)):
            raise DataError(
                f"{type(self).__name__} needs {self.needs} of every task: cil.merging.statistics computes them from "
                "the fine-tuned model and the task's images"
            )

        def updates() -> Iterator[tuple[Entry, Tensor]]:
            for entry in track(entries, "measuring", total):
                with exact():
                    update = tau(entry)
                yield entry, update

        with exact():
            norms = []
            for entry, update in updates():  # everything is checked before anything is changed
                norms.append(norm(update))
                if not math.isfinite(norms[-1]):
                    self._name_non_finite(entry, where)
                self.inspect(entry, update, stats)
            prepared: Updates = lambda: ((entry, self.prepare(entry, delta)) for entry, delta in updates())  # noqa: E731
            task = {"norm": math.hypot(*norms), **self.measure(prepared, stats)}
            for entry in track(entries, "merging", total):
                update = self.prepare(entry, tau(entry))
                self._store.put(entry, self.update(entry, self._store.get(entry), update, task, stats))
            self.count += 1
            self.norm_sum += task["norm"]
            self._store.commit()
        return self

    def _name_non_finite(self, entry: Entry, where: str) -> None:
        culprit = where
        if not bool(torch.isfinite(self._wide(self._pretrained[entry.name])).all()):
            culprit = source(self._pretrained, "the pre-trained model")
        raise BackboneError(
            f"{culprit}: {entry.name} holds NaN or infinite values; leave it out with exclude, or retrain"
        )


def _untracked(items: Iterable[Any], description: str, length: int) -> Iterable[Any]:
    return items
