"""One adapter per task on the frozen backbone: shared by EASE, ACMap, TUNA and MOS."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

from pydantic import Field, PositiveInt
from torch import nn

from cil.backbone import Backbone
from cil.classifiers import CosineHead
from cil.features import View
from cil.learner import Context, Learner
from cil.learners.bases.new_classes import TaskOfClass, task_head
from cil.stream import Task
from cil.training import ParamGroup, Recipe, fit, local_cross_entropy
from cil.tuning import Adapter


class AdapterRecipe(Recipe):
    epochs: int = Field(20, gt=0, description="epochs per task")
    train_batch_size: int = Field(48, gt=0, description="images per optimiser step")
    lr: float = Field(0.025, gt=0, description="peak learning rate")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")
    bottleneck: PositiveInt = Field(64, description="width of the adapters in units")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout probability inside the adapters, in training")


def train_apart(learner: Learner, adapter: Adapter, task: Task, ctx: Context) -> None:
    """Train an adapter by CE over the task's own classes, with a temporary cosine head."""
    head = task_head(CosineHead(learner.backbone.feature_dim), task, ctx)
    loss = local_cross_entropy(lambda images: head(learner.backbone(images, adapter)), learner.config, task.classes[0])
    fit(loss, [ParamGroup([*adapter.parameters(), *head.parameters()])], task.train, learner.config, ctx)


class TaskAdapters(TaskOfClass):
    """A learner with one adapter per task, trained on that task only; its features are those of all adapters.

    Adapter t starts from random values, or with ``warm_start`` from the weights of adapter t − 1.

    Attributes:
        adapters: Adapters in order of the tasks.
    """

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.adapters = nn.ModuleList([self.fresh_adapter()])

    @property
    def warm_start(self) -> bool:
        return False

    def fresh_adapter(self) -> Adapter:
        return Adapter(self.backbone, self.config.bottleneck, dropout=self.config.dropout)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        warm = self.warm_start and task.index > 0
        if task.index:
            self.adapters.append(copy.deepcopy(self.adapters[-1]) if warm else self.fresh_adapter().to(ctx.device))
        if not warm:
            newest: Any = self.adapters[-1]
            newest.reset(ctx.generator)

    def views(self) -> Mapping[Hashable, View]:
        return {
            j if self.seen else "not trained yet": partial(self.backbone, tuner=adapter)
            for j, adapter in enumerate(self.adapters)
        }
