"""MOS: adapters merged while they train, and a choice of adapter that corrects itself."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cil.backbone import FROZEN, Backbone
from cil.classifiers import NCM, LinearHead
from cil.features import View
from cil.learner import Context
from cil.learners.bank import AdapterBank, BankRecipe, chosen
from cil.precision import without_autocast
from cil.processes import over_step
from cil.stream import Task
from cil.training import check_whole_steps, local_cross_entropy


class MOS(AdapterBank):
    """MOS: model surgery (Sun et al., arXiv 2412.09441).

    Adapter t: L = CE over the task's own classes + ρ · :func:`contrast`; after every step from the second task on
    θ_t ← (1 − α) θ_t + α · mean_{i<t} θ_i. Which adapter an image takes, it finds by itself: first the task of the
    nearest prototype of the frozen backbone, then again and again the task of the class that the head predicts through
    the adapter found last. t + 1 passes.
    """

    class Config(BankRecipe):
        epochs: int = Field(20, gt=0, description="passes over each task")
        train_batch_size: int = Field(48, gt=0, description="images an optimiser step")
        lr: float = Field(0.03, gt=0, description="peak learning rate")
        head_lr: float = Field(0.1, gt=0, description="factor on the learning rate for the head's new rows")
        alpha: float = Field(0.1, ge=0, lt=1, description="share of the older adapters' mean after every step")
        contrast: float = Field(0.1, ge=0, description="ρ of the contrastive term")
        temperature: float = Field(0.8, gt=0, description="of the contrastive term")
        rounds: PositiveInt = Field(4, description="predictions an image may take until its adapter stays the same")
        ensemble: bool = Field(True, description="add the softmax of the frozen backbone's prototypes")

        @model_validator(mode="after")
        def _whole_steps(self) -> Any:
            check_whole_steps(self, "contrast")
            return self

    name = "mos"
    paper = "Sun et al., MOS: Model Surgery for PTM-based Class-Incremental Learning, AAAI 2025, arXiv 2412.09441"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone, LinearHead(backbone.feature_dim))
        self.prototypes = NCM(backbone.feature_dim)

    def learn(self, task: Task, ctx: Context) -> None:
        config, (*old, new) = self.config, self.adapters
        rows, means = self.new_rows(task, ctx), self.gaussians.means.float()
        seen: list[Tensor] = []

        def logits_of(images: Tensor) -> Tensor:
            seen[:] = [self.backbone(images, new)]
            return rows(seen[0])

        own_classes = local_cross_entropy(logits_of, config, task.classes[0])
        apart = partial(contrast, means, temperature=config.temperature)

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            value, logits = own_classes(images, labels)
            if config.contrast:
                value = value + config.contrast * over_step(apart, ctx.accelerator, seen.pop().float())
            return value, logits

        average = get_ema_multi_avg_fn(1 - config.alpha)
        trained = [*new.parameters()]
        target = [torch.stack(weights).mean(0) for weights in zip(*(a.parameters() for a in old), strict=True)]
        merge = (lambda: average(trained, target, None)) if old else None
        self.acquire(task, ctx, loss, rows, merge, together=config.contrast > 0)
        self.prototypes.partial_fit(*ctx.features(self.backbone, task.train))

    def last_view(self) -> Mapping[Hashable, View]:
        return {FROZEN: self.backbone}

    @without_autocast()
    def route(self, features: Tensor) -> Tensor:
        """The adapter of the last prediction an image takes. A choice that stays the same once stays so for good, so
        going through all rounds is stopping at it."""
        views = self.split(features)
        found = self.task_of[self.scores_by_view(views[:, :-1]).argmax(2)]  # [B, T]: where each adapter leads
        task = self.task_of[self.prototypes.logits(views[:, -1]).argmax(1)]
        for _ in range(self.config.rounds - 1):
            task = found.gather(1, task[:, None])[:, 0]
        return task

    @without_autocast()
    def routed_logits(self, features: Tensor, tasks: Tensor) -> Tensor:
        """Logits through the given adapter; with ``ensemble`` softmax(these) + softmax(t · cos to the prototypes)."""
        views = self.split(features)
        logits = chosen(self.scores_by_view(views[:, :-1]), tasks)
        if not self.config.ensemble:
            return logits
        frozen = len(self.adapters) * self.prototypes.logits(views[:, -1])
        return logits.softmax(dim=1) + frozen.softmax(dim=1)


@without_autocast()
def contrast(means: Tensor, features: Tensor, temperature: float) -> Tensor:
    """CE of M Mᵀ / τ against the identity, M = the class means so far [C, F] above the batch's features [B, F]: every
    row should resemble itself more than any other, be it an old class or an image of its own class."""
    rows = torch.cat([means, features.float()])
    return F.cross_entropy(rows @ rows.T / temperature, torch.arange(len(rows), device=rows.device))
