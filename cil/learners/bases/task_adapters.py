"""One adapter per task on the frozen backbone: shared by EASE, TUNA and MOS."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

from torch import nn

from cil.backbone import Backbone
from cil.features import View
from cil.learner import Context
from cil.learners.bases.new_classes import TaskOfClass
from cil.stream import Task
from cil.tuning import Adapter


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
