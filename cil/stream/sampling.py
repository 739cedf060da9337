"""Which training images a stream shows, and with which labels: few shots, long tails and wrong labels.

Pure functions over labels, as in :mod:`cil.stream.protocol`. Every choice is drawn from
``numpy.random.RandomState([seed, class, use])`` with the dataset's own class position, so that it depends neither on
the class order nor on the other classes. ``use`` numbers the uses of chance: with one permutation for all of them, the
images with wrong labels, or those held out for validation, would be those of a class's first task. Test images are
never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cil.errors import StreamError, shortened

Places = Literal["ordered", "shuffled"]
Kind = Literal["symmetric", "pair"]
From = Literal["task", "seen", "all"]

CHOICE, LABELS, DIVISION, PLACES, LABELLED, SCATTERED = 1, 2, 3, 4, 5, 6
"""The uses of chance: images that stay, wrong labels, images of each task, the tasks of a class, images with a label,
and the tasks of unlabelled images."""


def drawn(members: np.ndarray, seed: int, c: int, use: int) -> np.ndarray:
    """The positions [N] of the images of dataset class ``c`` in the random order of one use."""
    return members[np.random.RandomState([seed, c, use]).permutation(len(members))]


def few_shots(
    labels: np.ndarray, novel: Sequence[int], shots: int, seed: int = 0, names: Sequence[str] = ()
) -> np.ndarray:
    """Positions of the images that stay if the classes ``novel`` keep ``shots`` of theirs, sorted int64.

    Args:
        labels: Dataset class of every image, int [N].
        novel: Dataset classes of all tasks but the first.
        shots: Number of images per class.
        seed: Seed of the choice.
        names: Class names, for messages.

    Raises:
        StreamError: A class has fewer images.
    """
    kept = [np.flatnonzero(~np.isin(labels, novel))]
    for c in novel:
        members = np.flatnonzero(labels == c)
        if len(members) < shots:
            name = names[c] if names else c
            raise StreamError(
                f"stream.shots: class {shortened(name)} has {len(members)} training images, fewer than {shots}; give "
                "at most as many shots as the smallest class has images"
            )
        kept.append(drawn(members, seed, c, CHOICE)[:shots])
    return np.sort(np.concatenate(kept))


def long_tail(
    labels: np.ndarray, order: Sequence[int], ratio: float, places: Places = "ordered", seed: int = 0
) -> np.ndarray:
    """Positions of the images of a long-tailed training set, sorted int64.

    The class at place i of C keeps n = ⌊n_max ρ^{i / (C − 1)}⌋ images, but at least one and at most those that it has;
    n_max is the size of the largest class (Cao et al. 2019, arXiv 1906.07413; Liu et al., ECCV 2022, for streams).

    Args:
        labels: Dataset class of every image, int [N].
        order: Dataset classes in the order in which the stream shows them.
        ratio: ρ in (0, 1], the size of the smallest class divided by that of the largest.
        places: ``ordered``: i is the place in ``order``; ``shuffled``: in a random permutation of it.
        seed: Seed of the permutation and of the choice of images.
    """
    if places == "shuffled":
        order = [order[i] for i in np.random.RandomState(seed).permutation(len(order))]
    largest = int(np.bincount(labels).max())
    kept = []
    for i, c in enumerate(order):
        wanted = max(1, int(largest * ratio ** (i / max(1, len(order) - 1))))
        kept.append(drawn(np.flatnonzero(labels == c), seed, c, CHOICE)[:wanted])
    return np.sort(np.concatenate(kept))


def wrong_labels(
    labels: np.ndarray, members: Sequence[np.ndarray], rate: float, kind: Kind = "symmetric", seed: int = 0
) -> np.ndarray:
    """Labels of which round(``rate`` · n_c) of each class are wrong; a wrong label is another class of the same task.

    Args:
        labels: Label of every image, int64 [N].
        members: Positions of each task's images.
        rate: Fraction of wrong labels, in [0, 1].
        kind: ``symmetric``: any other class of the task, all equally likely; ``pair``: the next one, and the first for
            the last.
        seed: Seed of which images, and of their labels.

    Returns:
        Labels, int64 [N].

    Raises:
        StreamError: A task has only one class.
    """
    wrong = labels.copy()
    task_of = np.full(len(labels), -1)
    classes = []
    for task, own in enumerate(members):
        task_of[own] = task
        classes.append(np.unique(labels[own]))
        if len(classes[-1]) < 2:
            raise StreamError(
                f"stream.noise: task {task} has one class only, so none of its labels can be wrong; give tasks of two "
                "classes or more, e.g. stream.increment=2"
            )
    for c in np.unique(labels[task_of >= 0]).tolist():
        own = np.flatnonzero((labels == c) & (task_of >= 0))
        rng = np.random.RandomState([seed, c, LABELS])
        chosen = own[rng.permutation(len(own))][: round(rate * len(own))]
        for i in chosen.tolist():
            others = classes[task_of[i]]
            place = int(np.searchsorted(others, c))
            step = 1 if kind == "pair" else 1 + rng.randint(len(others) - 1)
            wrong[i] = others[(place + step) % len(others)]
    return wrong


def labelled_part(
    labels: np.ndarray, members: Sequence[np.ndarray], amount: int | float, seed: int = 0
) -> list[np.ndarray]:
    """Positions of the images of each task that keep their labels, sorted int64; at least one of each class of a task.

    Args:
        labels: Dataset class of every image, int [N].
        members: Positions of each task's images.
        amount: Number of images per class and task, or a fraction in (0, 1), which is rounded.
        seed: Seed of the choice.
    """
    parts = []
    for own in members:
        chosen = []
        for c in np.unique(labels[own]).tolist():
            of_class = drawn(own[labels[own] == c], seed, c, LABELLED)
            chosen.append(of_class[: amount if isinstance(amount, int) else max(1, round(amount * len(of_class)))])
        parts.append(np.sort(np.concatenate(chosen)) if chosen else own)
    return parts


def scattered(labels: np.ndarray, members: Sequence[np.ndarray], source: From, seed: int = 0) -> list[np.ndarray]:
    """Positions of the unlabelled images that each task shows, sorted int64; none is lost.

    Args:
        labels: Dataset class of every image, int [N].
        members: Positions of the unlabelled images of each task's own classes.
        source: ``task``: a task shows its own; ``seen``: an image comes in its own task or a later one, so that a task
            also shows old classes; ``all``: in any task. All possible tasks are equally likely.
        seed: Seed of the tasks.
    """
    parts: list[list[np.ndarray]] = [[] for _ in members]
    for task, own in enumerate(members):
        first = {"task": task, "seen": task, "all": 0}[source]
        last = task if source == "task" else len(members) - 1
        for c in np.unique(labels[own]).tolist():
            of_class = own[labels[own] == c]
            goes = np.random.RandomState([seed, c, SCATTERED, task]).randint(first, last + 1, len(of_class))
            for t in range(first, last + 1):
                parts[t].append(of_class[goes == t])
    return [np.sort(np.concatenate([np.zeros(0, np.int64), *part])) for part in parts]


@dataclass(frozen=True)
class Sampling:
    """What a stream does to its training images; the defaults change nothing.

    Attributes:
        shots: Images per class from task 1 on; None: all.
        sessions: Positions of the images of task 1, 2, …, as index files give them; in place of ``shots``.
        imbalance: (ratio, places) of :func:`long_tail`; None: none.
        noise: (rate, kind) of :func:`wrong_labels`; None: none. Only labels that learners see can be wrong.
        labelled: Amount of :func:`labelled_part`; None: all images have labels.
        unlabelled_from: Classes of a task's unlabelled images, see :func:`scattered`.
        seed: Seed of all choices.
    """

    shots: int | None = None
    sessions: tuple[np.ndarray, ...] | None = None
    imbalance: tuple[float, Places] | None = None
    noise: tuple[float, Kind] | None = None
    labelled: int | float | None = None
    unlabelled_from: From = "task"
    seed: int = 0

    def kept(
        self, labels: np.ndarray, order: Sequence[int], groups: Sequence[Sequence[int]], names: Sequence[str]
    ) -> np.ndarray:
        """Positions of the images that the stream shows, sorted int64.

        Args:
            labels: Dataset class of every image, int [N].
            order: Dataset class of each label.
            groups: Labels that each task shows first.
            names: Names of the dataset's classes.

        Raises:
            StreamError: The images do not allow it.
        """
        novel = [order[label] for group in groups[1:] for label in group]
        if self.sessions is not None:
            return np.sort(
                np.concatenate([np.flatnonzero(~np.isin(labels, novel)), *self._sessions(labels, order, groups, names)])
            )
        if self.shots is not None:
            return few_shots(labels, novel, self.shots, self.seed, names)
        if self.imbalance is not None:
            return long_tail(labels, order, *self.imbalance, self.seed)
        return np.arange(len(labels))

    def divided(
        self, labels: np.ndarray, members: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """Positions of each task's images with a label, and of its unlabelled ones or None, given all of its own."""
        if self.labelled is None:
            return list(members), None
        known = labelled_part(labels, members, self.labelled, self.seed)
        rest = [np.setdiff1d(own, part) for own, part in zip(members, known, strict=True)]
        return known, scattered(labels, rest, self.unlabelled_from, self.seed)

    def _sessions(
        self, labels: np.ndarray, order: Sequence[int], groups: Sequence[Sequence[int]], names: Sequence[str]
    ) -> Sequence[np.ndarray]:
        assert self.sessions is not None
        if len(self.sessions) != len(groups) - 1:
            raise StreamError(
                f"stream.shots_files: index files of {len(self.sessions)} tasks after the first, and the stream has "
                f"{len(groups) - 1}; set stream.initial_classes and stream.increment to those of the files"
            )
        for task, (own, group) in enumerate(zip(self.sessions, groups[1:], strict=True), 1):
            wanted, found = {order[label] for label in group}, set(labels[own].tolist())
            if wanted != found:
                wrong = names[min(wanted ^ found)]
                raise StreamError(
                    f"stream.shots_files: the images for task {task} are of other classes than the task, e.g. "
                    f"{shortened(wrong)}; set orders=[natural] and the task sizes of the files"
                )
        return self.sessions
