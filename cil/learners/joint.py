"""Joint training on all images so far: the upper bound."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from cil.backbone import FROZEN, Backbone
from cil.classifiers.heads import LinearHead
from cil.features import View
from cil.learner import Context
from cil.learners.bases.exemplars import bytes_of_images
from cil.learners.bases.reusing import refuse_reuse
from cil.learners.finetune import Finetune
from cil.stream import Task, TaskData, concatenate
from cil.tuning.weights import WeightTuner


class Joint(Finetune):
    """Upper bound: at every stage, fine-tune from the pre-trained weights on the images of all tasks so far.

    L = CE(f_θ(x) Wᵀ + b, y) over all classes seen and all their images. It is not a continual learner, since it keeps
    all images (``stores_images``). With ``trains: head`` only the head is trained: the joint linear probe.
    """

    class Config(Finetune.Config):
        trains: Literal["all", "head"] = Field("all", description="trained parameters: all weights, or the head only")

        @model_validator(mode="after")
        def _nothing_to_keep(self) -> Any:
            refuse_reuse(self, "joint", "starts from the pre-trained weights at every stage and sees all images")
            return self

    name = "joint"
    summary = "retrained on all images so far at every stage: the upper bound"
    trains = "all weights, or the head"
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
        self.train_on(replace(task, train=concatenate(self.tasks)), 0, ctx)

    @property
    def exemplar_bytes(self) -> int:
        """Size in bytes of all images seen, as uint8 at the backbone's input size."""
        return bytes_of_images(self.backbone, sum(map(len, self.tasks)))

    def views(self) -> Mapping[Hashable, View]:
        return {FROZEN if self.config.trains == "head" else self.stages: self.tuned}
