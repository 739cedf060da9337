"""How classes or domains are split into tasks: class order, task sizes, and which images belong to which task.

Pure functions and values over numpy; nothing here uses images, torch or a global random state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from cil.errors import StreamError, nearest, shortened

Order = int | str | Sequence[int] | Sequence[str]


def class_order(names: Sequence[str], order: Order) -> list[int]:
    """The classes in the order the stream shows them, as positions in ``names``.

    Args:
        names: Class names in the dataset's own order.
        order: ``"natural"``; an integer seed k for the common ``numpy.random.RandomState(k).permutation`` (1993 is
            iCaRL's); or an explicit list of all class names or of all positions.

    Raises:
        StreamError: An explicit list omits, repeats or invents a class.

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
            f"orders: unknown class order {shortened(order)}; allowed: natural, an integer seed, a list of classes"
        )
    if isinstance(order, (int, np.integer)):
        return [int(c) for c in np.random.RandomState(int(order)).permutation(count)]
    position = {name: i for i, name in enumerate(names)}
    positions = []
    for item in order:
        if isinstance(item, str) and item not in position:
            raise StreamError(f"orders: class {shortened(item)} is not in the dataset{nearest(item, names)}")
        positions.append(position[item] if isinstance(item, str) else int(item))
    if sorted(positions) != list(range(count)):
        missing = [names[i] for i in range(count) if i not in set(positions)][:5]
        raise StreamError(
            f"orders: an explicit order must have each of the {count} classes once; got {len(positions)} entries, "
            f"{len(set(positions))} different, missing e.g. {missing}"
        )
    return positions


def task_sizes(
    count: int, *, initial_classes: int = 0, increment: int | None = None, sizes: Sequence[int] | None = None
) -> list[int]:
    """The number of new classes of each task. No class is dropped: the last task is smaller if necessary.

    Args:
        count: Number of classes C.
        initial_classes: Number of classes of the first task, m in the notation B-m Inc-n; 0: as many as ``increment``
            (B0).
        increment: Number of classes of every later task, n.
        sizes: The sizes themselves, instead of ``initial_classes`` and ``increment``; must add up to C.

    Raises:
        StreamError: The sizes do not fit; the message gives ones that do.

    >>> task_sizes(100, increment=10) == [10] * 10
    True
    >>> task_sizes(100, initial_classes=50, increment=20)
    [50, 20, 20, 10]
    >>> task_sizes(10, sizes=[4, 1, 5])
    [4, 1, 5]
    """
    if sizes is not None:
        if increment is not None or initial_classes:
            raise StreamError("stream: give either sizes or initial_classes and increment, not both")
        if any(s < 1 for s in sizes) or sum(sizes) != count:
            total = sum(sizes)
            fit = (
                [*sizes, count - total]
                if 0 < total < count and min(sizes) > 0
                else task_sizes(count, increment=min(count, 10))
            )
            raise StreamError(
                f"stream.sizes: {shortened(list(sizes))} adds up to {total}, the dataset has {count} classes; "
                f"would fit: {shortened(fit)}"
            )
        return list(sizes)
    if increment is None:
        raise StreamError(f"stream: give increment (classes per task) or sizes; the dataset has {count} classes")
    first = initial_classes or increment
    if first > count or increment < 1 or initial_classes < 0:
        wrong, value = ("initial_classes", initial_classes) if initial_classes else ("increment", increment)
        raise StreamError(f"stream.{wrong}: {value} does not fit {count} classes; allowed: 1 to {count}")
    sizes = [first]
    while sum(sizes) < count:
        sizes.append(min(increment, count - sum(sizes)))
    return sizes


def validation_split(labels: np.ndarray, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split positions into (train, validation), int64, class by class; at least one image per class stays in training.

    A class with a single image therefore has none in validation. The split depends on ``seed`` alone, not on the class
    order.

    Args:
        labels: Class of every image, int [N].
        fraction: Fraction of each class's images for validation, in [0, 1).
        seed: Seed of the split.
    """
    train, held_out = [], []
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        members = members[np.random.RandomState([seed, int(c)]).permutation(len(members))]
        count = min(round(fraction * len(members)), len(members) - 1)
        held_out.append(members[:count])
        train.append(members[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(held_out))


class Tasks(Protocol):
    """A stream type: a rule that splits classes and images into tasks."""

    def split(self, names: Sequence[str], labels: np.ndarray, domains: np.ndarray | None) -> TaskSplit:
        """The tasks of one image set.

        Args:
            names: Class names in the dataset's own order.
            labels: Class position of every image, int64 [N].
            domains: Domain of every image, int64 [N]; None if the data have no domains.

        Raises:
            StreamError: The data do not fit the rule.
        """
        ...


@dataclass(frozen=True)
class TaskSplit:
    """The classes and images of each task, for one image set.

    Attributes:
        order: Dataset class of each label; labels count in order of appearance.
        classes: Labels of each task.
        members: Positions of each task's images, int64.
        groups: Labels whose test images belong to each task, of a stream whose classes return: those that appear there
            first, possibly none. None: ``members`` says which images, for training and for testing.
    """

    order: list[int]
    classes: list[tuple[int, ...]]
    members: list[np.ndarray]
    groups: list[tuple[int, ...]] | None = None

    def restricted_to(self, shown: np.ndarray, labels: np.ndarray) -> TaskSplit:
        """The split without the images that are not in ``shown``, given the label of every image.

        Raises:
            StreamError: A class that returns would have no image left in one of its tasks.
        """
        members = [np.intersect1d(own, shown) for own in self.members]
        for task, (classes, own) in enumerate(zip(self.classes, members, strict=True)):
            if self.groups is not None and set(classes) - set(labels[own].tolist()):
                raise StreamError(
                    f"stream: of the training images that are chosen, task {task} has none of one of its classes; in a "
                    "stream whose classes return give a larger stream.imbalance.ratio or fewer tasks"
                )
        return replace(self, members=members)


@dataclass(frozen=True)
class ClassIncremental:
    """New classes in every task (the field's class-incremental protocol)."""

    order: Order = 1993
    initial_classes: int = 0
    increment: int | None = None
    sizes: Sequence[int] | None = None

    def split(self, names: Sequence[str], labels: np.ndarray, domains: np.ndarray | None) -> TaskSplit:
        order = class_order(names, self.order)
        sizes = task_sizes(len(names), initial_classes=self.initial_classes, increment=self.increment, sizes=self.sizes)
        ends = np.cumsum(sizes)
        classes = [tuple(range(end - size, end)) for size, end in zip(sizes, ends.tolist(), strict=True)]
        members = [np.flatnonzero(np.isin(labels, [order[c] for c in task])) for task in classes]
        return TaskSplit(order, classes, members)


@dataclass(frozen=True)
class DomainIncremental:
    """The same classes in every task, but one domain per task; the data give the domain of each image."""

    order: Order = "natural"

    def split(self, names: Sequence[str], labels: np.ndarray, domains: np.ndarray | None) -> TaskSplit:
        if domains is None:
            raise StreamError("stream.type domain_incremental needs data.domains: the folders of the domains, in order")
        every_class = tuple(range(len(names)))
        count = int(domains.max()) + 1
        return TaskSplit(
            class_order(names, self.order), [every_class] * count, [np.flatnonzero(domains == d) for d in range(count)]
        )


Pairs = Literal["shuffled", "classes", "domains"]


@dataclass(frozen=True)
class ClassDomainIncremental:
    """New classes and new domains in one stream (versatile incremental learning, Park et al., ECCV 2024).

    Each task is one group of classes in one domain, and each pair is one task. Test images are those of the pair.

    Attributes:
        groups: The class-incremental stream whose tasks are the groups of classes.
        pairs: Order of the pairs; ``shuffled``: random; ``classes``: a group in all domains, then the next group;
            ``domains``: a domain with all groups, then the next domain.
        seed: Seed of the random order; it does not depend on the class order.
    """

    groups: ClassIncremental
    pairs: Pairs = "shuffled"
    seed: int = 0

    def split(self, names: Sequence[str], labels: np.ndarray, domains: np.ndarray | None) -> TaskSplit:
        if domains is None:
            raise StreamError(
                "stream.type class_domain_incremental needs data.domains: the folders of the domains, in order"
            )
        once = self.groups.split(names, labels, domains)
        count = int(domains.max()) + 1
        pairs = [(g, d) for g in range(len(once.classes)) for d in range(count)]
        if self.pairs == "domains":
            pairs.sort(key=lambda pair: pair[1])  # stable
        elif self.pairs == "shuffled":
            pairs = [pairs[i] for i in np.random.RandomState(self.seed).permutation(len(pairs)).tolist()]
        order: list[int] = []  # labels count in order of appearance
        new: dict[int, tuple[int, ...]] = {}
        for g, _ in pairs:
            if g not in new:
                new[g] = tuple(range(len(order), len(order) + len(once.classes[g])))
                order += [once.order[label] for label in once.classes[g]]
        members = [np.intersect1d(once.members[g], np.flatnonzero(domains == d)) for g, d in pairs]
        return TaskSplit(order, [new[g] for g, _ in pairs], members)
