"""What APER, RanPAC and FeCAM share: a tuner adapted on the first task, and frozen from then on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from functools import partial

from pydantic import Field
from torch import Tensor

from cil.backbone import FROZEN, Backbone
from cil.classifiers import Classifier, CosineHead
from cil.features import View
from cil.learner import Context, Learner
from cil.stream import Task
from cil.training import Group, Recipe, cross_entropy, fit
from cil.tuning import TunerConfig, build_tuner


class AdaptOnce(Learner):
    """First-session adaptation (Zhou et al., arXiv 2303.07338; RanPAC's phase 1), then statistics only.

    Task 0: minimise CE(σ · cos(f_θ(x), W), y) over the tuner θ and a temporary cosine head W, then drop the head. From
    then on every task is one pass over its images and no training: test images, too, pass once. Without a tuner the
    backbone stays as it is.
    """

    class Config(Recipe):
        tuner: TunerConfig | None = Field(None, description="what is adapted on the first task; null: nothing")
        epochs: int = Field(20, gt=0, description="passes over the first task")
        train_batch_size: int = Field(48, gt=0, description="images an optimiser step")
        weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tuner = build_tuner(config.tuner, backbone) if config.tuner is not None else None
        self.classifier = self.make_classifier()

    @abstractmethod
    def make_classifier(self) -> Classifier:
        """The classifier on :meth:`features`."""

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index == 0 and self.tuner is not None:
            self.tuner.reset(ctx.generator)
        self.classifier.grow(len(task.seen))

    def learn(self, task: Task, ctx: Context) -> None:
        if task.index == 0 and self.tuner is not None:
            head = CosineHead(self.backbone.feature_dim)
            head.grow(len(task.seen), ctx.generator)
            head.to(ctx.device)
            loss = cross_entropy(lambda images: head(self.adapted(images)), self.config)
            fit(loss, [Group([*self.tuner.parameters(), *head.parameters()])], task.train, self.config, ctx)
        self.classifier.partial_fit(*ctx.features(self, task.train))

    def adapted(self, images: Tensor) -> Tensor:
        """f_θ(x), [B, F]."""
        return self.backbone(images, self.tuner)

    def features(self, images: Tensor) -> Tensor:
        return self.adapted(images)

    def views(self) -> Mapping[Hashable, View]:
        if not self._sees_as(AdaptOnce):
            return super().views()
        tuned = self.tuner is not None
        return {self.feature_version: partial(self.backbone, tuner=self.tuner) if tuned else self.backbone}

    def logits(self, features: Tensor) -> Tensor:
        return self.classifier.logits(features)

    @property
    def feature_version(self) -> Hashable:
        return FROZEN if self.tuner is None else "adapted" if self.seen else "not adapted yet"
