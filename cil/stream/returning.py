"""Streams in which classes return: blurred borders between tasks, and repetition.

Both divide the images of every class among tasks; no class and no image is lost. Test images belong to the task in
which their class appears first, whole, so that R[i, j] stays a statement about classes. As everywhere in the protocol,
the functions use labels alone, and choices are drawn as in :mod:`cil.stream.sampling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cil.stream.protocol import ClassIncremental, TaskSplit
from cil.stream.sampling import DIVISION, PLACES, drawn


def by_first_appearance(order: Sequence[int], labels: np.ndarray, members: list[np.ndarray]) -> TaskSplit:
    """The split with these images per task; labels count in order of the first task with an image of the class.

    Args:
        order: Dataset classes in the order that decides between classes of the same first task.
        labels: Dataset class of every image, int [N].
        members: Positions of each task's images.
    """
    first = {c: task for task, own in reversed(list(enumerate(members))) for c in np.unique(labels[own]).tolist()}
    order = sorted(order, key=lambda c: first[c])  # stable
    label = {c: i for i, c in enumerate(order)}
    classes = [tuple(sorted(label[c] for c in np.unique(labels[own]).tolist())) for own in members]
    groups = [tuple(label[c] for c in order if first[c] == task) for task in range(len(members))]
    return TaskSplit(order, classes, [np.sort(own) for own in members], groups)


def cuts(count: int, parts: int, rng: np.random.RandomState | None) -> list[int]:
    """Sizes of ``parts`` parts of ``count`` things: as equal as possible, or cut at random places.

    >>> cuts(7, 3, None)
    [3, 2, 2]
    """
    if rng is None:
        return [len(part) for part in np.array_split(np.arange(count), parts)]
    places = np.sort(rng.randint(0, count + 1, parts - 1))
    return np.diff([0, *places.tolist(), count]).tolist()


@dataclass(frozen=True)
class Blurry:
    """Blurred borders (i-Blurry, arXiv 2110.10031; with ``stochastic`` Si-Blurry, arXiv 2308.09303).

    A share of the classes is disjoint: all their images come in one task. Each other class has a main task too, but a
    share of its images is dealt to the other tasks. The released code drops classes and images that do not divide;
    here none is lost.

    Attributes:
        order: Class order.
        tasks: Number of tasks T ≥ 2.
        disjoint: Percentage N of classes that belong to one task.
        blurry: Percentage M of the images of each other class that go to other tasks, drawn per class.
        stochastic: Whether the numbers of classes per task, and the other tasks, are random instead of equal.
        seed: Seed of all choices.
    """

    order: int | str | Sequence[int] | Sequence[str] = 1993
    tasks: int = 5
    disjoint: float = 50.0
    blurry: float = 10.0
    stochastic: bool = False
    seed: int = 0

    def split(self, names: Sequence[str], labels: np.ndarray, domains: np.ndarray | None) -> TaskSplit:
        order = ClassIncremental(self.order, sizes=[len(names)]).split(names, labels, domains).order
        apart = round(self.disjoint / 100 * len(order))
        rng = np.random.RandomState(self.seed) if self.stochastic else None
        main: list[int] = []
        for count in (apart, len(order) - apart):
            # the larger parts of the blurry classes come last, so that equal tasks are as equal as they can be
            sizes = cuts(count, self.tasks, rng)
            sizes = sizes if rng is not None or not main else sizes[::-1]
            main += [task for task, size in enumerate(sizes) for _ in range(size)]
        parts: list[list[np.ndarray]] = [[] for _ in range(self.tasks)]
        for i, (c, task) in enumerate(zip(order, main, strict=True)):
            own = drawn(np.flatnonzero(labels == c), self.seed, c, DIVISION)
            moved = 0 if i < apart else round(self.blurry / 100 * len(own))
            parts[task].append(own[moved:])
            others = np.array([t for t in range(self.tasks) if t != task])
            draw = np.random.RandomState([self.seed, c, PLACES])
            if self.stochastic:
                goes = others[draw.randint(len(others), size=moved)]
            else:  # dealt in turn, from a random one on: numbers of images differ by at most one
                goes = others[(draw.randint(len(others)) + np.arange(moved)) % len(others)]
            for t in range(self.tasks):
                parts[t].append(own[:moved][goes == t])
        return by_first_appearance(order, labels, [np.concatenate(part) for part in parts])


@dataclass(frozen=True)
class Repetition:
    """Classes that return (class-incremental learning with repetition, Hemati et al., CoLLAs 2023, arXiv 2301.11396).

    New classes come as in a class-incremental stream; in every later task a class returns with a fixed probability. Its
    images are divided among its tasks as equally as possible, the first ones more; a class with fewer images than tasks
    returns as often as it has images for.

    Attributes:
        first: The class-incremental stream of first appearances.
        probability: Probability that a class returns in a later task, in [0, 1].
        seed: Seed of all choices.
    """

    first: ClassIncremental
    probability: float = 0.2
    seed: int = 0

    def split(self, names: Sequence[str], labels: np.ndarray, domains: np.ndarray | None) -> TaskSplit:
        once = self.first.split(names, labels, domains)
        parts: list[list[np.ndarray]] = [[] for _ in once.classes]
        for task, group in enumerate(once.classes):
            for c in (once.order[label] for label in group):
                own = drawn(np.flatnonzero(labels == c), self.seed, c, DIVISION)
                later = np.arange(task + 1, len(parts))
                returns = np.random.RandomState([self.seed, c, PLACES]).random_sample(len(later)) < self.probability
                where = [task, *later[returns].tolist()][: max(1, len(own))]
                for t, part in zip(where, np.array_split(own, len(where)), strict=True):
                    parts[t].append(part)
        return by_first_appearance(once.order, labels, [np.concatenate(part) for part in parts])
