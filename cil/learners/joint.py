"""Joint training on everything seen so far: the ceiling."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from cil.backbone import FROZEN, Backbone
from cil.classifiers.heads import LinearHead
from cil.learner import Context
from cil.learners.finetune import Finetune
from cil.stream import Task, TaskData, concatenate
from cil.tuning.weights import WeightTuner


class Joint(Finetune):
    """Upper bound: at every stage, fine-tune the pre-trained weights anew on the images of all tasks so far.

    L = CE(f_θ(x) Wᵀ + b, y) over all seen classes and all their images. Not a continual learner: it keeps every image
    (``stores_images``). With ``trains: head`` only the head is trained, the joint linear probe.
    """

    class Config(Finetune.Config):
        trains: Literal["all", "head"] = Field("all", description="all weights, or the head alone")

    name = "joint"
    stores_images = True

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tasks: list[TaskData] = []

    def begin(self, task: Task, ctx: Context) -> None:
        self.tuner = WeightTuner(self.backbone, lambda name: self.config.trains == "all")
        self.head = LinearHead(self.backbone.feature_dim).to(ctx.device)
        self.tasks.append(task.train)
        super().begin(task, ctx)

    def learn(self, task: Task, ctx: Context) -> None:
        self.train_on(concatenate(self.tasks), 0, ctx)

    @property
    def exemplar_bytes(self) -> int:
        """All images seen, as uint8 at the backbone's input size."""
        size = self.backbone.data_config["input_size"]
        return sum(map(len, self.tasks)) * int(np.prod(size)) * torch.uint8.itemsize

    @property
    def feature_version(self) -> Hashable:
        return FROZEN if self.config.trains == "head" else self.stages
