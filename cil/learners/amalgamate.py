"""Amalgamation: several backbones teach one on the first task, and one pass per image is left."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor

from cil.backbone import Backbone, Backbones, Member, feature_width
from cil.classifiers import LDA, CosineHead, Ridge
from cil.features import View
from cil.learner import Context
from cil.learners.bases.first_session import AdaptOnce
from cil.learners.bases.new_classes import task_head
from cil.learners.bases.teachers import Targets, Teachers
from cil.stream import Task
from cil.training import ParamGroup, check_whole_steps, cross_entropy, fit
from cil.tuning import Tuner, TunerConfig
from cil.tuning.configs import AdapterConfig


class Amalgamate(AdaptOnce):
    """Knowledge amalgamation for class-incremental learning: the first of several ``backbones`` learns from the others.

    On the first task a tuner θ is trained on the first backbone, the student f_θ, by

        L = CE(σ · cos(f_θ(x), W), y) + γ Σ_k w_k ‖M_k f_θ(x) + m_k − z_k(x)‖² / F_k,

    with a temporary head W and the scaled features z_k of the other backbones, the teachers. The maps (M_k, m_k) are
    ridge regressions of z_k on the student's features of the task, computed at the start of every epoch
    (:class:`~cil.learners.bases.teachers.Teachers`). With ``targets: relations`` the teachers' distances and angles
    between images take the place of their features, and with ``logme`` linear scores of the task's classes. Then θ is
    frozen and no teacher is called again: every task adds its features to the sums of LDA or ridge regression. With a
    single ``backbone``, its own frozen features teach.
    Keeps θ and these sums. One forward pass per image after the first task, in which a step also takes one per teacher.
    """

    class Config(AdaptOnce.Config):
        tuner: TunerConfig = Field(AdapterConfig(), description="tuner trained on the first task")
        layers: None = Field(None, description="always null: the student's own feature is what is taught")
        gamma: NonNegativeFloat = Field(1.0, description="weight γ ≥ 0 of the teachers in the loss; 0: no teachers")
        targets: Targets = Field(
            "features",
            description="what the student takes from a teacher: features, through an affine map; relations, the "
            "distances and angles between the images of a step; logme, scores of LogME's linear maps (B-Tuning)",
        )
        map_shrinkage: NonNegativeFloat = Field(0.05, description="shrinkage ≥ 0 of the maps to the teachers' features")
        head: Literal["lda", "ridge"] = Field(
            "lda",
            description="classifier on the student's features: LDA or ridge regression; shrinkage and strength are "
            "chosen by generalised cross-validation over all tasks",
        )

        @model_validator(mode="after")
        def _whole_steps(self) -> Any:
            if self.targets == "relations":
                check_whole_steps(self, "gamma")
            return self

    name = "amalgamate"
    summary = "one backbone that several others teach on the first task, then LDA"
    trains = "a tuner on the first task"
    paper = "after Luo et al., Knowledge Amalgamation from Heterogeneous Networks, IJCAI 2019"
    takes_teachers = True

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.joined = None  # the features are those of one backbone

    @classmethod
    def tuned(cls, backbone: Backbone) -> Backbone:
        return backbone.members[0] if isinstance(backbone, Backbones) else backbone

    @property
    def width(self) -> int:
        return feature_width(self.tuned(self.backbone), self.tuner)

    def views(self) -> Mapping[Hashable, View]:
        if not isinstance(self.backbone, Backbones):
            return super().views()
        return {version: Member(self.backbone, 0, self.tuner) for version in super().views()}

    def make_classifier(self) -> LDA | Ridge:
        if self.config.head == "ridge":
            return Ridge(self.width, None, "gcv")
        return LDA(self.width, "gcv", "uniform")

    def adapt(self, tuner: Tuner, task: Task, ctx: Context) -> None:
        config, [see] = self.config, self.views().values()
        head = task_head(CosineHead(self.width), task, ctx)
        classify, groups = cross_entropy(head, config), [ParamGroup([*tuner.parameters(), *head.parameters()])]
        if not config.gamma:
            fit(lambda images, labels: classify(see(images), labels), groups, task.train, config, ctx)
            return
        teachers, steps = Teachers(self, tuner, config.targets, config.map_shrinkage, task, ctx), 0
        per_epoch = math.ceil(len(task.train) / config.train_batch_size)

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            features = see(images)
            value, logits = classify(features, labels)
            return value + config.gamma * teachers.term(features, images), logits

        def after_step() -> None:
            nonlocal steps
            steps += 1
            if steps % per_epoch == 0 and steps < per_epoch * config.epochs:
                teachers.begin_epoch()

        fit(loss, groups, task.train, config, ctx, after_step, batch_loss=teachers.compares)
