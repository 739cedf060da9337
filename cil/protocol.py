"""The rules by which classes or domains become tasks: class order, task sizes, and who gets which image.

Pure functions and values over numpy; nothing here knows images, torch or a global random state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cil.errors import StreamError, nearest

Order = int | str | Sequence[int] | Sequence[str]


def class_order(names: Sequence[str], order: Order) -> list[int]:
    """The classes in the order the stream shows them, as positions in ``names``.

    Args:
        names: Class names in the dataset's own order.
        order: ``"natural"``; an integer seed k for the field's ``numpy.random.RandomState(k).permutation`` (1993 is
            iCaRL's); or an explicit list of all class names or of all positions.

    Raises:
        StreamError: An explicit list misses, repeats or invents a class.

    >>> class_order(["ant", "bee", "cat", "dog"], 1993)
    [0, 2, 3, 1]
    >>> class_order(["ant", "bee", "cat"], ["cat", "ant", "bee"])
    [2, 0, 1]
    """
    count = len(names)
    if order == "natural":
        return list(range(count))
    if isinstance(order, str):
        raise StreamError(
            f"orders: unknown class order {order!r}; allowed: natural, an integer seed, a list of classes"
        )
    if isinstance(order, (int, np.integer)):
        return [int(c) for c in np.random.RandomState(int(order)).permutation(count)]
    position = {name: i for i, name in enumerate(names)}
    chosen = []
    for item in order:
        if isinstance(item, str) and item not in position:
            raise StreamError(f"orders: class {item!r} is not in the dataset{nearest(item, names)}")
        chosen.append(position[item] if isinstance(item, str) else int(item))
    if sorted(chosen) != list(range(count)):
        missing = [names[i] for i in range(count) if i not in set(chosen)][:5]
        raise StreamError(
            f"orders: an explicit class order must hold each of the {count} classes once; got {len(chosen)} entries, "
            f"{len(set(chosen))} different, missing e.g. {missing}"
        )
    return chosen


def task_sizes(
    count: int, *, base: int = 0, increment: int | None = None, sizes: Sequence[int] | None = None
) -> list[int]:
    """How many classes each task brings. No class is ever dropped: the last task is smaller if it must be.

    Args:
        count: Number of classes C.
        base: Classes of the first task in the B-m Inc-n notation; 0 means as many as ``increment`` (B0).
        increment: Classes of every later task.
        sizes: The sizes themselves, instead of ``base`` and ``increment``; must add up to C.

    Raises:
        StreamError: With sizes that would fit.

    >>> task_sizes(100, increment=10) == [10] * 10
    True
    >>> task_sizes(100, base=50, increment=20)
    [50, 20, 20, 10]
    >>> task_sizes(10, sizes=[4, 1, 5])
    [4, 1, 5]
    """
    if sizes is not None:
        if increment is not None or base:
            raise StreamError("stream: give either sizes or base and increment, not both")
        if any(s < 1 for s in sizes) or sum(sizes) != count:
            total = sum(sizes)
            fit = (
                [*sizes, count - total]
                if 0 < total < count and min(sizes) > 0
                else task_sizes(count, increment=min(count, 10))
            )
            raise StreamError(
                f"stream.sizes: {list(sizes)} adds up to {total}, the dataset has {count} classes; would fit: {fit}"
            )
        return list(sizes)
    if increment is None:
        raise StreamError(f"stream: give increment (classes a task) or sizes; the dataset has {count} classes")
    first = base or increment
    if first > count or increment < 1 or base < 0:
        wrong, value = ("base", base) if base else ("increment", increment)
        raise StreamError(f"stream.{wrong}: {value} does not fit {count} classes; allowed: 1 to {count}")
    sizes = [first]
    while sum(sizes) < count:
        sizes.append(min(increment, count - sum(sizes)))
    return sizes


def validation_split(labels: np.ndarray, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split positions into (train, validation), class by class, at least one image of every class staying in training.

    A class of a single image gives none to validation. The split depends on ``seed`` alone, not on the class order.
    """
    keep, held = [], []
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        members = members[np.random.RandomState([seed, int(c)]).permutation(len(members))]
        take = min(round(fraction * len(members)), len(members) - 1)
        held.append(members[:take])
        keep.append(members[take:])
    return np.sort(np.concatenate(keep)), np.sort(np.concatenate(held))


class Tasks(Protocol):
    """A stream type: how images and classes are dealt out to tasks."""

    def deal(self, names: Sequence[str], labels: np.ndarray, domains: np.ndarray | None) -> Deal: ...


@dataclass(frozen=True)
class Deal:
    """How one image set's classes and images go to tasks.

    Attributes:
        order: Dataset class of each label, in order of appearance.
        classes: Per task, the labels it is about.
        members: Per task, positions of its images.
    """

    order: list[int]
    classes: list[tuple[int, ...]]
    members: list[np.ndarray]


@dataclass(frozen=True)
class ClassIncremental:
    """New classes in every task (the field's class-incremental protocol)."""

    order: Order = 1993
    base: int = 0
    increment: int | None = None
    sizes: Sequence[int] | None = None

    def deal(self, names: Sequence[str], labels: np.ndarray, domains: np.ndarray | None) -> Deal:
        order = class_order(names, self.order)
        sizes = task_sizes(len(names), base=self.base, increment=self.increment, sizes=self.sizes)
        ends = np.cumsum(sizes)
        classes = [tuple(range(end - size, end)) for size, end in zip(sizes, ends.tolist(), strict=True)]
        members = [np.flatnonzero(np.isin(labels, [order[c] for c in task])) for task in classes]
        return Deal(order, classes, members)


@dataclass(frozen=True)
class DomainIncremental:
    """The same classes in every task, each task from a domain of its own; an image's domain comes with the data."""

    order: Order = "natural"

    def deal(self, names: Sequence[str], labels: np.ndarray, domains: np.ndarray | None) -> Deal:
        if domains is None:
            raise StreamError(
                "stream.type domain_incremental needs data.domains: the folders that hold the domains, in order"
            )
        every = tuple(range(len(names)))
        count = int(domains.max()) + 1
        return Deal(
            class_order(names, self.order), [every] * count, [np.flatnonzero(domains == d) for d in range(count)]
        )
