"""The base of L2P, DualPrompt and CODA-Prompt: a query per image, prompts that it selects or weights, one head."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
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
        """Use of each of M prompts for queries [B, F] at test, [B, M]; for the histogram of a stage.

        The histogram sums it over the last epoch's training queries, with the keys of their step. So it costs no pass
        through the backbone, and an image counts as it was augmented.
        """

    def learn(self, task: Task, ctx: Context) -> None:
        first = task.classes[0]
        last_epoch = math.ceil(len(task.train) / self.config.train_batch_size) * (self.config.epochs - 1)  # first step
        used = _Usage(self.usage, torch.zeros(0, self.backbone.feature_dim, device=ctx.device), last_epoch)

        def loss(images: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            *clean, labels = rest
            query = clean[0] if clean else self.query(images)
            used.count(query)
            tuner, regulariser = self.training_tuner(query)
            logits = self.head(self.backbone(images, tuner))
            ce = F.cross_entropy(logits[:, first:], labels - first, label_smoothing=self.config.label_smoothing)
            return ce + regulariser, logits

        clean = self.config.query == "clean"
        data = WithRows(task.train, ctx.features(self.backbone, task.train)[0]) if clean else task.train
        trained = [ParamGroup([*self.trained(), *self.head.parameters()])]
        fit(loss, trained, data, self.config, ctx, after_step=used.next_step)
        ctx.histogram("prompts/usage", ctx.accelerator.reduce(used.counts, "sum").tolist())

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


class _Usage:
    """The sum of a learner's usage over the training queries of the last epoch.

    Args:
        usage: Queries [B, F] → use of each prompt [B, M].
        nothing: No query, [0, F], on the device.
        start: Number of the last epoch's first step.
    """

    def __init__(self, usage: Callable[[Tensor], Tensor], nothing: Tensor, start: int) -> None:
        self.usage, self.start, self.step = usage, start, 0
        self.counts = usage(nothing).detach().float().sum(0)

    @torch.no_grad()
    def count(self, query: Tensor) -> None:
        """Add the queries of a step, or of a part of it, if it is one of the last epoch."""
        if self.step >= self.start:
            self.counts += self.usage(query).float().sum(0)

    def next_step(self) -> None:
        self.step += 1


@without_autocast()
def similarity(query: Tensor, keys: Tensor) -> Tensor:
    """cos(q_b, K_m) of queries [B, F] and keys [M, F], [B, M]; in float32, since rounding could change the choice."""
    return F.normalize(query.float(), dim=1) @ F.normalize(keys.float(), dim=1).T


@torch.no_grad()
def draw_uniform(parameters: Iterable[Tensor], bound: float, generator: torch.Generator) -> None:
    """Fill tensors with values from U(−bound, bound), drawn on the CPU for any device."""
    for p in parameters:
        p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
