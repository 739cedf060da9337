"""Our streams as Avalanche benchmarks. Avalanche is imported here and nowhere else, and only when asked for.

Its own class splitting is not used: given a number of experiences that does not divide the classes it drops the rest
without a word. We hand it finished tasks instead, with labels in order of appearance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cil.data.images import ImageSet
from cil.stream import Stream


class Experience(Dataset[tuple[torch.Tensor, int]]):
    """Images of one task as Avalanche wants them: (normalised image [3, S, S], label), with ``targets``."""

    def __init__(self, images: ImageSet, indices: np.ndarray, labels: np.ndarray) -> None:
        self._images, self._indices = images, indices
        self.targets: list[int] = labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        chosen = self._indices[i : i + 1]
        image, _ = next(self._images.batches(chosen, chosen, 1))
        return image[0], self.targets[i]


def benchmark(stream: Stream) -> Any:
    """The same tasks as an Avalanche ``ClassificationScenario``-like benchmark with train and test streams.

    Images come under the test transform. The benchmark is the user's to train and test with: it holds the test split.
    """
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline
    from avalanche.benchmarks.utils import as_classification_dataset

    with stream.open_test() as test:
        tests = [Experience(test.images, *test.task(task.index)) for task in stream.tasks]
    trains = [Experience(*task.train.source, task.train.labels) for task in stream.tasks]
    return with_classes_timeline(
        benchmark_from_datasets(
            train=[as_classification_dataset(t) for t in trains], test=[as_classification_dataset(t) for t in tests]
        )
    )
