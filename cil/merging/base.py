"""What every merging rule shares: checked input, a state of constant size, one tensor at a time.

A rule is an accumulator. :meth:`Rule.add` takes one fine-tuned state dict and folds its task vector τ_t = θ_t − θ_0
into the state; :meth:`Rule.merged` reads the merged model out. Neither ever needs an earlier task again. Both walk over
the tensors one by one and hold one of them at a time, so with a mapping that reads lazily and a store on disk the same
code merges models that do not fit into memory (:mod:`cil.merging.stream`).

A new rule says what it keeps of a tensor (:meth:`Rule.slots`), how a task changes it (:meth:`Rule.update`) and what the
merged update of that tensor is (:meth:`Rule.read`). What it needs to know of a task as a whole before the first tensor
(its norm, a threshold) comes from :meth:`Rule.measure`, and what it needs to know of its whole state before the first
tensor is read from :meth:`Rule.survey`.
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
from cil.merging.store import Buffers, Slots, State, Store
from cil.precision import exact

R = TypeVar("R", bound="Rule")
Task = dict[str, float]
"""What is known of a task as a whole; ``norm`` always, more by :meth:`Rule.measure`."""
Updates = Callable[[], Iterator[tuple[Entry, Tensor]]]
"""A pass over a task's vector, one tensor at a time; can be called as often as needed."""
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Wraps an iterable in a progress bar: (iterable, description, length) → iterable."""


class TaskStatistics(Protocol):
    """Statistics of one task, per weight name; :class:`cil.merging.statistics.Statistics` has them."""

    @property
    def fisher(self) -> Mapping[str, Tensor]: ...

    @property
    def grams(self) -> Mapping[str, Tensor]: ...


class Rule(nn.Module, ABC):
    """State dicts in, a merged state dict out::

        rule = OPCM(alpha=0.5).start(pretrained)
        for finetuned in tasks:
            rule.add(finetuned)
        model.load_state_dict(rule.merged())

    Everything a rule knows is a buffer: ``state_dict()`` goes on in a fresh rule after ``start`` with the same
    pre-trained weights (which are not part of it), its size does not depend on the number of tasks, and inside a
    learner it is saved with the learner. Computed in float32, in float64 if the pre-trained weights are; half
    precision is widened first. Norms are float64. On the device the buffers are on.

    Args:
        finalisers: Applied in this order at every read-out, before those given to :meth:`merged`.

    Buffers:
        count: int64, tasks so far. norm\\_sum: float64, Σ ‖τ_t‖₂ over all merged tensors. Slots of every merged tensor.
    """

    needs: ClassVar[Literal["fisher", "grams"] | None] = None
    """Statistics of every task that :meth:`add` must be given."""
    order_free: ClassVar[bool] = True
    """Whether the order of the tasks does not matter (up to rounding)."""
    matrices: ClassVar[bool] = False
    """Whether it does something of its own to the weights of linear maps only; without any it is a mean or a sum."""
    surveys: ClassVar[bool] = False
    """Whether :meth:`read` needs the sum of :meth:`survey` over all entries."""

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
        self._store: Store = Buffers(self, self.slots)

    # --- what a rule says of itself ---------------------------------------------------------------------------------

    @abstractmethod
    def slots(self, entry: Entry) -> Slots:
        """What is kept of a tensor: slot → shape and dtype. All start at zero."""

    @abstractmethod
    def update(self, entry: Entry, state: State, tau: Tensor, task: Task, stats: TaskStatistics | None) -> State:
        """The state of a tensor after one more task with update τ; ``count`` is still that of the tasks before."""

    @abstractmethod
    def read(self, entry: Entry, state: State, surveyed: float) -> Tensor:
        """The merged update of a tensor, before finalisers."""

    def inspect(self, entry: Entry, tau: Tensor, stats: TaskStatistics | None) -> None:
        """Refuse statistics that do not fit; called for every entry before anything changes."""

    def prepare(self, entry: Entry, tau: Tensor) -> Tensor:
        """The update that :meth:`measure` and :meth:`update` see; the task's norm is always that of τ itself."""
        return tau

    def measure(self, updates: Updates, stats: TaskStatistics | None) -> dict[str, float]:
        """What :meth:`update` has to know of the task as a whole beside its norm."""
        return {}

    def survey(self, entry: Entry, state: State) -> float:
        """A number of every entry, whose sum :meth:`read` receives."""
        return 0.0

    # --- what a caller uses -----------------------------------------------------------------------------------------

    def start(
        self: R,
        pretrained: Mapping[str, Tensor],
        *,
        exclude: Sequence[str] = HEADS,
        names: Iterable[str] | None = None,
        linear: Iterable[str] | None = None,
        store: Store | None = None,
    ) -> R:
        """Begin at the pre-trained weights θ_0; what was added before is forgotten.

        Args:
            pretrained: State dict, kept by reference and never changed; nobody else may change it either.
            exclude, names, linear: What is merged, see :func:`cil.merging.layout.layout`.
            store: Where the state lies; by default in this module's buffers.

        Raises:
            ConfigError, BackboneError: See :func:`cil.merging.layout.layout`; a finaliser that does not fit.
        """
        plan = layout(pretrained, exclude=exclude, names=names, linear=linear)
        for finaliser in self.finalisers:  # one that does not fit is better found before the work than after it
            finaliser.factors(dict.fromkeys((entry.name for entry in plan.entries), 1.0), 1.0, 1)
        self._layout, self._pretrained = plan, pretrained
        self.count.zero_()
        self.norm_sum.zero_()
        own = Buffers(self, self.slots)
        with exact():
            own.allocate(self.layout.entries if store is None else (), self.count.device)
        self._store = own if store is None else store
        return self

    @property
    def layout(self) -> Layout:
        """What is merged.

        Raises:
            ConfigError: Not started yet.
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
        """Fold in a model that was fine-tuned from the pre-trained weights.

        Raises:
            BackboneError: Names, shapes or values that do not fit; nothing is added then.
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
        """Fold in a task given by its updates ΔW, such as ``PeftTuner.delta()``; tensors without one did not change.

        Raises:
            BackboneError: A name that is not merged, a shape or value that does not fit; nothing is added then.
            DataError: As in :meth:`add`.
        """
        entries = {entry.name: entry for entry in self.layout.entries}
        for name, value in update.items():
            if name not in entries:
                raise BackboneError(f"update: {name} is not among the merged tensors{nearest(name, entries)}")
            if tuple(value.shape) != entries[name].shape or not value.is_floating_point():
                raise BackboneError(
                    f"update: {name} is {str(value.dtype).removeprefix('torch.')} {list(value.shape)}; expected "
                    f"floating point numbers {list(entries[name].shape)}"
                )

        def tau(entry: Entry) -> Tensor:
            if entry.name in update:
                return self._wide(update[entry.name])
            return torch.zeros(entry.shape, dtype=self.layout.dtype, device=self.count.device)

        return self._add(tau, "update", stats, track)

    def merged(self, finalisers: Sequence[Finaliser] = ()) -> dict[str, Tensor]:
        """The merged model, θ_0 + Δ, under all names of the pre-trained state dict and in its dtypes.

        What is not merged, and what no task has changed, is the pre-trained tensor itself, to the bit.

        Raises:
            ConfigError: Not started, or a finaliser that does not fit.
        """
        return dict(self.items(finalisers))

    def items(self, finalisers: Sequence[Finaliser] = (), track: Track | None = None) -> Iterator[tuple[str, Tensor]]:
        """:meth:`merged`, one tensor at a time."""
        kept: dict[str, Tensor] = {}  # tied tensors stay one tensor
        names = set(self.layout.tied.values())
        deltas = self.deltas(finalisers, track)
        merged = {entry.name for entry in self.layout.entries}
        for name in self._pretrained:
            if name in merged:
                _, delta = next(deltas)
                with exact():
                    value = self._pretrained[name].detach()
                    if bool(delta.any()):  # else to the bit, the sign of a zero included
                        value = (self._wide(value) + delta).to(value)
                if name in names:
                    kept[name] = value
                yield name, value
            else:
                yield name, kept[self.layout.tied[name]] if name in self.layout.tied else self._pretrained[name]

    def deltas(
        self, finalisers: Sequence[Finaliser] = (), track: Track | None = None
    ) -> Iterator[tuple[Entry, Tensor]]:
        """The merged update Δ of every entry, finalisers applied, one at a time.

        With finalisers every entry is read twice, or once if the state is in memory.
        """
        entries, total = self.layout.entries, len(self.layout.entries)
        track = track or _untracked
        surveyed = 0.0
        with exact():
            if self.surveys and int(self.count):
                surveyed = math.fsum(self.survey(e, self._store.get(e)) for e in track(entries, "measuring", total))
        chosen = (*self.finalisers, *finalisers)
        factors: dict[str, float] = {}
        kept: dict[str, Tensor] = {}
        if chosen and int(self.count):
            norms = {}
            for entry in track(entries, "measuring", total):
                delta = self._read(entry, surveyed)
                norms[entry.name] = norm(delta)
                if isinstance(self._store, Buffers):
                    kept[entry.name] = delta
            factors = dict.fromkeys(norms, 1.0)
            for finaliser in chosen:
                now = {name: factors[name] * value for name, value in norms.items()}
                further = finaliser.factors(now, self.mean_norm, int(self.count))
                factors = {name: factors[name] * further[name] for name in norms}
        for entry in track(entries, "writing", total):
            delta = kept.pop(entry.name) if entry.name in kept else self._read(entry, surveyed)
            if entry.name in factors:
                with exact():
                    delta = delta * factors[entry.name]
            yield entry, delta

    def _read(self, entry: Entry, surveyed: float) -> Tensor:
        with exact():
            if not int(self.count):
                return torch.zeros(entry.shape, dtype=self.layout.dtype, device=self.count.device)
            return self.read(entry, self._store.get(entry), surveyed).to(self.layout.dtype)

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

        def passed() -> Iterator[tuple[Entry, Tensor]]:
            for entry in track(entries, "measuring", total):
                with exact():
                    update = tau(entry)
                yield entry, update

        with exact():
            norms = []
            for entry, update in passed():  # everything is looked at before anything is changed
                norms.append(norm(update))
                if not math.isfinite(norms[-1]):
                    self._name_non_finite(entry, where)
                self.inspect(entry, update, stats)
            prepared: Updates = lambda: ((entry, self.prepare(entry, update)) for entry, update in passed())  # noqa: E731
            task = {"norm": math.hypot(*norms), **self.measure(prepared, stats)}
            for entry in track(entries, "merging", total):
                update = self.prepare(entry, tau(entry))
                self._store.put(entry, self.update(entry, self._store.get(entry), update, task, stats))
            self.count += 1
            self.norm_sum += task["norm"]
            self._store.commit()
        return self

    def _name_non_finite(self, entry: Entry, where: str) -> None:
        guilty = where
        if not bool(torch.isfinite(self._wide(self._pretrained[entry.name])).all()):
            guilty = source(self._pretrained, "the pre-trained model")
        raise BackboneError(
            f"{guilty}: {entry.name} holds NaN or infinite values; leave it out with exclude, or retrain"
        )


def _untracked(items: Iterable[Any], description: str, length: int) -> Iterable[Any]:
    return items
