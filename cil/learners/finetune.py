"""Naive fine-tuning of all weights: the lower bound."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers.heads import LinearHead
from cil.learner import Context
from cil.learners.bases.reusing import ReuseRecipe, ReusingTuning
from cil.stream import Task
from cil.training import Optimizer, ParamGroup, Softmax, cross_entropy
from cil.tuning.weights import WeightTuner


class Finetune(ReusingTuning):
    """Sequential fine-tuning of all backbone weights θ and a linear head that grows with the classes: a lower bound.

    L = CE(f_θ(x) Wᵀ + b, y) over the current task's images; θ and W start from their values after the previous task.
    With ``loss: global`` the softmax runs over all classes seen, the naive baseline. With ``loss: local`` it runs over
    the task's own classes; several toolboxes call this fine-tuning, and it reaches a far higher accuracy, so a report
    should name the variant. Keeps nothing but the weights. One forward pass per image and stage. With ``anchor``,
    ``distill`` or ``bss`` it is held to what it was before, see :class:`cil.learners.bases.reusing.ReuseRecipe`.
    """

    class Config(ReuseRecipe):
        optimizer: Optimizer = Field("adamw", description="optimiser: SGD with momentum, Adam or AdamW")
        lr: float = Field(3e-4, gt=0, description="peak learning rate of backbone and head")
        warmup: float = Field(
            0.1, ge=0, lt=1, description="fraction of the steps in [0, 1) with a linearly rising rate"
        )
        loss: Softmax = Field("global", description="classes in the softmax: all classes seen, or the task's own")

    name = "finetune"
    summary = "all weights, trained on each task in turn: the lower bound"
    trains = "all weights, head"
    paper = "baseline"
    trains_backbone = True

    tuner: WeightTuner

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tuner = WeightTuner(backbone)
        self.anchor_to(self.tuner)
        self.head = LinearHead(backbone.feature_dim)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.head.grow(len(task.seen), ctx.generator)

    def learn(self, task: Task, ctx: Context) -> None:
        self.train_on(task, task.classes[0] if self.config.loss == "local" else 0, ctx)

    def train_on(self, task: Task, first: int, ctx: Context) -> None:
        """Fit backbone and head on a task's images with a softmax over the classes from ``first`` on."""
        loss = cross_entropy(self.logits, self.config, first)
        groups = [ParamGroup(self.tuner.parameters()), ParamGroup(self.head.parameters())]
        self.fit_tuner(loss, groups, task, self.config, ctx)

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features)
