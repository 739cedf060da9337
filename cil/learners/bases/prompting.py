"""The base of L2P, DualPrompt and CODA-Prompt: a query per image, prompts that it selects or weights, one head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.vit import Tuner
from cil.classifiers import LinearHead
from cil.features import Queried, View
from cil.learner import Context, Learner
from cil.stream import Task
from cil.training import Optimizer, ParamGroup, Recipe, Schedule, fit
from cil.training.batches import WithRows
from cil.utils.precision import without_autocast


class PromptRecipe(Recipe):
    optimizer: Optimizer = Field("adam", description="optimiser: SGD with momentum, Adam or AdamW")
    schedule: Schedule = Field("constant", description="learning-rate schedule")
    query: Literal["augmented", "clean"] = Field(
        "augmented",
        description="image whose frozen feature is the query in training: the augmented one, or the clean one, whose "
        "feature is computed once",
    )


class PromptLearner(Learner):
    """Two passes per image: one through the frozen backbone for the query q(x), one with the prompts for that query.

    L = CE(logits of the task's own classes, y) + the regulariser of :meth:`training_tuner`, with a new optimiser per
    task: prompts that a task does not use get neither gradient nor momentum and keep their values (unless there is
    weight decay). The prompts of an image do not depend on the rest of the batch.
    """

    def __init__(self, config: PromptRecipe, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.head = LinearHead(backbone.feature_dim)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.head.grow(len(task.seen), ctx.generator)

    @abstractmethod
    def tuner(self, query: Tensor) -> Tuner:
        """The prompts for queries [B, F], one set per image."""

    @abstractmethod
    def training_tuner(self, query: Tensor) -> tuple[Tuner, Tensor]:
        """The prompts for training on a batch, and the regulariser (mean over the batch) to add to the loss."""

    @abstractmethod
    def trained(self) -> Iterable[nn.Parameter]:
        """The parameters that the current task trains in addition to the head."""

    @abstractmethod
    def usage(self, query: Tensor) -> Tensor:
        """Use of each of M prompts for queries [B, F] at test, [B, M]; for the histogram of a stage."""

    def learn(self, task: Task, ctx: Context) -> None:
        first = task.classes[0]
        clean, _ = ctx.features(self.backbone, task.train)

        def loss(images: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            *clean_query, labels = rest
            tuner, regulariser = self.training_tuner(clean_query[0] if clean_query else self.query(images))
            logits = self.head(self.backbone(images, tuner))
            ce = F.cross_entropy(logits[:, first:], labels - first, label_smoothing=self.config.label_smoothing)
            return ce + regulariser, logits

        data = WithRows(task.train, clean) if self.config.query == "clean" else task.train
        fit(loss, [ParamGroup([*self.trained(), *self.head.parameters()])], data, self.config, ctx)
        with torch.no_grad():
            ctx.histogram("prompts/usage", self.usage(clean).sum(0).tolist())

    def query(self, images: Tensor) -> Tensor:
        """q(x): features of the frozen backbone, [B, 3, H, W] → [B, F], without gradient."""
        with torch.inference_mode():
            query = self.backbone(images).float()
        return query.clone()  # an inference tensor cannot take part in training

    def prompted(self, images: Tensor, query: Tensor) -> Tensor:
        """Features with the prompts for queries [B, F], [B, 3, H, W] → [B, F]."""
        return self.backbone(images, self.tuner(query))

    def views(self) -> Mapping[Hashable, View]:
        """One view that receives the frozen features as queries, so that these are computed once for all stages."""
        return {self.stages: Queried(self.prompted, self.query, self.backbone)}

    def logits(self, features: Tensor) -> Tensor:
        return self.head.logits(features)


@without_autocast()
def similarity(query: Tensor, keys: Tensor) -> Tensor:
    """cos(q_b, K_m) of queries [B, F] and keys [M, F], [B, M]; in float32, since rounding could change the choice."""
    return F.normalize(query.float(), dim=1) @ F.normalize(keys.float(), dim=1).T


@torch.no_grad()
def draw_uniform(parameters: Iterable[Tensor], bound: float, generator: torch.Generator) -> None:
    """Fill tensors with values from U(−bound, bound), drawn on the CPU for any device."""
    for p in parameters:
        p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
