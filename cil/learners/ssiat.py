"""SSIAT: one adapter trained through all tasks, old Gaussians carried along, one head aligned on them."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers import CosineHead, Gaussians, mean_scales
from cil.classifiers.drift import local_shifts
from cil.learner import Context, Learner
from cil.learners.aligning import AlignedRecipe, align, softmax_of
from cil.stream import Task
from cil.training import Group, Loss, Recipe, cosface, fit
from cil.tuning import TunerConfig, build_tuner
from cil.tuning.table import AdapterConfig


class SSIAT(Learner):
    """SSIAT: semantic shift and incremental adapter tuning (Tan et al., arXiv 2403.19979), with any tuner.

    Training: one tuner goes on from task to task, with new rows of a cosine head under CosFace over the task's own
    classes; old rows are frozen. Drift: the means of old classes move as the current images near them moved from before
    the training to after it; their covariances stay. Then one Gaussian per new class. Alignment, from the second task
    on: all rows are re-balanced on vectors drawn from all Gaussians, older means shrunk more, and training goes on from
    the rows it ends with. One pass an image at test, whatever the number of tasks.
    """

    class Config(AlignedRecipe):
        tuner: TunerConfig = Field(AdapterConfig(), description="what is trained through all tasks")
        first_epochs: PositiveInt = Field(20, description="passes over the first task")
        epochs: int = Field(10, gt=0, description="passes over each later task")
        train_batch_size: int = Field(48, gt=0, description="images an optimiser step")
        weight_decay: float = Field(2e-4, ge=0, description="L2 penalty, in training and alignment")
        scale: float = Field(20.0, gt=0, description="s, factor of the cosines in every softmax")
        margin: float = Field(0.1, ge=0, lt=2, description="m of CosFace: the cosine by which the true class must win")
        sigma: float | None = Field(
            4.0, gt=0, description="width of the neighbourhood whose drift a mean follows; null: means stay"
        )
        ridge: float = Field(1e-3, gt=0, description="added to every variance of the Gaussians")

    name = "ssiat"
    paper = (
        "Tan et al., Semantically-Shifted Incremental Adapter-Tuning is A Continual ViTransformer, CVPR 2024, "
        "arXiv 2403.19979"
    )
    needs_new_classes = True

    task_of: Tensor

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tuner = build_tuner(config.tuner, backbone)
        self.head = CosineHead(backbone.feature_dim, config.scale)
        self.head.sigma.requires_grad_(False)  # it is s
        self.gaussians = Gaussians(backbone.feature_dim, config.ridge)
        self.register_buffer("task_of", torch.zeros(0, dtype=torch.int64))

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index == 0:
            self.tuner.reset(ctx.generator)
        self.task_of = torch.cat([self.task_of, self.task_of.new_full((len(task.classes),), task.index)])

    def learn(self, task: Task, ctx: Context) -> None:
        follows = task.index > 0 and self.config.sigma is not None
        before = ctx.features(self, task.train)[0] if follows else None
        self.head.extend(self.train_rows(task, ctx))
        after, labels = ctx.features(self, task.train)
        if before is not None:
            self.carry(before, after, ctx)
        self.gaussians.partial_fit(after, labels)
        if task.index and self.config.alignment_epochs:
            self.align(ctx)

    def train_rows(self, task: Task, ctx: Context) -> CosineHead:
        """The tuner and the task's own rows, the softmax over the task's classes only."""
        config, first = self.config, task.classes[0]
        rows = CosineHead(self.backbone.feature_dim)
        rows.grow(len(task.classes), ctx.generator)
        rows.to(ctx.device)
        fitted = cosface(
            lambda features: F.pad(rows(features), (first, 0), value=-math.inf),
            config,
            first,
            config.scale,
            config.margin,
        )
        recipe = config if task.index else config.model_copy(update={"epochs": config.first_epochs})
        self.train_on(task, fitted, [Group([*self.tuner.parameters(), rows.weight])], recipe, ctx)
        return rows

    def train_on(self, task: Task, fitted: Loss, groups: list[Group], recipe: Recipe, ctx: Context) -> None:
        """Minimise ``fitted``, a loss of (features, labels), over the task."""
        fit(lambda images, labels: fitted(self.features(images), labels), groups, task.train, recipe, ctx)

    def carry(self, before: Tensor, after: Tensor, ctx: Context) -> None:
        """Means of old classes, to where the task's images say they have gone; features [N, F] of these twice."""
        shifts = local_shifts(self.gaussians.means, before, after, self.config.sigma)
        ctx.log("mean_drift", float(shifts.norm(dim=1).mean()))
        self.gaussians.translate(shifts)

    def align(self, ctx: Context) -> None:
        """CE(s · cos(z, W), y) on vectors from all Gaussians, over all rows."""
        scales = mean_scales(self.task_of)
        align(softmax_of(self.head), Group([self.head.weight]), self.gaussians, scales, self.config, ctx)

    def features(self, images: Tensor) -> Tensor:
        return self.backbone(images, self.tuner)

    def logits(self, features: Tensor) -> Tensor:
        return self.head.logits(features)

    @property
    def feature_version(self) -> Hashable:
        return self.head.num_classes  # rows arrive with the training that moved the tuner, in the middle of a stage
