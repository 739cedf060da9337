"""SLCA: a backbone with a small learning rate, task-wise heads, and a classifier aligned on Gaussians."""

from __future__ import annotations

from pydantic import Field, PositiveInt
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers import Head, LinearHead
from cil.learner import Context
from cil.learners.bases.aligned_copy import AlignedCopy, AlignedCopyRecipe
from cil.learners.bases.new_classes import task_head
from cil.learners.bases.reusing import ReuseRecipe, ReusingTuning
from cil.stream import Task
from cil.training import ParamGroup, Schedule, local_cross_entropy
from cil.tuning import WeightTuner


class SLCA(AlignedCopy, ReusingTuning):
    """SLCA: slow learner with classifier alignment (Zhang et al., arXiv 2303.05118).

    Stage 1: L = CE over the task's own classes. All backbone weights are trained further, with a learning rate 100
    times smaller than that of the new head rows; old rows are frozen. Then one Gaussian N(μ_c, Σ_c) per new class is
    estimated with the current backbone and kept; old ones are not updated. Stage 2, from the second task on: a copy of
    the head is trained on vectors sampled from all Gaussians, with the logits divided by their mean norm over tasks.
    The copy is used for prediction, the original for the next task. One forward pass per image at test.
    """

    class Config(AlignedCopyRecipe, ReuseRecipe):
        epochs: int = Field(20, gt=0, description="epochs per task")
        train_batch_size: int = Field(128, gt=0, description="images per optimiser step")
        weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")
        schedule: Schedule = Field("multistep", description="learning-rate schedule")
        milestones: list[PositiveInt] = Field([18], description="epochs at which a multistep schedule lowers the rate")
        backbone_lr_factor: float = Field(
            0.01, gt=0, description="factor on the learning rate for the backbone's weights"
        )
        fresh_norm: bool = Field(
            False, description="whether to start from a reset final norm layer, as the authors' code does"
        )

    name = "slca"
    summary = "slowly trained backbone, head re-trained on class Gaussians"
    trains = "all weights, head"
    paper = "Zhang et al., SLCA: Slow Learner with Classifier Alignment, ICCV 2023, arXiv 2303.05118"
    trains_backbone = True

    tuner: WeightTuner
    head: LinearHead

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tuner = WeightTuner(backbone)
        if config.fresh_norm:
            self.tuner.refresh_final_norm(backbone)
        self.anchor_to(self.tuner)
        self.head = LinearHead(backbone.feature_dim)
        self.keep_copy()

    def learn(self, task: Task, ctx: Context) -> None:
        self.head.extend(self.train_rows(task, ctx))
        self.finish(self.head, task, ctx)

    def train_rows(self, task: Task, ctx: Context) -> LinearHead:
        """Stage 1: train backbone and new rows, with the task's own classes in the softmax; returns the rows."""
        first = task.classes[0]
        rows = task_head(LinearHead(self.backbone.feature_dim), task, ctx)
        loss = local_cross_entropy(rows, self.config, first)
        slow_and_fast = [
            ParamGroup(self.tuner.parameters(), self.config.backbone_lr_factor),
            ParamGroup(rows.parameters()),
        ]
        self.fit_tuner(loss, slow_and_fast, task, self.config, ctx)
        return rows

    @property
    def old_scores(self) -> Head:
        return self.aligned

    def logits(self, features: Tensor) -> Tensor:
        return self.aligned.logits(features)
