"""The base of classifiers made of sums, which can be added, and from which classes can be removed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from cil.classifiers.classifier import Array, Classifier, match_saved_shapes, outside_inference
from cil.classifiers.memory import DOUBLE, require_memory
from cil.errors import ConfigError, DataError
from cil.utils.precision import exact

__all__ = ["Array", "Classifier", "StatisticsClassifier", "match_saved_shapes"]

S = TypeVar("S", bound="StatisticsClassifier")


class StatisticsClassifier(Classifier):
    """A classifier that depends on the samples only through sums, however they are split over calls.

    Sums are float64: partial sums (of tasks, or of shards on several devices) add up with an error far below float32
    resolution.

    Buffers:
        counts: int64 [C], number of samples of each class.
    """

    per_class: tuple[str, ...] = ("counts",)
    """Names of the buffers with one row per class."""
    balance: bool = False
    """Whether every class weighs 1 in the sums over all classes, however many samples it has."""
    over_classes: ClassVar[tuple[str, ...] | None] = None
    """Names of the buffers that are sums over the samples of all classes; None if the state is more than sums, so that
    two classifiers cannot be added."""
    derived: ClassVar[tuple[str, ...]] = ()
    """Names of the buffers that :meth:`add` computes again from the sums."""
    counts: Tensor

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim)
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))
        self._reserved: dict[str, Tensor] = {}  # by name: a larger tensor, of which the buffer is the first rows

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @exact()
    def grow(self, classes: int) -> None:
        new = classes - self.num_classes
        if new > 0:
            for name in self.per_class:
                setattr(self, name, self._extended(name, getattr(self, name), new))
            self._forget(self.counts.new_zeros(0))

    @exact()
    def add(self: S, others: Sequence[tuple[S, Sequence[int]]]) -> S:
        """Add the sums of other classifiers: the result is that of the samples of all, up to the order of additions.

        Args:
            others: Classifiers with the same arguments, each with the class here of each of its classes. This one grows
                to the largest.

        Raises:
            ConfigError: One is of another kind or width, is not made of sums, or differs in a tensor that is no sum,
                such as a random projection. With ``balance``, two have samples of one class.
        """
        for other, rows in others:
            if (name := self.unlike(other)) is not None:
                raise ConfigError(f"{type(self).__name__}: cannot be added to one with another {name}")
            self.grow(max(rows, default=-1) + 1)
            place = torch.as_tensor(rows, dtype=torch.int64, device=self.device)
            twice = (self.counts[place] > 0) & (other.counts.to(self.device) > 0)
            if self.balance and bool(twice.any()):
                raise ConfigError(
                    f"{type(self).__name__}: class {int(place[twice][0])} has samples in several classifiers; with "
                    "balance all samples of a class must be in one"
                )
            self._add_classes(other, place)
            for name in self.over_classes or ():
                getattr(self, name).add_(getattr(other, name).to(self.device))
        self._forget()
        return self

    def _add_classes(self: S, other: S, place: Tensor) -> None:
        """Add what another classifier keeps of each class to that of class ``place``, int64 [its classes], here."""
        for name in self.per_class:
            getattr(self, name).index_add_(0, place, getattr(other, name).to(self.device))

    @exact()
    def clear(self: S) -> S:
        """Forget all samples and classes; what is no sum, such as a random projection, stays."""
        for name in self.per_class:
            setattr(self, name, getattr(self, name)[:0].clone())
        for name in self.over_classes or ():
            getattr(self, name).zero_()
        self._forget()
        return self

    def unlike(self, other: Classifier) -> str | None:
        """Return what forbids to add another classifier's sums to these, None if nothing does."""
        if type(other) is not type(self) or self.over_classes is None:
            return "kind of classifier"
        if other.feature_dim != self.feature_dim:
            return "width of features"
        fixed = self._buffers.keys() - {*self.per_class, *self.over_classes, *self.derived}
        for name in sorted(fixed):
            mine, theirs = self._buffers[name], other._buffers[name]
            if (mine is None) != (theirs is None):
                return name
            if mine is not None and theirs is not None and not torch.equal(mine, theirs.to(mine.device)):
                return name
        return None

    def _extended(self, name: str, rows: Tensor, new: int) -> Tensor:
        """The buffer ``name``, extended by ``new`` rows of zeros.

        On a CPU a full buffer is reallocated at 1.5 times its size: copying it for every task would make each stage
        slower than the last one, and reserved memory that is not written to costs nothing. On a GPU it would be
        occupied, and copies are fast, so the buffer is copied.
        """
        count = len(rows) + new
        if not len(rows) or rows.device.type != "cpu":
            return torch.cat([rows, rows.new_zeros(new, *rows.shape[1:])])
        reserved = self._reserved.get(name)
        if reserved is None or reserved.data_ptr() != rows.data_ptr() or len(reserved) < count:
            reserved = self._reserved[name] = lazy_zeros(max(count, len(rows) * 3 // 2), rows)
            reserved[: len(rows)] = rows
        return reserved[:count]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._reserved.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._reserved.clear()
        super()._load_from_state_dict(*args)

    @property
    def width(self) -> int:
        """Width of the statistics: that of the features, or of their random projection."""
        return self.feature_dim

    def kept_bytes(self, classes: int, width: int) -> float:
        """Estimate the bytes that the statistics of ``classes`` classes keep at a width; rows alone by default."""
        return DOUBLE * classes * width

    def peak_bytes(self, classes: int, width: int) -> float:
        """Estimate the largest memory in bytes while the statistics grow and are solved; at least what they keep."""
        return 3 * self.kept_bytes(classes, width)

    @property
    def narrower(self) -> str:
        """What a user changes to make the statistics smaller; ``{width}`` stands for the largest width that fits."""
        return (
            "use features of width {width} or less: fewer `layers.blocks` or `layers.tokens`, or a smaller backbone; "
            "or `ranpac` or `loranpac`, whose `projection` bounds the width"
        )

    def require_memory(self, classes: int = 1, device: torch.device | None = None) -> None:
        """Refuse a classifier that cannot fit; a constructor calls it before it allocates a matrix.

        Args:
            classes: Number of classes of the whole stream, ≥ 1.
            device: Device that will hold the statistics; None: that of the classifier.

        Raises:
            ConfigError: The estimate for the widths and ``classes`` is above the memory of the device.
        """
        name = type(self).__name__
        require_memory(name, partial(self.peak_bytes, classes), self.width, self.narrower, device or self.device)

    removed_with: ClassVar[Literal["nothing", "samples"] | None] = None
    """What :meth:`remove` needs beside the label: nothing, or the samples of the class; None: it cannot be exact."""

    @exact()
    def remove(self: S, label: int, features: Array | None = None) -> S:
        """Remove all samples of a class, as if they had never been learned; the class then scores −∞ again.

        Args:
            label: The class.
            features: All samples [N, F] that were learned of it, where :attr:`removed_with` asks for them. What is
                subtracted leaves an error of rounding.

        Raises:
            ConfigError: The classifier has no such class, or its statistics do not allow to remove one.
            DataError: The samples are missing, or their number is not that of the class.
        """
        name = type(self).__name__
        if not 0 <= label < self.num_classes:
            raise ConfigError(f"{name}: there is no class {label}; classes are 0 to {self.num_classes - 1}")
        if self.removed_with is None:
            raise ConfigError(f"{name}: its statistics do not tell the samples of one class from those of the others")
        count = int(self.counts[label])
        if self.removed_with == "samples" and count:
            if features is None:
                raise DataError(f"{name}: class {label} can only be removed with its {count} samples")
            x = self.checked(features).double()
            if len(x) != count:
                raise DataError(f"{name}: class {label} has {count} samples; got {len(x)}")
            self._subtract(outside_inference(x) / count**0.5 if self.balance else outside_inference(x))
        for buffer in self.per_class:
            getattr(self, buffer)[label] = 0
        self._forget()
        self._removed()
        return self

    def _subtract(self, features: Tensor) -> None:
        """Take samples, float64 [N, F], out of the sums over all classes."""

    def _removed(self) -> None:
        """Choose again what depends on all sums."""

    @property
    def totals(self) -> Tensor:
        """Total weight of each class in the sums over all classes, int64 [C]: its count, or 1 if it has samples."""
        return (self.counts > 0).to(self.counts) if self.balance else self.counts

    def roots(self, labels: Tensor) -> Tensor | None:
        """Square roots of the weights of new samples: √(1/n_c), float64 [N, 1]; None if all weights are 1.

        A row of features and its row of one-hot labels, both times the root, enter sums of squares with the weight.

        Raises:
            DataError: A class has samples already. Their weight could not be reduced: the sums do not tell them apart.
        """
        if not self.balance:
            return None
        again = self.counts[labels] > 0
        if bool(again.any()):
            raise DataError(
                f"{type(self).__name__}: class {int(labels[again][0])} has samples already; with balance all samples "
                "of a class must come in one call"
            )
        return torch.bincount(labels)[labels].double().rsqrt()[:, None]

    def only_seen(self, scores: Tensor) -> Tensor:
        """Return scores [B, C] with −∞ for classes without samples."""
        return scores.masked_fill(self.counts == 0, float("-inf"))


def lazy_zeros(count: int, like: Tensor) -> Tensor:
    """Zeros [count, …] with the rows of ``like`` [≥ 1, …].

    On a CPU they are numpy's, whose memory pages are allocated when first written to; torch writes to them all.
    """
    if like.device.type != "cpu":
        return like.new_zeros(count, *like.shape[1:])
    row = like[:1].numel() * like.element_size()
    return torch.from_numpy(np.zeros(count * row, np.uint8)).view(like.dtype).view(count, *like.shape[1:])
