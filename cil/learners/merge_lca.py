"""Merging with one head aligned on Gaussians: IM+LCA."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers import CosineHead, Gaussians, mean_scales
from cil.learner import Context
from cil.learners.aligning import AlignedRecipe, align, softmax_of
from cil.learners.merge import Merge
from cil.merging import RuleConfig
from cil.merging.table import MagMaxConfig
from cil.stream import Task
from cil.training import Group


class MergeLCA(Merge):
    """Incremental merging with loss-aware classifier alignment (IM+LCA, arXiv 2603.09888), under any rule.

    Tasks are trained and merged as by ``merge``. Their heads are kept side by side, and after every task all rows are
    trained on vectors drawn from a Gaussian per class, taken under θ^(t): E ℓ(z) + λ E |ℓ(z) − ℓ(z')|, ℓ the
    cross-entropy over all classes and z, z' independent draws of one class. Gaussians of old classes stay as they were
    taken, as in the paper, unless ``prototypes`` carries them along.
    """

    class Config(Merge.Config, AlignedRecipe):
        rule: RuleConfig = Field(MagMaxConfig(scale=1.0), description="how updates are merged")
        anchor: Literal[False] = Field(False, description="heads are trained on the task's own features alone")
        trained: Literal["all"] = Field("all", description="every task has a head to align")
        head: Literal["aligned"] = Field("aligned", description="the tasks' heads, aligned")  # type: ignore[assignment]
        prototypes: Literal["stale", "translate", "linear"] = Field(
            "stale", description="old classes' Gaussians: as they were, shifted, or mapped with a ridge regression"
        )
        alignment_epochs: int = Field(10, ge=0, description="passes over drawn vectors; 0: no alignment")
        samples: int = Field(64, gt=0, description="vectors drawn per class and epoch, and per optimiser step")
        variation: float = Field(0.1, ge=0, description="λ, which makes all vectors of a class lose alike")
        ridge: float = Field(1e-4, gt=0, description="added to every variance of the Gaussians")

    name = "merge_lca"
    paper = "IM+LCA, ICLR 2026, arXiv 2603.09888"
    needs_new_classes = True

    classifier: CosineHead
    task_of: Tensor

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.gaussians = Gaussians(backbone.feature_dim, config.ridge)
        self.register_buffer("task_of", torch.zeros(0, dtype=torch.int64))

    def make_classifier(self) -> CosineHead:
        return CosineHead(self.backbone.feature_dim, self.config.sigma)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.task_of = torch.cat([self.task_of, self.task_of.new_full((len(task.classes),), task.index)])

    def learn(self, task: Task, ctx: Context) -> None:
        carries = task.index > 0 and self.config.prototypes != "stale"
        before = ctx.features(self, task.train)[0] if carries else None
        self.add(*self.train_task(task, ctx), task, ctx)
        after, labels = ctx.features(self, task.train)
        if before is not None:
            self.gaussians.transport(self.drift(before, after))
        self.gaussians.partial_fit(after, labels)
        if task.index and self.config.alignment_epochs:
            self.align(ctx)

    def align(self, ctx: Context) -> None:
        """All rows and σ, on vectors from all Gaussians."""
        scales = mean_scales(self.task_of)
        align(
            softmax_of(self.classifier), Group(self.classifier.parameters()), self.gaussians, scales, self.config, ctx
        )
