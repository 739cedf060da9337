"""MOS: one adapter per task, merged with earlier ones while training; an image's adapter is chosen by iteration."""

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
from cil.learners.bases.adapter_bank import AdapterBank, BankRecipe, select_adapter
from cil.learners.bases.new_classes import task_head
from cil.stream import Task
from cil.training import check_whole_steps, local_cross_entropy
from cil.training.processes import across_processes
from cil.utils.precision import without_autocast


class MOS(AdapterBank):
    """MOS: model surgery (Sun et al., arXiv 2412.09441).

    Adapter t: L = CE over the task's own classes + ρ · :func:`contrast`; after every step from the second task on
    θ_t ← (1 − α) θ_t + α · mean_{i<t} θ_i. The adapter of an image is found by iteration: the first is that of the
    nearest class prototype of the frozen backbone, each next one that of the class which the head predicts with the
    current adapter. Keeps all adapters, the head, one Gaussian and one prototype per class. t + 1 passes per image.
    """

    class Config(BankRecipe):
        epochs: int = Field(20, gt=0, description="epochs per task")
        train_batch_size: int = Field(48, gt=0, description="images per optimiser step")
        lr: float = Field(0.03, gt=0, description="peak learning rate")
        head_lr_factor: float = Field(0.1, gt=0, description="factor on the learning rate for the head's new rows")
        alpha: float = Field(
            0.1, ge=0, lt=1, description="weight α in [0, 1) of the older adapters' mean after each step"
        )
        contrast: float = Field(0.1, ge=0, description="weight ρ ≥ 0 of the contrastive term")
        temperature: float = Field(0.8, gt=0, description="temperature > 0 of the contrastive term")
        rounds: PositiveInt = Field(
            4, description="iterations of the adapter choice, the first one by prototypes included"
        )
        ensemble: bool = Field(
            True, description="whether to add the softmax of the frozen backbone's prototypes to the scores"
        )

        @model_validator(mode="after")
        def _whole_steps(self) -> Any:
            check_whole_steps(self, "contrast")
            return self

    name = "mos"
    summary = "merges each adapter with earlier ones, chooses one per image iteratively"
    trains = "one adapter per task, head"
    paper = "Sun et al., MOS: Model Surgery for PTM-based Class-Incremental Learning, AAAI 2025, arXiv 2412.09441"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone, LinearHead(backbone.feature_dim))
        self.prototypes = NCM(backbone.feature_dim)

    def learn(self, task: Task, ctx: Context) -> None:
        config, (*old, new) = self.config, self.adapters
        rows, means = task_head(LinearHead(self.backbone.feature_dim), task, ctx), self.gaussians.means.float()
        latest: list[Tensor] = []  # the features of the current batch

        def logits_of(images: Tensor) -> Tensor:
            latest[:] = [self.backbone(images, new)]
            return rows(latest[0])

        own_classes = local_cross_entropy(logits_of, config, task.classes[0])
        contrastive = partial(contrast, means, temperature=config.temperature)

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            value, logits = own_classes(images, labels)
            if config.contrast:
                value = value + config.contrast * across_processes(contrastive, ctx.accelerator, latest.pop().float())
            return value, logits

        average = get_ema_multi_avg_fn(1 - config.alpha)
        trained = [*new.parameters()]
        target = [torch.stack(weights).mean(0) for weights in zip(*(a.parameters() for a in old), strict=True)]
        merge = (lambda: average(trained, target, None)) if old else None
        self.acquire(task, ctx, loss, rows, merge, batch_loss=config.contrast > 0)
        self.prototypes.partial_fit(*ctx.features(self.backbone, task.train))

    def last_view(self) -> Mapping[Hashable, View]:
        return {FROZEN: self.backbone}

    @without_autocast()
    def route(self, features: Tensor) -> Tensor:
        """Index of each image's adapter after all rounds. An adapter that leads to itself is final, so running the
        remaining rounds gives the same result as stopping there."""
        views = self.split(features)
        predicted_task = self.task_of[self.scores_by_view(views[:, :-1]).argmax(2)]  # [B, T], with each adapter
        task = self.task_of[self.prototypes.logits(views[:, -1]).argmax(1)]
        for _ in range(self.config.rounds - 1):
            task = predicted_task.gather(1, task[:, None])[:, 0]
        return task

    @without_autocast()
    def routed_logits(self, features: Tensor, tasks: Tensor) -> Tensor:
        """Logits z with the adapters of ``tasks``; with ``ensemble`` softmax(z) + softmax(t · cos to prototypes)."""
        views = self.split(features)
        logits = select_adapter(self.scores_by_view(views[:, :-1]), tasks)
        if not self.config.ensemble:
            return logits
        frozen = len(self.adapters) * self.prototypes.logits(views[:, -1])
        return logits.softmax(dim=1) + frozen.softmax(dim=1)


@without_autocast()
def contrast(means: Tensor, features: Tensor, temperature: float) -> Tensor:
    """CE of M Mᵀ / τ against the identity, M being class means so far [C, F] above the batch's features [B, F].

    It pushes each feature away from all old class means and from all other images of the batch, its own class included.
    """
    rows = torch.cat([means, features.float()])
    return F.cross_entropy(rows @ rows.T / temperature, torch.arange(len(rows), device=rows.device))
