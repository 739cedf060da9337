"""Naive fine-tuning of every weight: the floor."""

from __future__ import annotations

from collections.abc import Hashable

from pydantic import Field
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers.heads import LinearHead
from cil.learner import Context, Learner
from cil.stream import Task, TaskData
from cil.training import Group, Optimizer, Recipe, Softmax, cross_entropy, fit
from cil.tuning.weights import WeightTuner


class Finetune(Learner):
    """Sequential fine-tuning of the whole backbone and a growing linear head: what forgetting looks like.

    L = CE(f_θ(x) Wᵀ + b, y) over the current task's images, θ and W going on from the last task's. ``loss: global``
    (all classes seen) is the naive baseline; ``loss: local`` (the task's classes only) is what several toolboxes call
    fine-tuning, and ends far higher: say which one is meant. One forward pass per image and stage.
    """

    class Config(Recipe):
        optimizer: Optimizer = Field("adamw", description="SGD with momentum, Adam or AdamW")
        lr: float = Field(3e-4, gt=0, description="peak learning rate, of backbone and head")
        warmup: float = Field(0.1, ge=0, lt=1, description="fraction of the steps with a linearly rising rate")
        loss: Softmax = Field("global", description="classes in the softmax: all seen, or the task's")

    name = "finetune"
    paper = "baseline"
    trains_backbone = True

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tuner = WeightTuner(backbone)
        self.head = LinearHead(backbone.feature_dim)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.head.grow(len(task.seen), ctx.generator)

    def learn(self, task: Task, ctx: Context) -> None:
        self.train_on(task.train, task.classes[0] if self.config.loss == "local" else 0, ctx)

    def train_on(self, data: TaskData, first: int, ctx: Context) -> None:
        """Fit backbone and head on ``data`` with a softmax over the classes from ``first`` on."""
        loss = cross_entropy(lambda images: self.logits(self.features(images)), self.config, first)
        fit(loss, [Group(self.tuner.parameters()), Group(self.head.parameters())], data, self.config, ctx)

    def features(self, images: Tensor) -> Tensor:
        return self.backbone(images, self.tuner)

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features)

    @property
    def feature_version(self) -> Hashable:
        return self.stages
