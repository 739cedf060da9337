"""RSIAT: SSIAT with a metric loss on the first task, and features held near projected old ones on the others."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers.steering import Projector, pairwise_loss, projected_distance
from cil.learner import Context
from cil.learners.ssiat import SSIAT
from cil.processes import over_step
from cil.stream import Task
from cil.training import Group, Loss, Recipe, check_whole_steps, fit


class RSIAT(SSIAT):
    """RSIAT: representation-steered incremental adapter tuning (Zhao et al., CVPR 2026), on top of SSIAT.

    First task: a metric loss beside CosFace gathers each class and parts the others. Later tasks: features stay near
    P(φ_{t−1}(x)), φ_{t−1} being a frozen copy of the tuner from before the task, and P a residual projector that starts
    as the identity and goes on training from task to task; the projections of new images are kept orthogonal to those
    of old class means. The copy is dropped after the task and P plays no part in predictions.
    """

    class Config(SSIAT.Config):
        epochs: int = Field(20, gt=0, description="passes over each later task")
        alignment_epochs: NonNegativeInt = Field(10, description="passes over drawn vectors; 0: no alignment")
        metric_weight: float = Field(0.5, ge=0, description="λ_RS of the first task's metric loss")
        alpha: float = Field(1.0, ge=0, description="weight of pairs of different classes in it")
        metric_margin: float = Field(
            0.4, ge=-1, le=1, description="cosine above which such a pair counts; -1: all count, as in the paper"
        )
        metric_warmup: NonNegativeInt = Field(7, description="epochs over which λ_RS rises from 0")
        beta: float = Field(1.0, ge=0, description="weight of the distance to the projected old features")
        gamma: float = Field(0.5, ge=0, description="weight of the cosines between projected images and old means")
        code: PositiveInt = Field(256, description="width in the middle of the projector")
        projector_lr: float = Field(0.03, gt=0, description="factor on the learning rate for the projector")

        @model_validator(mode="after")
        def _whole_steps(self) -> Any:
            check_whole_steps(self, "metric_weight")
            return self

    name = "rsiat"
    paper = "Zhao et al., Representation-Steered Incremental Adapter-Tuning, CVPR 2026, pp. 18010-18020"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.projector = Projector(backbone.feature_dim, config.code)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index == 0:
            self.projector.reset(ctx.generator)

    def train_on(self, task: Task, fitted: Loss, groups: list[Group], recipe: Recipe, ctx: Context) -> None:
        if task.index:
            self.steer(task, fitted, groups, recipe, ctx)
        elif self.config.metric_weight:
            self.shape(task, fitted, groups, recipe, ctx)
        else:
            super().train_on(task, fitted, groups, recipe, ctx)

    def shape(self, task: Task, fitted: Loss, groups: list[Group], recipe: Recipe, ctx: Context) -> None:
        """L + λ_RS · min(1, e / E_w) · the metric loss, e the epochs that are over."""
        config, per_epoch, steps = self.config, math.ceil(len(task.train) / recipe.train_batch_size), 0
        pairs = partial(pairwise_loss, alpha=config.alpha, margin=config.metric_margin)

        def stepped() -> None:
            nonlocal steps
            steps += 1

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            features = self.features(images)
            value, logits = fitted(features, labels)
            ramp = min(1.0, (steps // per_epoch) / config.metric_warmup) if config.metric_warmup else 1.0
            metric = over_step(pairs, ctx.accelerator, features.float(), labels)
            return value + config.metric_weight * ramp * metric, logits

        fit(loss, groups, task.train, recipe, ctx, after_step=stepped, together=True)

    def steer(self, task: Task, fitted: Loss, groups: list[Group], recipe: Recipe, ctx: Context) -> None:
        """L + β · MSE(φ_t(x), P(φ_{t−1}(x))) + γ · mean |cos(P(μ_c), P(φ_{t−1}(x)))|; P trains along."""
        config, means = self.config, self.gaussians.means.float()
        snapshot = copy.deepcopy(self.tuner).requires_grad_(False).eval()

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            features = self.features(images)
            value, logits = fitted(features, labels)
            with torch.no_grad():
                old = self.backbone(images, snapshot)
            held = projected_distance(features.float(), old.float(), means, self.projector, config.beta, config.gamma)
            return value + held, logits

        fit(loss, [*groups, Group(self.projector.parameters(), config.projector_lr)], task.train, recipe, ctx)
