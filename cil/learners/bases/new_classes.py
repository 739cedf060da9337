"""The head rows of one task's classes, and the task of each class: shared by learners that train each task apart."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers.heads import Head
from cil.learner import Context, Learner
from cil.stream import Task

H = TypeVar("H", bound=Head)


def task_head(head: H, task: Task, ctx: Context) -> H:
    """An empty ``head`` with one new row per class of the task, on the run's device; column 0 is the first of them.

    Such a head is trained for one task only. It is then dropped, or a head over all classes appends it with ``extend``.
    """
    head.grow(len(task.classes), ctx.generator)
    return head.to(ctx.device)


class TaskOfClass(Learner):
    """A learner that stores the task of each class.

    Attributes:
        task_of: Task index of each class, in order of appearance, int64 [C]; a buffer.
    """

    needs_new_classes = True

    task_of: Tensor

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.register_buffer("task_of", torch.zeros(0, dtype=torch.int64))

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.task_of = torch.cat([self.task_of, self.task_of.new_full((len(task.classes),), task.index)])
