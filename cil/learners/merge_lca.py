"""IM+LCA: merging with one head that is aligned on Gaussians."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cil.backbone import Backbone
from cil.classifiers import CosineHead, Gaussians
from cil.learner import Context
from cil.learners.bases.alignment import AlignedRecipe, align, mean_scales, softmax_of
from cil.learners.bases.new_classes import TaskOfClass
from cil.learners.merge import Merge
from cil.merging import RuleConfig
from cil.merging.configs import MagMaxConfig
from cil.stream import Task
from cil.training import ParamGroup


class MergeLCA(TaskOfClass, Merge):
    """Incremental merging with loss-aware classifier alignment (IM+LCA, arXiv 2603.09888), under any rule.

    Tasks are trained and merged as in ``merge``. Their heads are concatenated. After each task one Gaussian per new
    class is estimated under θ^(t), and from the second task on all rows of the head are trained on vectors sampled from
    all Gaussians, with E ℓ(z) + λ E |ℓ(z) − ℓ(z')|: ℓ is the cross-entropy over all classes, z and z' are independent
    samples of one class. Gaussians of old classes do not change, as in the paper, unless ``prototypes`` corrects them.
    """

    class Config(Merge.Config, AlignedRecipe):
        rule: RuleConfig = Field(MagMaxConfig(scale=1.0), description="rule that merges the tasks' updates")
        anchor: Literal[False] = Field(False, description="always false: heads are trained on the features of θ_t only")
        trained: Literal["all"] = Field("all", description="always all: every task has a head to align")
        head: Literal["aligned"] = Field(
            "aligned", description="classifier, always the aligned concatenation of the tasks' heads"
        )  # type: ignore[assignment]
        prototypes: Literal["stale", "translate", "linear"] = Field(
            "stale", description="correction of old classes' Gaussians: none, a translation, or a ridge regression"
        )
        alignment_epochs: int = Field(10, ge=0, description="epochs of the alignment; 0: no alignment")
        samples: int = Field(
            64, gt=0, description="vectors sampled per class and epoch of the alignment, and per optimiser step"
        )
        variation: float = Field(0.1, ge=0, description="weight λ ≥ 0 of the loss difference within a class")
        ridge: float = Field(1e-4, gt=0, description="constant > 0 added to each variance of the Gaussians")

    name = "merge_lca"
    summary = "merging, with the tasks' heads re-trained together on class Gaussians"
    trains = "one tuner per task, head"
    paper = "IM+LCA, ICLR 2026, arXiv 2603.09888"

    classifier: CosineHead

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.gaussians = Gaussians(self.models.width, config.ridge, config.covariance_rank)

    def make_classifier(self) -> CosineHead:
        return CosineHead(self.models.width, self.config.head_scale)

    def learn(self, task: Task, ctx: Context) -> None:
        corrects = task.index > 0 and self.config.prototypes != "stale"
        before = ctx.features(self, task.train)[0] if corrects else None
        self.add(*self.train_task(task, ctx), task, ctx)
        after, labels = ctx.features(self, task.train)
        if before is not None:
            self.gaussians.transport(self.drift(before, after))
        self.gaussians.partial_fit(after, labels)
        if task.index and self.config.alignment_epochs:
            self.align(ctx)

    def align(self, ctx: Context) -> None:
        """Train all rows and σ on vectors from all Gaussians."""
        scales = mean_scales(self.task_of)
        align(
            softmax_of(self.classifier),
            ParamGroup(self.classifier.parameters()),
            self.gaussians,
            scales,
            self.config,
            ctx,
        )
