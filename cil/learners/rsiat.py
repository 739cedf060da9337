"""RSIAT: SSIAT with a metric loss on the first task and a penalty on feature drift in later ones."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from cil.backbone import Backbone
from cil.learner import Context
from cil.learners.bases.reusing import refuse_reuse
from cil.learners.bases.steering import Projector, pairwise_loss, projected_distance
from cil.learners.ssiat import SSIAT
from cil.stream import Task
from cil.training import Loss, ParamGroup, Recipe, check_whole_steps, fit
from cil.training.processes import across_processes


class RSIAT(SSIAT):
    """RSIAT: representation-steered incremental adapter tuning (Zhao et al., CVPR 2026), on top of SSIAT.

    First task: CosFace plus a metric loss (:func:`~cil.learners.bases.steering.pairwise_loss`) that pulls images of one
    class together and pushes classes apart. Later tasks: CosFace plus a penalty that keeps φ_t(x) near P(φ_{t−1}(x))
    and the projections of new images orthogonal to those of old class means
    (:func:`~cil.learners.bases.steering.projected_distance`). φ_{t−1} uses a frozen copy of the tuner from before the
    task, which is dropped afterwards. P is a residual projector that starts as the identity and is trained further on
    every task; predictions do not use it.
    """

    class Config(SSIAT.Config):
        epochs: int = Field(20, gt=0, description="epochs per task after the first")
        alignment_epochs: NonNegativeInt = Field(10, description="epochs of the alignment; 0: no alignment")
        metric_weight: float = Field(0.5, ge=0, description="weight λ_RS ≥ 0 of the first task's metric loss")
        alpha: float = Field(1.0, ge=0, description="weight α ≥ 0 of pairs of different classes in the metric loss")
        metric_margin: float = Field(
            0.4,
            ge=-1,
            le=1,
            description="cosine above which pairs of different classes count; -1: all, as in the paper",
        )
        metric_warmup: NonNegativeInt = Field(7, description="epochs over which λ_RS rises from 0")
        beta: float = Field(1.0, ge=0, description="weight β ≥ 0 of the distance to the projected old features")
        gamma: float = Field(
            0.5, ge=0, description="weight γ ≥ 0 of the cosines between projected images and old means"
        )
        code: PositiveInt = Field(256, description="width of the projector's middle layer")
        projector_lr_factor: float = Field(0.03, gt=0, description="factor on the learning rate for the projector")

        @model_validator(mode="after")
        def _whole_steps(self) -> Any:
            check_whole_steps(self, "metric_weight")
            refuse_reuse(self, "rsiat", "has its own terms against drift")
            return self

    name = "rsiat"
    summary = "SSIAT with losses that limit feature drift"
    trains = "one tuner, projector, head"
    paper = "Zhao et al., Representation-Steered Incremental Adapter-Tuning, CVPR 2026, pp. 18010-18020"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.projector = Projector(self.head.feature_dim, config.code)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index == 0:
            self.projector.reset(ctx.generator)

    def train_on(self, task: Task, cosface_loss: Loss, groups: list[ParamGroup], recipe: Recipe, ctx: Context) -> None:
        if task.index:
            self.steer(task, cosface_loss, groups, recipe, ctx)
        elif self.config.metric_weight:
            self.shape(task, cosface_loss, groups, recipe, ctx)
        else:
            super().train_on(task, cosface_loss, groups, recipe, ctx)

    def shape(self, task: Task, cosface_loss: Loss, groups: list[ParamGroup], recipe: Recipe, ctx: Context) -> None:
        """Minimise L + λ_RS · min(1, e / E_w) · the metric loss, e the number of finished epochs."""
        config, per_epoch, steps = self.config, math.ceil(len(task.train) / recipe.train_batch_size), 0
        pairs = partial(pairwise_loss, alpha=config.alpha, margin=config.metric_margin)

        def count_step() -> None:
            nonlocal steps
            steps += 1

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            features = self.tuned(images)
            value, logits = cosface_loss(features, labels)
            ramp = min(1.0, (steps // per_epoch) / config.metric_warmup) if config.metric_warmup else 1.0
            metric = across_processes(pairs, ctx.accelerator, features.float(), labels)
            return value + config.metric_weight * ramp * metric, logits

        fit(loss, groups, task.train, recipe, ctx, after_step=count_step, batch_loss=True)

    def steer(self, task: Task, cosface_loss: Loss, groups: list[ParamGroup], recipe: Recipe, ctx: Context) -> None:
        """Minimise L + β · MSE(φ_t(x), P(φ_{t−1}(x))) + γ · mean |cos(P(μ_c), P(φ_{t−1}(x)))|; P is trained, too."""
        config, means = self.config, self.gaussians.means.float()
        snapshot = copy.deepcopy(self.tuner).requires_grad_(False).eval()

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            features = self.tuned(images)
            value, logits = cosface_loss(features, labels)
            with torch.no_grad():
                old = self.backbone(images, snapshot)
            drift = projected_distance(features.float(), old.float(), means, self.projector, config.beta, config.gamma)
            return value + drift, logits

        fit(
            loss,
            [*groups, ParamGroup(self.projector.parameters(), config.projector_lr_factor)],
            task.train,
            recipe,
            ctx,
        )
