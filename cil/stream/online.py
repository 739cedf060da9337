"""One pass in batches: a learner is given a task's images a few at a time, and never all of them together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from cil.stream.stream import Task, TaskData


@dataclass(frozen=True)
class Online:
    """How a stream is learned in one pass.

    Attributes:
        batch: Number of images that the learner gets at a time; the last batch of a task may be smaller.
        evaluate_every: Number of training images after which the learner is tested, at the next end of a batch; it is
            also tested at the end of every task.
        seed: Seed of the order of a task's images.
    """

    batch: int = 64
    evaluate_every: int = 1000
    seed: int = 0

    def batches(self, task: Task) -> Iterator[Task]:
        """The task in parts whose training images are one batch each; every image is in one of them."""
        images, indices = task.train.source
        labels, order = task.train.labels, np.random.RandomState([self.seed, task.index]).permutation(len(task.train))
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            part = TaskData(images, indices[rows], labels[rows])
            yield replace(task, train=part, validation=None, unlabelled=None)
