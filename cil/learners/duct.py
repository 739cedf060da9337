"""DUCT: each task's weights are added to the merged ones, and old rows move to where similar new classes are."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers import NCM, CosineHead
from cil.classifiers.transport import barycentric
from cil.features import View
from cil.learner import Context
from cil.learners.bases.new_classes import TaskOfClass, task_head
from cil.learners.bases.sequential import SequentialTuning
from cil.learners.bases.some_views import SomeViews
from cil.stream import Task
from cil.training import ParamGroup, Recipe, Schedule, fit, local_cross_entropy
from cil.tuning import WeightTuner
from cil.utils.precision import exact


class DUCT(TaskOfClass, SequentialTuning):
    """DUCT: dual consolidation (Zhou et al., arXiv 2410.00911), for new classes instead of domains.

    Task t trains all weights from the pre-trained θ_0, with new rows of a cosine head. The merged weights are
    θ^(t) = θ^(t−1) + β s (θ_t − θ_0), with s the mean cosine of the new classes' means under θ_t and θ_0. The new rows
    are trained further under θ^(t). Then the rows of every old task move by a share ρ to the average of the new rows
    that optimal transport between the class means under θ_0 gives each of them. Keeps θ^(t), the head and the means.
    One forward pass per image at test.
    """

    class Config(Recipe):
        epochs: int = Field(10, gt=0, description="epochs per task")
        head_epochs: PositiveInt = Field(5, description="epochs in which the new rows are trained further")
        train_batch_size: int = Field(128, gt=0, description="images per optimiser step")
        lr: float = Field(0.1, gt=0, description="peak learning rate of the head")
        backbone_lr_factor: float = Field(0.01, gt=0, description="factor on the rate for the backbone's weights")
        weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")
        schedule: Schedule = Field("constant", description="learning-rate schedule")
        merge_scale: float = Field(0.25, gt=0, description="factor β > 0 on every task's update")
        head_ratio: float = Field(0.25, ge=0, le=1, description="share ρ in [0, 1] of the transported rows")
        entropy: float = Field(
            0.02, gt=0, description="entropy ε > 0 of the transport, in units of the mean distance of the class means"
        )

    name = "duct"
    summary = "sum of the tasks' scaled updates, with old rows transported to similar new classes"
    trains = "all weights, head"
    paper = "Zhou et al., Dual Consolidation for PTM-Based DIL, CVPR 2025, arXiv 2410.00911"
    trains_backbone = True

    tuner: WeightTuner

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tuner = WeightTuner(backbone).requires_grad_(False)
        self.head = CosineHead(backbone.feature_dim)
        self.prototypes = NCM(backbone.feature_dim)
        self._own = SomeViews(self, self.own_view)
        self._trained: tuple[WeightTuner, ...] = ()  # θ_t while it is merged; a tuple keeps it out of the state

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.prototypes.grow(len(task.seen))

    def learn(self, task: Task, ctx: Context) -> None:
        own = WeightTuner(self.backbone)
        rows = task_head(CosineHead(self.backbone.feature_dim), task, ctx)
        slow_and_fast = [
            ParamGroup(own.parameters(), self.config.backbone_lr_factor),
            ParamGroup(rows.parameters()),
        ]
        first = task.classes[0]
        loss = local_cross_entropy(lambda images: rows(self.backbone(images, own)), self.config, first)
        fit(loss, slow_and_fast, task.train, self.config, ctx)
        self._trained = (own,)
        self.merge(own, self.similarity(task, ctx), ctx)
        self._trained = ()
        loss = local_cross_entropy(lambda images: rows(self.fixed(images)), self.config, first)
        recipe = self.config.model_copy(update={"epochs": self.config.head_epochs})
        fit(loss, [ParamGroup(rows.parameters())], task.train, recipe, ctx, prefix="head_")
        self.transport(rows.weight.detach())
        self.head.extend(rows)

    def similarity(self, task: Task, ctx: Context) -> float:
        """s, and the new classes' means under θ_0."""
        frozen, labels = ctx.features(self.backbone, task.train)
        self.prototypes.partial_fit(frozen, labels)
        tuned = (
            NCM(self.backbone.feature_dim).to(ctx.device).partial_fit(ctx.features(self._own, task.train)[0], labels)
        )
        present = labels.unique()
        return float(F.cosine_similarity(tuned.means[present], self.prototypes.means[present]).mean())

    @exact()
    def merge(self, own: WeightTuner, similarity: float, ctx: Context) -> None:
        """θ^(t), from θ^(t−1) and θ_t."""
        ctx.log("similarity", similarity)
        scale, start = self.config.merge_scale * similarity, dict(self.backbone.model.named_parameters())
        for name, value in self.tuner.copies.items():
            value += scale * (own.copies[name] - start[name.replace("/", ".")])

    @exact()
    def transport(self, new: Tensor) -> None:
        """Move the rows of every old task, given the new rows [n, F]."""
        means, count = self.prototypes.means, self.head.num_classes
        for task in range(self.stages - 1):
            old = (self.task_of[:count] == task).nonzero().flatten()
            cost = torch.cdist(means[count:], means[old])
            rows = barycentric(cost / cost.mean().clamp(min=1e-12), self.config.entropy).to(new) @ new
            self.head.weight[old] = torch.lerp(self.head.weight[old], rows, self.config.head_ratio)

    @torch.no_grad()
    def fixed(self, images: Tensor) -> Tensor:
        """Features [B, F] under θ^(t), without gradients."""
        return self.tuned(images)

    def own_view(self) -> Mapping[Hashable, View]:
        return {("own", self.stages): partial(self.backbone, tuner=self._trained[0])}

    def logits(self, features: Tensor) -> Tensor:
        return self.head.logits(features)
