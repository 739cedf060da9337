"""SSIAT: one adapter trained through all tasks, Gaussians corrected for feature drift, a head aligned on them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from cil.backbone import Backbone, feature_width
from cil.classifiers import CosineHead, Gaussians
from cil.classifiers.drift import local_shifts
from cil.features import View
from cil.learner import Context
from cil.learners.bases.alignment import AlignedRecipe, align, mean_scales, softmax_of
from cil.learners.bases.new_classes import TaskOfClass, task_head
from cil.learners.bases.reusing import ReuseRecipe, ReusingTuning
from cil.stream import Task
from cil.training import Loss, ParamGroup, Recipe, cosface
from cil.tuning import Tuner, TunerConfig, build_tuner
from cil.tuning.configs import AdapterConfig


class CorrectedRecipe(AlignedRecipe, ReuseRecipe):
    """How the tuner is trained, and how the Gaussians follow it."""

    first_epochs: PositiveInt = Field(20, description="epochs on the first task")
    epochs: int = Field(10, gt=0, description="epochs per task after the first")
    train_batch_size: int = Field(48, gt=0, description="images per optimiser step")
    weight_decay: float = Field(2e-4, ge=0, description="L2 penalty, in training and alignment")
    scale: float = Field(20.0, gt=0, description="factor s > 0 on the cosines in every softmax")
    margin: float = Field(0.1, ge=0, lt=2, description="margin m of CosFace, a cosine in [0, 2)")
    drift_bandwidth: float | None = Field(
        4.0,
        gt=0,
        description="standard deviation σ > 0, in units of the features, of the Gaussian kernel that weights the "
        "images around a class mean in its drift; null: means are not corrected",
    )
    ridge: float = Field(1e-3, gt=0, description="constant > 0 added to each variance of the Gaussians")


class SSIAT(TaskOfClass, ReusingTuning):
    """SSIAT: semantic shift and incremental adapter tuning (Tan et al., arXiv 2403.19979), with any tuner.

    Training: one tuner is trained further on every task, with new rows of a cosine head, by CosFace over the task's own
    classes; old rows are frozen. Drift: the mean of an old class is shifted by the mean drift of the current images
    near it, from before to after the training; its covariance does not change. Then one Gaussian per new class is
    estimated. Alignment, from the second task on: all rows are trained on vectors sampled from all Gaussians, with
    older means scaled down more; the next task starts from these rows. Keeps the tuner, the head and one Gaussian per
    class. One pass per image at test, for any number of tasks. ``anchor``, ``distill`` and ``bss`` add to the training.
    """

    class Config(CorrectedRecipe):
        tuner: TunerConfig = Field(AdapterConfig(), description="tuner trained through all tasks")

    name = "ssiat"
    summary = "head re-trained on class Gaussians that are corrected for feature drift"
    trains = "one tuner, head"
    paper = (
        "Tan et al., Semantically-Shifted Incremental Adapter-Tuning is A Continual ViTransformer, CVPR 2024, "
        "arXiv 2403.19979"
    )

    tuner: Tuner

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tuner = self.make_tuner(backbone)
        self.anchor_to(self.tuner)
        width = feature_width(backbone, self.tuner)
        self.head = CosineHead(width, config.scale)
        self.head.sigma.requires_grad_(False)  # it stays at s
        self.gaussians = Gaussians(width, config.ridge, config.covariance_rank)

    def make_tuner(self, backbone: Backbone) -> Tuner:
        return build_tuner(self.config.tuner, backbone)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index == 0:
            self.tuner.reset(ctx.generator)

    def learn(self, task: Task, ctx: Context) -> None:
        before = ctx.features(self, task.train)[0] if task.index and self.corrects else None
        self.head.extend(self.train_rows(task, ctx))
        after, labels = ctx.features(self, task.train)
        if before is not None:
            self.correct_drift(before, after, labels, ctx)
        self.gaussians.partial_fit(after, labels)
        if task.index and self.config.alignment_epochs:
            self.align(ctx)

    def train_rows(self, task: Task, ctx: Context) -> CosineHead:
        """Train the tuner and the task's new rows, with the task's own classes in the softmax; returns the rows."""
        config, first = self.config, task.classes[0]
        rows = task_head(CosineHead(self.head.feature_dim), task, ctx)
        cosface_loss = cosface(
            lambda features: F.pad(rows(features), (first, 0), value=-math.inf),
            config,
            first,
            config.scale,
            config.margin,
        )
        recipe = config if task.index else config.model_copy(update={"epochs": config.first_epochs})
        self.train_on(task, cosface_loss, [ParamGroup([*self.tuner.parameters(), rows.weight])], recipe, ctx)
        return rows

    def train_on(self, task: Task, cosface_loss: Loss, groups: list[ParamGroup], recipe: Recipe, ctx: Context) -> None:
        """Minimise ``cosface_loss``, a loss of (features, labels), over the task."""
        self.fit_tuner(cosface_loss, groups, task, recipe, ctx)

    @property
    def corrects(self) -> bool:
        """Whether old classes' Gaussians follow the drift of later tasks."""
        return self.config.drift_bandwidth is not None

    def correct_drift(self, before: Tensor, after: Tensor, labels: Tensor, ctx: Context) -> None:
        """Shift old classes' means by the drift of the task's images, given their features [N, F] before and after."""
        shifts = local_shifts(self.gaussians.means, before, after, self.config.drift_bandwidth)
        ctx.log("mean_drift", float(shifts.norm(dim=1).mean()))
        self.gaussians.translate(shifts)

    def align(self, ctx: Context) -> None:
        """Minimise CE(s · cos(z, W), y) over all rows, on vectors from all Gaussians."""
        scales = mean_scales(self.task_of)
        align(softmax_of(self.head), ParamGroup([self.head.weight]), self.gaussians, scales, self.config, ctx)

    def logits(self, features: Tensor) -> Tensor:
        return self.head.logits(features)

    def views(self) -> Mapping[Hashable, View]:
        # not by stage: within a stage features are needed before and after training, which adds rows to the head
        return {self.head.num_classes: self.tuned}
