"""SLCA: a slow backbone, local heads, and a classifier aligned on Gaussians."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers import Gaussians, LinearHead, mean_scales, normalized_cross_entropy
from cil.learner import Context, Learner
from cil.learners.aligning import AlignedRecipe, align
from cil.stream import Task
from cil.training import Group, Schedule, fit, local_cross_entropy
from cil.tuning import WeightTuner


class SLCA(Learner):
    """SLCA: slow learner with classifier alignment (Zhang et al., arXiv 2303.05118).

    Stage 1: L = CE over the task's own classes; all backbone weights go on training, 100× slower than the new head
    rows, and old rows stay. Then one Gaussian N(μ_c, Σ_c) per new class, from the backbone as it is now; old ones are
    not refreshed. Stage 2, from the second task on: all rows are re-balanced on vectors drawn from all Gaussians, with
    the logits divided by their mean norm over tasks. The aligned rows predict; training goes on from the others.
    """

    class Config(AlignedRecipe):
        epochs: int = Field(20, gt=0, description="passes over each task")
        train_batch_size: int = Field(128, gt=0, description="images an optimiser step")
        weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")
        schedule: Schedule = Field("multistep", description="of the learning rate")
        milestones: list[PositiveInt] = Field([18], description="epochs at which a multistep schedule lowers the rate")
        backbone_lr: float = Field(0.01, gt=0, description="factor on the learning rate for the backbone's weights")
        temperature: float = Field(0.1, gt=0, description="τ of the logit normalisation")
        fresh_norm: bool = Field(False, description="start from a fresh final norm, as the authors' code does")

    name = "slca"
    paper = "Zhang et al., SLCA: Slow Learner with Classifier Alignment, ICCV 2023, arXiv 2303.05118"
    trains_backbone = True
    needs_new_classes = True

    task_of: Tensor

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tuner = WeightTuner(backbone)
        if config.fresh_norm:
            self.tuner.refresh_final_norm(backbone)
        self.head = LinearHead(backbone.feature_dim)
        self.aligned = LinearHead(backbone.feature_dim)
        self.gaussians = Gaussians(backbone.feature_dim)
        self.register_buffer("task_of", torch.zeros(0, dtype=torch.int64))

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.task_of = torch.cat([self.task_of, self.task_of.new_full((len(task.classes),), task.index)])

    def learn(self, task: Task, ctx: Context) -> None:
        self.head.extend(self.train_rows(task, ctx))
        self.gaussians.partial_fit(*ctx.features(self, task.train))
        self.aligned = LinearHead(self.backbone.feature_dim).to(ctx.device).extend(self.head)
        if task.index and self.config.alignment_epochs:
            self.align(ctx)

    def train_rows(self, task: Task, ctx: Context) -> LinearHead:
        """Stage 1: the backbone slowly, the task's own rows fast, the softmax over the task's classes only."""
        first = task.classes[0]
        rows = LinearHead(self.backbone.feature_dim)
        rows.grow(len(task.classes), ctx.generator)
        rows.to(ctx.device)
        loss = local_cross_entropy(lambda images: rows(self.features(images)), self.config, first)
        slow_and_fast = [Group(self.tuner.parameters(), self.config.backbone_lr), Group(rows.parameters())]
        fit(loss, slow_and_fast, task.train, self.config, ctx)
        return rows

    def align(self, ctx: Context) -> None:
        """Stage 2: CE(z / (n τ), y) on vectors from N(s_c μ_c, Σ_c), older means shrunk more."""
        temperature = self.config.temperature

        def loss(features: Tensor, labels: Tensor, reduction: str = "mean") -> tuple[Tensor, Tensor]:
            logits = self.aligned(features)
            return normalized_cross_entropy(logits, labels, self.task_of, temperature, reduction), logits

        scales = mean_scales(self.task_of)
        align(loss, Group(self.aligned.parameters()), self.gaussians, scales, self.config, ctx)

    def features(self, images: Tensor) -> Tensor:
        return self.backbone(images, self.tuner)

    def logits(self, features: Tensor) -> Tensor:
        return self.aligned.logits(features)

    @property
    def feature_version(self) -> Hashable:
        return self.stages
