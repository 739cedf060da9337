"""Converts images to Avalanche's data sets, and a stream to an Avalanche benchmark."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cil.data.images import ImageSet
from cil.stream import Stream

Source = tuple[ImageSet, np.ndarray]
"""An image set and the positions of one task's images in it; ``TaskData.source``."""
Place = tuple[int, int]
"""The place of an image: (task, row in the task's source)."""


class Places(Dataset[tuple[Place, int]]):
    """Pairs (place, label) of images that are not read yet; the transform groups read them."""

    def __init__(self, places: Sequence[Place], labels: Sequence[int]) -> None:
        self.places, self.labels = places, labels

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[Place, int]:
        return self.places[i], self.labels[i]


def dataset(sources: Mapping[int, Source], places: Sequence[Place], labels: Sequence[int]) -> Any:
    """Build an Avalanche classification data set of (normalised image [3, S, S], label, task label 0).

    Its ``train`` transform is the image set's training transform, seeded from Python's global random state, so that
    only shuffling uses torch's. Its ``eval`` transform is the test transform. The attribute ``places`` follows every
    image through subsets and concatenations.

    Args:
        sources: Images of each task, by number.
        places: (task, row) of each image.
        labels: Label of each image.
    """
    from avalanche.benchmarks.utils import ConstantSequence, DataAttribute, TaskLabels, TransformGroups
    from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset

    # several strategies (LwF, DER) ask for task labels where there are none: all images are of task 0
    task_labels = TaskLabels(ConstantSequence(0, len(labels)))
    return TaskAwareSupervisedClassificationDataset(
        [Places(places, labels)],
        data_attributes=[DataAttribute(labels, "targets"), task_labels, DataAttribute(places, "places")],
        transform_groups=TransformGroups(
            {"train": (_reader(sources, augment=True), None), "eval": (_reader(sources, augment=False), None)}
        ),
    )


def _reader(sources: Mapping[int, Source], *, augment: bool) -> Callable[[Place], Tensor]:
    def read(place: Place) -> Tensor:
        task, row = place
        images, indices = sources[task]
        index = indices[row : row + 1]
        generator = torch.Generator().manual_seed(random.getrandbits(62)) if augment else None
        pixels, _ = next(images.batches(index, index, 1, generator=generator, augment=augment))
        return pixels[0]

    return read


def whole_task(index: int, source: Source, labels: np.ndarray) -> Any:
    """Build an Avalanche data set of all images of one task."""
    return dataset({index: source}, [(index, row) for row in range(len(labels))], labels.tolist())


def benchmark(stream: Stream) -> Any:
    """Convert a stream to an Avalanche ``CLScenario`` with a train and a test stream, labels in order of appearance.

    Training images have the training transform if the stream has one (after ``dataset.eval()`` the test transform),
    test images the test transform. The benchmark contains the test split, so the caller is responsible for not training
    on it.
    """
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline

    with stream.open_test() as test:
        tests = [(test.images, *test.task(task.index)) for task in stream.tasks]
    return with_classes_timeline(
        benchmark_from_datasets(
            train=[whole_task(task.index, task.train.source, task.train.labels) for task in stream.tasks],
            test=[whole_task(j, (images, index), labels).eval() for j, (images, index, labels) in enumerate(tests)],
        )
    )
