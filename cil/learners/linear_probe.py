"""A linear head trained task after task on frozen features."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from cil.backbone import Backbone
from cil.batches import TensorData
from cil.classifiers.heads import LinearHead
from cil.learner import Context, Learner
from cil.stream import Task
from cil.training import Group, Recipe, Softmax, cross_entropy, fit


class LinearProbe(Learner):
    """Sequential linear probe: the eyes are frozen, the head is fine-tuned on every task in turn.

    L(W, b) = CE(f Wᵀ + b, y) over the current task's features. With ``loss: global`` the cross-entropy runs over all
    classes seen, and the head forgets although the features cannot: new rows grow while old rows only ever see
    negatives. With ``loss: local`` it runs over the task's own classes, so old rows are left alone.
    One forward pass per image; trains F + 1 numbers a class.
    """

    class Config(Recipe):
        epochs: int = Field(20, gt=0, description="passes over the task's features")
        lr: float = Field(0.1, gt=0, description="peak learning rate")
        loss: Softmax = Field("global", description="classes in the softmax: all seen, or the task's")

    name = "linear_probe"
    paper = "baseline"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.head = LinearHead(backbone.feature_dim)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.head.grow(len(task.seen), ctx.generator)

    def learn(self, task: Task, ctx: Context) -> None:
        first = task.classes[0] if self.config.loss == "local" else 0
        data = TensorData(*ctx.features(self, task.train))
        fit(cross_entropy(self.head, self.config, first), [Group(self.head.parameters())], data, self.config, ctx)

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features)
