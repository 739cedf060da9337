"""What L2P, DualPrompt and CODA-Prompt share: a query, prompts it chooses or mixes, a head trained task by task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.batches import WithRows
from cil.classifiers import LinearHead
from cil.features import Queried, View
from cil.learner import Context, Learner
from cil.precision import without_autocast
from cil.stream import Task
from cil.training import Group, Optimizer, Recipe, Schedule, fit
from cil.vit import Tuner


class PromptRecipe(Recipe):
    optimizer: Optimizer = Field("adam", description="SGD with momentum, Adam or AdamW")
    schedule: Schedule = Field("constant", description="of the learning rate")
    query: Literal["augmented", "clean"] = Field(
        "augmented",
        description="what chooses the prompts in training: the frozen feature of the augmented image, or that of the "
        "image as it is, which is computed once",
    )


class PromptLearner(Learner):
    """Every image passes through the frozen backbone for its query q(x), and with the prompts q(x) asks for.

    L = CE(logits of the task's own classes, y) + :meth:`training_tuner`'s regulariser, with an optimiser of its own for
    every task: what a task does not use gets no gradient, has no momentum from earlier, and stays as it was (with
    weight decay it would not). Prompts are chosen for each image by itself, whatever else is in the batch.
    """

    def __init__(self, config: PromptRecipe, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.head = LinearHead(backbone.feature_dim)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.head.grow(len(task.seen), ctx.generator)

    @abstractmethod
    def tuner(self, query: Tensor) -> Tuner:
        """The prompts that queries [B, F] ask for, one set an image."""

    @abstractmethod
    def training_tuner(self, query: Tensor) -> tuple[Tuner, Tensor]:
        """The prompts a batch is trained with, and the regulariser (mean over the batch) to add to the loss."""

    @abstractmethod
    def trained(self) -> Iterable[nn.Parameter]:
        """What the current task trains beside the head."""

    @abstractmethod
    def usage(self, query: Tensor) -> Tensor:
        """How much each of M prompts is used for queries [B, F] at test, [B, M]; for the histogram of a stage."""

    def learn(self, task: Task, ctx: Context) -> None:
        first = task.classes[0]
        clean, _ = ctx.features(self.backbone, task.train)

        def loss(images: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            *given, labels = rest
            tuner, regulariser = self.training_tuner(given[0] if given else self.query(images))
            logits = self.head(self.backbone(images, tuner))
            ce = F.cross_entropy(logits[:, first:], labels - first, label_smoothing=self.config.label_smoothing)
            return ce + regulariser, logits

        data = WithRows(task.train, clean) if self.config.query == "clean" else task.train
        fit(loss, [Group([*self.trained(), *self.head.parameters()])], data, self.config, ctx)
        with torch.no_grad():
            ctx.histogram("prompts/usage", self.usage(clean).sum(0).tolist())

    def query(self, images: Tensor) -> Tensor:
        """q(x): features of the frozen backbone, [B, 3, H, W] → [B, F], without gradient."""
        with torch.inference_mode():
            query = self.backbone(images).float()
        return query.clone()  # an inference tensor itself could not take part in training

    def features(self, images: Tensor) -> Tensor:
        return self.prompted(images, self.query(images))

    def prompted(self, images: Tensor, query: Tensor) -> Tensor:
        """Features with the prompts that queries [B, F] ask for, [B, 3, H, W] → [B, F]."""
        return self.backbone(images, self.tuner(query))

    def views(self) -> Mapping[Hashable, View]:
        """One view, whose queries are the frozen features: they pass once, however often the prompts change."""
        if not self._sees_as(PromptLearner):
            return super().views()
        return {self.feature_version: Queried(self.prompted, self.query, self.backbone)}

    def logits(self, features: Tensor) -> Tensor:
        return self.head.logits(features)

    @property
    def feature_version(self) -> Hashable:
        return self.stages


@without_autocast()
def similarity(query: Tensor, keys: Tensor) -> Tensor:
    """cos(q_b, K_m) of queries [B, F] and keys [M, F], [B, M]; in float32, or rounding would choose the prompts."""
    return F.normalize(query.float(), dim=1) @ F.normalize(keys.float(), dim=1).T


@torch.no_grad()
def draw_uniform(parameters: Iterable[Tensor], bound: float, generator: torch.Generator) -> None:
    """Fill tensors from U(−bound, bound), on the CPU, whatever device they are on."""
    for p in parameters:
        p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
