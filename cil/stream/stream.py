"""From labelled images to a sequence of tasks.

A class-incremental stream divides the classes, in a given order, into tasks; a domain-incremental one shows the same
classes in every task, each time from a new domain. Inside the library a label is always 0…C−1 **in order of
appearance**: the learner's column i is the i-th class that the stream shows. People see class names.

This module uses numpy only: it imports no torch, decodes no image and uses no global random state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cil.errors import StreamError
from cil.stream.protocol import Tasks, validation_split
from cil.stream.sampling import Sampling, wrong_labels

if TYPE_CHECKING:
    import torch

    from cil.data.images import ImageSet
    from cil.stream.online import Online


class TaskData:
    """The training (or validation) images of one task, and nothing else.

    The runner closes it when the task is over. From then on reading raises :class:`StreamError`, so a learner that does
    not declare ``stores_images`` cannot return to old images.
    """

    def __init__(self, images: ImageSet | None, indices: np.ndarray, labels: np.ndarray) -> None:
        self._images, self._indices, self._labels = images, indices, labels
        self._closed = "" if images is not None else "this task belongs to a finished run; its images are not loaded"

    def __len__(self) -> int:
        return len(self._indices)

    def _open(self) -> None:
        if self._closed:
            raise StreamError(self._closed)

    @property
    def labels(self) -> np.ndarray:
        """Labels in order of appearance, int64 [N]."""
        self._open()
        return self._labels

    @property
    def source(self) -> tuple[ImageSet, np.ndarray]:
        """The underlying image set and the positions in it, int64 [N]; they are the keys of the feature cache."""
        self._open()
        assert self._images is not None  # only closed task data has none
        return self._images, self._indices

    @property
    def repeated_bytes(self) -> float:
        """Bytes for what is computed of an image once for all training passes; 0 if augmentation makes them differ."""
        return self.source[0].repeated_bytes

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One pass over the task, in batches (normalised images float [B, 3, S, S], labels int64 [B]) on ``device``.

        Args:
            batch_size: Images per batch; the last batch may be smaller, and no image is dropped.
            generator: Shuffles the pass and seeds its augmentation; without it the order is the dataset's.
            augment: Use the training transform instead of the test transform; needs a generator.
            device: Device of the batches.
            part: (rank, processes): yield only the images rank, rank + processes, … of each batch, possibly none. All
                parts together are the whole pass, each image once, for any number of processes.

        Raises:
            StreamError: The task is over.
            ValueError: ``augment`` without a generator.
            DataError: An image cannot be read.
        """
        images, indices = self.source
        return images.batches(
            indices, self._labels, batch_size, generator=generator, augment=augment, device=device, part=part
        )

    def close(self, why: str) -> None:
        """Make every later read raise ``StreamError(why)``."""
        self._closed = why


class UnlabelledData(TaskData):
    """Training images without labels; those of :meth:`batches` are −1, and :attr:`labels` cannot be read."""

    def __init__(self, images: ImageSet, indices: np.ndarray) -> None:
        super().__init__(images, indices, np.full(len(indices), -1))

    @property
    def labels(self) -> np.ndarray:
        raise StreamError("these images have no labels: they are task.unlabelled; task.train has those with labels")


def concatenate(parts: Sequence[TaskData]) -> TaskData:
    """Joins several open tasks of one stream into one; for learners that declare ``stores_images``.

    Raises:
        StreamError: A task is closed, or the tasks have different image sets.
    """
    sources = [part.source for part in parts]
    if any(images is not sources[0][0] for images, _ in sources):
        raise StreamError("tasks of different image sets cannot be concatenated")
    return TaskData(
        sources[0][0], np.concatenate([i for _, i in sources]), np.concatenate([part.labels for part in parts])
    )


@dataclass(frozen=True)
class Task:
    """Everything that a learner may know about one stage; this excludes later tasks and the test data.

    Attributes:
        index: Number of the stage, from 0.
        classes: Labels of the task: new ones in a class-incremental stream, all labels in a domain-incremental one.
        seen: All labels so far, 0…C−1; ``logits`` has one column per label.
        names: Class names of ``seen``.
        train: The task's training images.
        validation: Images held out of the *training* data if ``stream.validation`` is set, else None.
        unlabelled: Training images without labels if ``stream.labelled`` is set, else None.
    """

    index: int
    classes: tuple[int, ...]
    seen: tuple[int, ...]
    names: tuple[str, ...]
    train: TaskData = field(repr=False)
    validation: TaskData | None = field(default=None, repr=False)
    unlabelled: UnlabelledData | None = field(default=None, repr=False)

    def close(self) -> None:
        """Close all images of the task; later reads raise :class:`StreamError`."""
        why = f"task {self.index} is over: its images are closed to a learner that does not declare stores_images"
        for data in (self.train, self.validation, self.unlabelled):
            if data is not None:
                data.close(why)


def past_tasks(classes: Sequence[Sequence[int]], names: Sequence[str]) -> list[Task]:
    """The tasks of a finished run, without images: enough to rebuild a learner of the right shape.

    Args:
        classes: Labels of each task.
        names: Class names in order of appearance.
    """
    tasks: list[Task] = []
    for index, members in enumerate(classes):
        seen = max([members[-1] + 1, *[len(t.seen) for t in tasks]])
        closed = TaskData(None, np.zeros(0, np.int64), np.zeros(0, np.int64))
        tasks.append(Task(index, tuple(members), tuple(range(seen)), tuple(names[:seen]), closed))
    return tasks


class Stream:
    """Tasks over a training set, and a test set that only the evaluator can open.

    Args:
        train: Training images.
        test: Test images of the same classes; None only together with ``test_on="validation"``.
        tasks: The protocol: :class:`ClassIncremental`, :class:`DomainIncremental`,
            :class:`~cil.stream.returning.Blurry` or :class:`~cil.stream.returning.Repetition`.
        validation: Fraction of each class's training images held out, in [0, 1).
        test_on: ``"test"``, or ``"validation"`` to evaluate on the held-out training images instead (for tuning).
        sampling: Which training images the stream shows, and with which labels; all, with their own, by default. Images
            are held out of those that it shows, with their own labels.
        online: Learning in one pass, in batches; None: each task as a whole.

    Attributes:
        groups: Labels whose test images belong to each task, a tuple per task: those of the task, or in streams whose
            classes return those that appear there first.
        few_shots: Whether all tasks but the first have a few images per class.
        returns: Whether classes return, so that ``groups`` are not the classes of the tasks.
        long_tail: Number of training images of each label, int64 [C], of a long-tailed stream; None: of any other.
        altered: Whether classes return, or training images are left out or have wrong or no labels.
        relabelled: Positions of the training images with wrong labels and their true labels, both int64 [n].

    Raises:
        StreamError: Train and test differ in classes or domains, the classes do not fit the task sizes, or a task has
            no images.
    """

    few_shots: bool = False
    returns: bool = False
    long_tail: np.ndarray | None = None
    online: Online | None = None

    def __init__(
        self,
        train: ImageSet,
        test: ImageSet | None,
        tasks: Tasks,
        *,
        validation: float = 0.0,
        test_on: str = "test",
        sampling: Sampling | None = None,
        online: Online | None = None,
    ) -> None:
        self.online = online
        self.absent: tuple[int, ...] = ()  # labels that are not predicted, though the learner has seen them
        if test is not None and set(train.class_names) != set(test.class_names):
            only_train = sorted(set(train.class_names) - set(test.class_names))[:5]
            only_test = sorted(set(test.class_names) - set(train.class_names))[:5]
            raise StreamError(
                f"train and test have different classes; only in train: {only_train}, only in test: {only_test}"
            )
        if test_on == "validation" and not validation:
            raise StreamError("stream.test_on: validation needs stream.validation > 0, e.g. stream.validation=0.2")
        split = tasks.split(train.class_names, train.labels, train.domains)
        self.class_names: tuple[str, ...] = tuple(train.class_names[c] for c in split.order)
        self.order: tuple[int, ...] = tuple(split.order)
        self.tasks: tuple[Task, ...] = ()
        label_of = np.argsort(split.order)  # dataset class → label in order of appearance
        true_labels = label_of[train.labels]
        sampling = sampling or Sampling()
        self.groups = tuple(split.groups or split.classes)
        shown = sampling.kept(train.labels, split.order, self.groups, train.class_names)
        split = split.restricted_to(shown, true_labels)
        remaining, held_out = (shown[part] for part in validation_split(train.labels[shown], validation))
        train_labels = true_labels
        trained, unlabelled = sampling.divided(
            train.labels, [np.intersect1d(members, remaining) for members in split.members]
        )
        if sampling.noise is not None:
            raw = wrong_labels(train.labels, trained, *sampling.noise, sampling.seed)
            train_labels = label_of[raw]
        wrong = np.flatnonzero(train_labels != true_labels)
        self.relabelled = wrong, true_labels[wrong]
        self.few_shots = sampling.shots is not None or sampling.sessions is not None
        self.returns = split.groups is not None
        if sampling.imbalance is not None:
            self.long_tail = np.bincount(true_labels[np.concatenate(trained)], minlength=len(split.order))
        self.altered = split.groups is not None or sampling != Sampling(seed=sampling.seed)
        seen = 0
        for index, (classes, members) in enumerate(zip(split.classes, split.members, strict=True)):
            seen = max(seen, classes[-1] + 1)
            own, out = trained[index], np.intersect1d(members, held_out)
            task = Task(
                index=index,
                classes=classes,
                seen=tuple(range(seen)),
                names=self.class_names[:seen],
                train=TaskData(train, own, train_labels[own]),
                validation=TaskData(train, out, true_labels[out]) if len(out) else None,
                unlabelled=None if unlabelled is None else UnlabelledData(train, unlabelled[index]),
            )
            self.tasks = (*self.tasks, task)
        if test_on == "validation":
            whole = self._first_seen(true_labels) if self.returns else split.members
            self._test = TestData(train, true_labels, [np.intersect1d(m, held_out) for m in whole], what="validation")
        elif test is None:
            raise StreamError("a stream that is not tested on validation images needs test images")
        else:
            # the test set may list the same classes in another order: map through the names
            to_train = np.array([list(train.class_names).index(n) for n in test.class_names])
            test_raw = to_train[test.labels]
            test_labels = label_of[test_raw]
            if self.returns:
                tested = self._first_seen(test_labels)
            else:
                tested = tasks.split(train.class_names, test_raw, test.domains).members
            if len(tested) != len(split.members):
                raise StreamError(f"train has {len(split.members)} domains, test has {len(tested)}; they must agree")
            self._test = TestData(test, test_labels, tested)
        for task in self.tasks:
            untested = self.groups[task.index] and not len(self._test.members[task.index])
            if not len(task.train) or untested:
                what = "training" if not len(task.train) else self._test.what
                raise StreamError(
                    f"task {task.index} ({', '.join(task.names[-len(task.classes) :][:5])}) has no {what} images"
                )

    def _first_seen(self, labels: np.ndarray) -> list[np.ndarray]:
        """Positions of the images of the classes that first appear in each task, given all labels [N]."""
        return [np.flatnonzero(np.isin(labels, group)) for group in self.groups]

    def test_only(self, positions: np.ndarray) -> None:
        """Leave all other images out of the test; ``positions`` count in the image set that is tested."""
        self._test.members = [np.intersect1d(members, positions) for members in self._test.members]

    @property
    def shows_again(self) -> bool:
        """Whether a task has classes of an earlier one."""
        return sum(len(task.classes) for task in self.tasks) > len(self.class_names)

    def __len__(self) -> int:
        return len(self.tasks)

    def __repr__(self) -> str:
        return f"Stream({len(self)} tasks of {[len(t.classes) for t in self.tasks]} classes)"

    @contextmanager
    def open_test(self) -> Iterator[TestData]:
        """Open the test images within a ``with`` block, for an evaluator. Learners have no reference to the stream."""
        self._test.is_open = True
        try:
            yield self._test
        finally:
            self._test.is_open = False


class TestData:
    """Test images by task. Reading them raises :class:`StreamError` unless the evaluator has opened them."""

    __test__ = False  # not a pytest class

    def __init__(self, images: ImageSet, labels: np.ndarray, members: list[np.ndarray], what: str = "test") -> None:
        self._images, self._labels = images, labels
        self.members, self.what = members, what
        self.is_open = False

    def _check(self) -> None:
        if not self.is_open:
            raise StreamError("the test split may be read by the evaluator only (inside Stream.open_test())")

    @property
    def images(self) -> ImageSet:
        """The image set that contains the test images."""
        self._check()
        return self._images

    @property
    def labels(self) -> np.ndarray:
        """Label of every image of the image set, in order of appearance, int64 [N]."""
        self._check()
        return self._labels

    def task(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(positions in the image set, labels) of the test images of task ``index``, both int64."""
        self._check()
        return self.members[index], self._labels[self.members[index]]
