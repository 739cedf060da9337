"""Training data in batches: a task's images, images with an extra row each, or features in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cil.stream import TaskData


class Batches(Protocol):
    """Training data that can be passed over many times, in batches of (*inputs, labels).

    ``TaskData``, :class:`TensorData` and :class:`WithRows` implement it.
    """

    def __len__(self) -> int: ...

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None,
        augment: bool,
        device: torch.device | str,
        part: tuple[int, int],
    ) -> Iterator[tuple[Tensor, ...]]: ...


class TensorData:
    """Features and labels in memory as training data."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``TaskData.batches``; features have no training transform, so ``augment`` changes nothing."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for chunk in order.split(batch_size):
            chunk = chunk[part[0] :: part[1]].to(self.labels.device)
            yield self.inputs[chunk].to(device), self.labels[chunk].to(device)


class WithRows:
    """A task's images, each with a row of a tensor: batches of (images, rows, labels).

    Args:
        data: The images.
        rows: One row for each of them, in the task's own order, [N, ...].
    """

    def __init__(self, data: TaskData, rows: Tensor) -> None:
        self.data, self.rows = data, rows

    @property
    def repeated_bytes(self) -> float:
        return self.data.repeated_bytes

    def __len__(self) -> int:
        return len(self.data)

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As ``TaskData.batches``; rows stay with their images in any order."""
        images, indices = self.data.source
        labels = torch.from_numpy(self.data.labels).to(device)
        positions = np.arange(len(self))  # they take the labels' place, and say which row belongs to which image
        for pixels, rows in images.batches(
            indices, positions, batch_size, generator=generator, augment=augment, device=device, part=part
        ):
            yield pixels, self.rows[rows.to(self.rows.device)].to(device), labels[rows]
