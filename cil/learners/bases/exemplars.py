"""Old images that a learner keeps: chosen by herding, in equal numbers per class, within a budget."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from cil.backbone import Backbone
from cil.learner import Context, Learner
from cil.stream import Task, TaskData, concatenate


class KeepsExemplars(Learner):
    """A learner that keeps at most ``config.memory`` images in all: ⌊memory ÷ classes seen⌋ of each class.

    The state has the exemplars' places, and their images are read again, as the runner leaves past tasks open to a
    learner with ``stores_images``.

    Buffers:
        exemplars: int64 [E, 3]: class, task, and position in the task, the images of a class in the order of herding.
    """

    stores_images = True
    needs_new_classes = True
    exemplars: Tensor

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tasks: list[TaskData] = []
        self.register_buffer("exemplars", torch.zeros(0, 3, dtype=torch.int64))

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.tasks.append(task.train)

    def kept(self) -> list[TaskData]:
        """The exemplars of each task that has some."""
        found = []
        for index, data in enumerate(self.tasks):
            rows = self.exemplars[self.exemplars[:, 1] == index][:, 2].cpu().numpy()
            if len(rows):
                images, positions = data.source
                found.append(TaskData(images, positions[rows], data.labels[rows]))
        return found

    def with_exemplars(self, task: Task) -> TaskData:
        """The task's images and all exemplars."""
        return concatenate([task.train, *self.kept()])

    def keep(self, features: Tensor, labels: Tensor, task: Task) -> None:
        """Choose exemplars of the task's classes by herding, and drop as many of old ones as the budget asks for.

        Args:
            features: What herding compares, [N, d], of the task's images in their order.
            labels: Their labels.
            task: The task.
        """
        share = self.config.memory // len(task.seen)
        rows = [self.exemplars[self.exemplars[:, 0] == c][:share] for c in range(task.classes[0])]
        for c in task.classes:
            own = (labels == c).nonzero().flatten()
            chosen = own[herding(features[own], share)]
            places = (torch.full_like(chosen, c), torch.full_like(chosen, task.index), chosen)
            rows.append(torch.stack(places, dim=1))
        self.exemplars = torch.cat(rows).to(self.exemplars)

    @property
    def exemplar_bytes(self) -> int:
        """Size in bytes of the exemplars, as uint8 at the backbone's input size."""
        return bytes_of_images(self.backbone, len(self.exemplars))


def bytes_of_images(backbone: Backbone, count: int) -> int:
    """Size in bytes of ``count`` images as uint8 at the backbone's input size."""
    return count * prod(backbone.data_config["input_size"]) * torch.uint8.itemsize


def herding(features: Tensor, count: int) -> Tensor:
    """Which rows to keep, in an order in which every beginning has a mean close to that of all (iCaRL, 1611.07725).

    The k-th choice minimises ‖μ − (x_i + Σ_{j<k} x_{i_j}) / k‖ over the rows that are left; of equals the first one is
    taken.

    Args:
        features: x, [N, d], usually of length 1.
        count: Number of rows to choose, at least 0; all N if there are fewer.

    Returns:
        Positions of the rows, int64 [min(count, N)], on the features' device.
    """
    x = features.double()
    mean, total, free = x.mean(0), x.new_zeros(x.shape[1]), torch.ones(len(x), dtype=torch.bool, device=x.device)
    chosen: list[int] = []
    for k in range(1, min(count, len(x)) + 1):
        distances = (mean - (total + x) / k).square().sum(1).masked_fill(~free, torch.inf)
        chosen.append(int(distances.argmin()))
        total, free[chosen[-1]] = total + x[chosen[-1]], False
    return torch.tensor(chosen, dtype=torch.int64, device=features.device)
