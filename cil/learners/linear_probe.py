"""A linear head trained on one task after another, on frozen features."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers.heads import LinearHead
from cil.learner import Context
from cil.learners.bases.on_features import OnFeatures
from cil.stream import Task
from cil.training import ParamGroup, Recipe, Softmax, cross_entropy, fit
from cil.training.batches import TensorData


class LinearProbe(OnFeatures):
    """Sequential linear probe: features are frozen; the head is trained on each task in turn.

    L(W, b) = CE(f Wᵀ + b, y) over the current task's features. With ``loss: global`` the softmax runs over all classes
    seen, and the head forgets although the features do not change: old rows only receive negatives. With
    ``loss: local`` it runs over the task's own classes, so old rows do not change.
    Trains and keeps F + 1 numbers per class. One forward pass per image.
    """

    class Config(OnFeatures.Config, Recipe):
        epochs: int = Field(20, gt=0, description="epochs per task, over its features")
        lr: float = Field(0.1, gt=0, description="peak learning rate")
        loss: Softmax = Field("global", description="classes in the softmax: all classes seen, or the task's own")

    name = "linear_probe"
    summary = "linear head on frozen features, trained on each task in turn"
    trains = "head"
    paper = "baseline"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.head = LinearHead(self.width)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.head.grow(len(task.seen), ctx.generator)

    def learn(self, task: Task, ctx: Context) -> None:
        first = task.classes[0] if self.config.loss == "local" else 0
        data = TensorData(*self.training_features(task, ctx))
        fit(cross_entropy(self.head, self.config, first), [ParamGroup(self.head.parameters())], data, self.config, ctx)

    def logits(self, features: Tensor) -> Tensor:
        return self.head(self.scaled(features))
