"""MIN: small maps after every block, one per task and mixed, trained on what a ridge regression gets wrong."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.classifiers import Ridge
from cil.features import View
from cil.learner import Context
from cil.learners.bases.sequential import SequentialTuning
from cil.stream import Task
from cil.training import Loss, ParamGroup, Recipe, Schedule, cross_entropy, fit
from cil.tuning.residual_maps import ResidualMaps
from cil.utils.precision import without_autocast

AT_ONCE = 64
"""Images per forward pass of the augmented passes."""


class MIN(SequentialTuning):
    """MIN: mixture of noise (arXiv 2509.16738), as its code computes it: without noise.

    After every block r ← r + P(r) + Σ_i ω_i u_i(r W_d) W_u, with one affine map u_i per task i and ω of sum 1; at test
    the mixture is one map. Task 0 trains P, the norms and u_0 with a temporary linear head. Later tasks train u_t only,
    through a temporary head H W' on random features H = ReLU(φR) that is added to the ridge regression H W, so that
    they learn what it gets wrong. The regression's sums get every image several times augmented, from task 1 on with
    the network before the training, and once as it is with the network after it. Old rows are not corrected. One pass
    per image at test, for any number of tasks.
    """

    class Config(Recipe):
        first_epochs: PositiveInt | None = Field(None, description="epochs on the first task; null: as on the others")
        epochs: int = Field(10, gt=0, description="epochs per task")
        train_batch_size: int = Field(128, gt=0, description="images per optimiser step")
        lr: float = Field(1e-3, gt=0, description="peak learning rate")
        weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")
        schedule: Schedule = Field("constant", description="learning-rate schedule")
        width: PositiveInt = Field(192, description="width k of the maps")
        maps: bool = Field(True, description="whether every task trains a map")
        mixture: Literal["mean", "similarity"] = Field(
            "mean",
            description="weights ω of the maps; similarity: softmax of the cosines of the tasks' mean frozen features "
            "to the newest one's, divided by 2",
        )
        first: bool = Field(True, description="whether the first task trains P and the norms")
        residual: bool = Field(True, description="whether a map is trained on top of the ridge regression's scores")
        passes: PositiveInt = Field(3, description="augmented passes over a task for the ridge regression")
        projection: PositiveInt = Field(4096, description="width M of the random features")
        strength: PositiveFloat = Field(
            100.0, description="ridge strength γ > 0 for a projection whose entries have the variance 1/(3M)"
        )

    name = "min"
    summary = "maps after every block, trained on what a ridge regression gets wrong, and mixed"
    trains = "one map per block and task"
    paper = "Mixture of Noise for Pre-Trained Model-Based Class-Incremental Learning, NeurIPS 2025, arXiv 2509.16738"

    tuner: ResidualMaps
    archive: Tensor
    prototypes: Tensor

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tuner = ResidualMaps(backbone, config.width, first=config.first).requires_grad_(False)
        self.classifier = Ridge(backbone.feature_dim, config.projection, self.unit**2 * config.strength)
        # similarity: the maps u_0 … u_t; mean: their sum alone
        self.register_buffer("archive", torch.zeros(0, *self.tuner.newest.shape))
        self.register_buffer("prototypes", torch.zeros(0, backbone.feature_dim))

    @property
    def unit(self) -> float:
        """Length of the entries of R ~ N(0, 1) over those of the authors' R ~ U(±1/√M)."""
        return math.sqrt(3 * self.config.projection)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.classifier.grow(len(task.seen))
        if task.index == 0:
            self.tuner.reset(ctx.generator)
            self.classifier.draw(ctx.generator)

    def learn(self, task: Task, ctx: Context) -> None:
        if task.index:
            self.add_augmented(task, ctx)
        if self.config.maps:
            self.begin_map(task, ctx)
        self.train_task(task, ctx)
        if self.config.maps:
            newest = self.tuner.newest.detach()[None]
            summed = self.config.mixture == "mean" and task.index > 0
            self.archive = self.archive + newest if summed else torch.cat([self.archive, newest])
        if not task.index:
            self.add_augmented(task, ctx)
        self.classifier.partial_fit(*ctx.features(self, task.train))

    def begin_map(self, task: Task, ctx: Context) -> None:
        """Start u_t at zero, and set ω."""
        if self.config.mixture == "mean":
            past, share = self.archive.sum(0), 1 / (task.index + 1)
            self.tuner.begin_map(share * past, share)
            return
        newest = ctx.features(self.backbone, task.train)[0].mean(0, keepdim=True)
        self.prototypes = torch.cat([self.prototypes, newest])
        weights = (F.cosine_similarity(self.prototypes, newest) / 2).softmax(0)
        self.tuner.begin_map(torch.einsum("t,tlij->lij", weights[:-1], self.archive), float(weights[-1]))

    @torch.no_grad()
    def add_augmented(self, task: Task, ctx: Context) -> None:
        """Add every image ``passes`` times to the sums, augmented each time, with the network as it is."""
        for _ in range(self.config.passes):
            parts = []
            for images, labels in task.train.batches(AT_ONCE, generator=ctx.generator, augment=True, device=ctx.device):
                with ctx.accelerator.autocast():
                    parts.append((self.tuned(images).float(), labels))
            features, classes = zip(*parts, strict=True)
            self.classifier.partial_fit(torch.cat(features), torch.cat(classes))

    def train_task(self, task: Task, ctx: Context) -> None:
        """Train what the task trains, and a temporary head that starts at zero."""
        newest, start = self.tuner.newest, task.index == 0
        trained = [p for p in self.tuner.parameters() if (self.config.maps if p is newest else start)]
        if not trained:
            return
        width = self.backbone.feature_dim if start else self.config.projection
        head = nn.Parameter(torch.zeros(len(task.seen), width, device=ctx.device))
        plain = cross_entropy(lambda images: F.linear(self.tuned(images), head), self.config)
        loss = plain if start else self.residual_loss(head)
        epochs = (start and self.config.first_epochs) or self.config.epochs
        recipe = self.config.model_copy(update={"epochs": epochs})
        fit(loss, [ParamGroup([*trained, head])], task.train, recipe, ctx)

    def residual_loss(self, head: Tensor) -> Loss:
        """CE(H W' + H W, y), with W and the H before it constant; without ``residual`` CE(H W', y)."""
        weights = self.classifier.weights.float()

        @without_autocast()
        def loss(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            h = self.classifier.expand(features.float())
            logits = F.linear(h / self.unit, head)
            if self.config.residual:
                logits = logits + h.detach() @ weights
            return F.cross_entropy(logits, labels), logits

        return lambda images, labels: loss(self.tuned(images), labels)

    def views(self) -> Mapping[Hashable, View]:
        trained = self.stages if self.config.maps else min(self.stages, 1) if self.config.first else 0
        return {trained: self.tuned}

    def logits(self, features: Tensor) -> Tensor:
        return self.classifier.logits(features)
