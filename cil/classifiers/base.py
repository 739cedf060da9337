"""What every classifier shares: checked input, growing with the classes, a solution computed when it is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from cil.errors import ConfigError, DataError
from cil.precision import exact

Array = Tensor | np.ndarray
T = TypeVar("T")
C = TypeVar("C", bound="Classifier")


def match_saved_shapes(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str = "", *, rows_only: bool = True
) -> None:
    """Before loading, give parameters and buffers the saved shape: heads and statistics grow with the classes.

    With ``rows_only`` only the first dimension may differ; another difference is left for ``load_state_dict`` to
    refuse. Parameters are replaced by new ones, as in growing.
    """
    for name, part in module.named_modules(prefix=prefix.removesuffix(".")):
        for kind in (part._parameters, part._buffers):
            for key, old in kind.items():
                saved = state_dict.get(f"{name}.{key}" if name else key)
                if old is None or saved is None or old.shape == saved.shape:
                    continue
                if not rows_only or (old.ndim and saved.ndim and old.shape[1:] == saved.shape[1:]):
                    fresh = torch.zeros(saved.shape, dtype=old.dtype, device=old.device)
                    kind[key] = nn.Parameter(fresh, old.requires_grad) if isinstance(old, nn.Parameter) else fresh


class Classifier(nn.Module, ABC):
    """Features [B, F] → logits [B, C], learned from features and labels in any number of calls.

    Everything a classifier knows is a parameter or a buffer, so ``state_dict()`` restores it, also into a fresh
    classifier that has not grown. What is only computed from these (weights, factors) is solved when logits are asked
    for, kept until the statistics change, and never saved.

    Features may be tensors or numpy arrays. Logits are float64 for float64 features and float32 for all others.

    Args:
        feature_dim: Feature width F.

    Raises:
        ConfigError: ``feature_dim`` is not positive.
    """

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        if feature_dim < 1:
            raise ConfigError(f"{type(self).__name__}: feature_dim is {feature_dim}; it must be at least 1")
        self.feature_dim = feature_dim
        self._solved: dict[Any, Any] = {}

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Classes there is room for, C."""

    @abstractmethod
    def grow(self, classes: int) -> None:
        """Make room for labels 0…classes−1; what was learned stays."""

    @abstractmethod
    def partial_fit(self: C, features: Array, labels: Array) -> C:
        """Learn from features [N, F] (floating, finite) with labels [N] (integers ≥ 0); grows to the largest label.

        Raises:
            DataError: Shapes, types or values are wrong; nothing is learned then.
        """

    @abstractmethod
    def logits(self, features: Array) -> Tensor:
        """Scores [B, C] of features [B, F]; a class that has no samples yet scores −∞.

        Raises:
            DataError: Shape, type or values are wrong.
        """

    @property
    def device(self) -> torch.device:
        return next(iter(self.state_dict().values())).device

    def checked(self, features: Array) -> Tensor:
        """Features [N, F] as a finite float32 or float64 tensor on the classifier's device, or a DataError."""
        name = type(self).__name__
        x = features if isinstance(features, Tensor) else torch.from_numpy(_numeric(features, f"{name}: features"))
        if x.ndim != 2 or x.shape[1] != self.feature_dim:
            raise DataError(f"{name}: features have shape {list(x.shape)}; expected [N, {self.feature_dim}]")
        if not x.is_floating_point():
            raise DataError(f"{name}: features are {x.dtype}; expected floating point numbers")
        x = x.to(self.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
        # an exported program cannot branch on values
        if not torch.compiler.is_exporting() and not bool(torch.isfinite(x).all()):
            raise DataError(f"{name}: some features are NaN or infinite")
        return x

    def taken(self, features: Array, labels: Array) -> tuple[Tensor, Tensor]:
        """Training data checked, as (float64 [N, F], int64 [N]); grows, and forgets what was solved before."""
        name = type(self).__name__
        x = self.checked(features).double()
        y = labels if isinstance(labels, Tensor) else torch.from_numpy(_numeric(labels, f"{name}: labels"))
        if y.ndim != 1 or len(y) != len(x):
            raise DataError(f"{name}: labels have shape {list(y.shape)} for {len(x)} features; expected [{len(x)}]")
        if not len(y):
            raise DataError(f"{name}: there are no samples to learn from")
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise DataError(f"{name}: labels are {y.dtype}; expected integers")
        y = y.to(x.device, torch.int64)
        if int(y.min()) < 0:
            raise DataError(f"{name}: the smallest label is {int(y.min())}; labels count from 0")
        self.grow(int(y.max()) + 1)
        self._forget(y)
        return _ordinary(x), _ordinary(y)

    def solved(self, key: Hashable, solve: Callable[[], T]) -> T:
        """What ``solve`` gives for the current statistics, computed once."""
        if key not in self._solved:
            with exact():
                self._solved[key] = solve()
        found: T = self._solved[key]
        return found

    def _forget(self, labels: Tensor | None = None) -> None:
        """The statistics of ``labels`` (None: of all classes) have changed."""
        self._solved.clear()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._forget()  # .to(), .double(), …
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        self._forget()
        match_saved_shapes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class StatisticsClassifier(Classifier):
    """A classifier that is a function of sums over the samples, so it does not depend on how the data was cut.

    Sums are float64: partial fits (of tasks, of shards on several devices) add exactly to far below float32 resolution.

    Buffers:
        counts: int64 [C], samples of each class.
    """

    per_class: ClassVar[tuple[str, ...]] = ("counts",)
    """Buffers with one row a class."""
    counts: Tensor

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim)
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))
        self._room: dict[str, Tensor] = {}  # what a buffer that grew is the front of

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @exact()
    def grow(self, classes: int) -> None:
        new = classes - self.num_classes
        if new > 0:
            for name in self.per_class:
                setattr(self, name, self._longer(name, getattr(self, name), new))
            self._forget(self.counts.new_zeros(0))

    def _longer(self, name: str, rows: Tensor, new: int) -> Tensor:
        """The buffer of that name with ``new`` rows of zeros behind its own.

        One that is full moves to where there is half as much room again: copied for every task, it would make each
        stage slower than the one before. Large room that nobody has touched costs a CPU no memory; a GPU it would, and
        copies are quick there.
        """
        count = len(rows) + new
        if not len(rows) or rows.device.type != "cpu":
            return torch.cat([rows, rows.new_zeros(new, *rows.shape[1:])])
        room = self._room.get(name)
        if room is None or room.data_ptr() != rows.data_ptr() or len(room) < count:
            room = self._room[name] = _untouched(max(count, len(rows) * 3 // 2), rows)
            room[: len(rows)] = rows
        return room[:count]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._room.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._room.clear()
        super()._load_from_state_dict(*args)

    def only_seen(self, scores: Tensor) -> Tensor:
        """Scores [B, C] with −∞ for classes without samples."""
        return scores.masked_fill(self.counts == 0, float("-inf"))


def _untouched(count: int, like: Tensor) -> Tensor:
    """Zeros [count, …] as numpy makes them: pages the system gives when they are written to; torch writes them all."""
    row = like[:1].numel() * like.element_size()
    return torch.from_numpy(np.zeros(count * row, np.uint8)).view(like.dtype).view(count, *like.shape[1:])


def _ordinary(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x


def _numeric(values: Any, what: str) -> np.ndarray:
    array = np.array(values)
    if array.dtype.kind not in "fiu":
        raise DataError(f"{what} are of type {array.dtype}; expected numbers")
    return array
