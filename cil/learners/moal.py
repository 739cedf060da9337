"""MoAL: ridge regression on a slowly averaged adapter, and a second look at what it gets wrong."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Hashable, Mapping

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cil.backbone import Backbone, feature_width
from cil.classifiers import NCM, CosineHead, Ridge
from cil.classifiers.drift import ridge_map
from cil.features import View
from cil.learner import Context
from cil.learners.bases.new_classes import TaskOfClass
from cil.stream import Task
from cil.training import ParamGroup, Recipe, cross_entropy, fit
from cil.tuning import TunerConfig, build_tuner
from cil.tuning.configs import AdapterConfig
from cil.utils.precision import exact


class MoAL(TaskOfClass):
    """MoAL: momentum-based analytical learning (Gao et al., CVPR 2025), with any tuner.

    One tuner θ is trained on through all tasks, with a cosine head over all classes. Features are those of θ̄: after
    the first task a copy of θ, then θ̄ ← α θ̄ + (1 − α) θ after every epoch. The classifier is RanPAC's ridge regression,
    whose λ is chosen on the first task. Means of old classes follow θ̄ by an affine map, fitted on the current images.
    Rumination: an old class gets the features of the new class with the most similar mean, shifted to its own mean;
    those of them, and of the task's images, that the regression gets wrong are added to its sums a second time. One
    pass per image at test.
    """

    class Config(Recipe):
        tuner: TunerConfig = Field(AdapterConfig(), description="tuner trained through all tasks")
        epochs: int = Field(20, gt=0, description="epochs per task")
        train_batch_size: int = Field(48, gt=0, description="images per optimiser step")
        weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")
        decay: float = Field(0.999, ge=0, le=1, description="decay α in [0, 1] of the moving average per epoch")
        projection: PositiveInt | None = Field(
            5000, description="width M of the random projection; null: none, and the map moves the sums themselves"
        )
        map_shrinkage: float = Field(0.05, ge=0, description="shrinkage ≥ 0 of the map towards the identity")
        rumination: bool = Field(True, description="whether what is misclassified is added a second time")

    name = "moal"
    summary = "ridge regression on a slow average of one adapter, which sees its mistakes twice"
    trains = "one tuner, head"
    paper = "Gao et al., MoAL, CVPR 2025"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tuner = build_tuner(config.tuner, backbone)
        self.slow = copy.deepcopy(self.tuner).requires_grad_(False)
        width = feature_width(backbone, self.tuner)
        self.head = CosineHead(width)
        self.classifier = Ridge(width, config.projection)
        self.prototypes = NCM(width)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.head.grow(len(task.seen), ctx.generator)
        self.classifier.grow(len(task.seen))
        if task.index == 0:
            self.tuner.reset(ctx.generator)
            self.slow.load_state_dict(self.tuner.state_dict())
            self.classifier.draw(ctx.generator)

    def learn(self, task: Task, ctx: Context) -> None:
        before = ctx.features(self, task.train)[0] if task.index else None
        self.train_tuner(task, ctx)
        self.prototypes.grow(len(task.seen))
        after, labels = ctx.features(self, task.train)
        if before is not None:
            drift = ridge_map(before, after, self.config.map_shrinkage)
            self.prototypes.transport(drift)
            if self.config.projection is None:
                self.classifier.transport(drift)
            self.classifier.strength = float(self.classifier.strength_)  # chosen on the first task
        self.prototypes.partial_fit(after, labels)
        self.classifier.partial_fit(after, labels, ctx.generator)
        if task.index and self.config.rumination:
            self.ruminate(after, labels, task.classes[0], ctx)

    def train_tuner(self, task: Task, ctx: Context) -> None:
        """Train θ and the head with all classes in the softmax; average after every epoch."""
        steps = math.ceil(len(task.train) / self.config.train_batch_size)
        average, count = get_ema_multi_avg_fn(self.config.decay), itertools.count(1)

        def after_step() -> None:
            if task.index and next(count) % steps == 0:
                average([*self.slow.parameters()], [*self.tuner.parameters()], None)

        loss = cross_entropy(lambda images: self.head(self.backbone(images, self.tuner)), self.config)
        groups = [ParamGroup([*self.tuner.parameters(), *self.head.parameters()])]
        fit(loss, groups, task.train, self.config, ctx, after_step)
        if task.index == 0:
            self.slow.load_state_dict(self.tuner.state_dict())

    @exact()
    def ruminate(self, features: Tensor, labels: Tensor, first: int, ctx: Context) -> None:
        """Add what is misclassified of the task's features [N, F] and of those that stand for classes before ``first``.

        All of them are classified before any is added.
        """
        imagined, old = self.imagine(features.double(), labels, first)
        rows, targets = torch.cat([imagined, features.double()]), torch.cat([old, labels])
        wrong = torch.cat([self.classifier.logits(part).argmax(1) for part in rows.split(1024)]) != targets
        ctx.log("ruminated", float(wrong.double().mean()))
        if bool(wrong.any()):
            self.classifier.partial_fit(rows[wrong], targets[wrong])

    def imagine(self, features: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Features that stand for old classes: those of the most similar new class, shifted to the old class's mean.

        Args:
            features: The task's features, float64 [N, F].
            labels: Their labels, int64 [N].
            first: Number of old classes.

        Returns:
            (float64 [n, F], int64 [n]).
        """
        means, new = self.prototypes.means, labels.unique()
        old = self.prototypes.counts[:first].nonzero().flatten()
        alike = new[(F.normalize(means[old], dim=1) @ F.normalize(means[new], dim=1).T).argmax(1)]
        parts = [features[labels == n] + means[c] - means[n] for c, n in zip(old, alike, strict=True)]
        sizes = torch.tensor([len(part) for part in parts], device=labels.device)
        return torch.cat([features[:0], *parts]), old.repeat_interleave(sizes)

    def views(self) -> Mapping[Hashable, View]:
        # not by stage: within a stage features are needed before and after training, which adds classes to the means
        return {self.prototypes.num_classes: self.slowly_tuned}

    def slowly_tuned(self, images: Tensor) -> Tensor:
        """f_θ̄(x): images [B, 3, H, W] → features [B, F]."""
        return self.backbone(images, self.slow)

    def logits(self, features: Tensor) -> Tensor:
        return self.classifier.logits(features)
