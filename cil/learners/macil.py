"""MACIL: SSIAT with one low-rank update per task, and losses that keep distances within classes, and patch tokens."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers.mahalanobis import Mahalanobis
from cil.learner import Context
from cil.learners.bases.alignment import align, mean_scales, normalized_softmax_of
from cil.learners.bases.reusing import refuse_reuse
from cil.learners.bases.steering import distance_change, patch_change
from cil.learners.ssiat import SSIAT, CorrectedRecipe
from cil.stream import Task
from cil.training import Loss, ParamGroup, Recipe, check_whole_steps, fit
from cil.training.processes import across_processes
from cil.tuning import LowRankBank, Tuner
from cil.tuning.passes import Tokens
from cil.utils.linalg import shifted_cholesky
from cil.utils.precision import exact


class MACIL(SSIAT):
    """MACIL: Mahalanobis anchored class-incremental learning (arXiv 2502.07560), on top of SSIAT.

    Keys and values of every block get W_t = W_{t−1} + B_t A_t, both factors trained, and then folded. Loss of later
    tasks: CosFace + λ_M · :func:`~cil.learners.bases.steering.distance_change` +
    λ_P · :func:`~cil.learners.bases.steering.patch_change`, against W_{t−1} on the same images. The metric of a new
    class c is the inverse of Σ_c + 10 v_1 I + 10 v_2 (1 1ᵀ − I) + 10⁻³ I, with Σ_c the covariance of its features under
    W_{t−1} and v_1, v_2 the means of its diagonal and of the other entries. Means of old classes are corrected as
    in SSIAT; the alignment divides logits by their mean norm over tasks, as in SLCA. Keeps the updated weights, the
    head and one Gaussian per class. One pass per image at test, for any number of tasks.
    """

    class Config(CorrectedRecipe):
        rank: PositiveInt = Field(32, description="rank r of a task's update, at most the backbone's width")
        weight_decay: float = Field(0.0, ge=0, description="L2 penalty, in training and alignment")
        margin: float = Field(0.0, ge=0, lt=2, description="margin m of CosFace, a cosine in [0, 2)")
        distance_weight: float = Field(1.0, ge=0, description="weight λ_M ≥ 0 of the change of distances in a class")
        patch_weight: float = Field(0.4, ge=0, description="weight λ_P ≥ 0 of the change of patch tokens")
        drift_bandwidth: float | None = Field(
            1.0, gt=0, description=CorrectedRecipe.model_fields["drift_bandwidth"].description
        )
        temperature: float = Field(0.1, gt=0, description="temperature τ > 0 of the logit normalisation")

        @model_validator(mode="after")
        def _whole_steps(self) -> Any:
            check_whole_steps(self, "distance_weight")
            refuse_reuse(self, "macil", "has its own terms against drift")
            return self

    name = "macil"
    summary = "SSIAT with low-rank updates that keep distances within new classes and patch tokens"
    trains = "keys and values by low-rank updates, head"
    paper = "MACIL: Navigating Semantic Drift in Task-Agnostic Class-Incremental Learning, ICML 2025, arXiv 2502.07560"

    tuner: LowRankBank

    def make_tuner(self, backbone: Backbone) -> Tuner:
        return LowRankBank(backbone, self.config.rank, "kv")

    def train_on(self, task: Task, cosface_loss: Loss, groups: list[ParamGroup], recipe: Recipe, ctx: Context) -> None:
        if task.index:
            self.tuner.renew(ctx.generator)
        if task.index and (self.config.distance_weight or self.config.patch_weight):
            self.train_held(task, cosface_loss, groups, recipe, ctx)
        else:
            super().train_on(task, cosface_loss, groups, recipe, ctx)
        self.tuner.fold()

    def train_held(
        self, task: Task, cosface_loss: Loss, groups: list[ParamGroup], recipe: Recipe, ctx: Context
    ) -> None:
        """Minimise L + λ_M L_M + λ_P L_P, with W_{t−1} in a copy of the tuner that is dropped afterwards."""
        config, first = self.config, task.classes[0]
        vit: Any = self.backbone.model
        whitening = self.whitening(*ctx.features(self, task.train), first) if config.distance_weight else None
        now, before = (Tokens(t) for t in (self.tuner, copy.deepcopy(self.tuner).requires_grad_(False).eval()))

        def seen(images: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
            found = self.backbone(images, tokens)
            return vit.forward_head(found, pre_logits=True), found

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            features, new = seen(images, now)
            with torch.no_grad():
                old_features, old = seen(images, before)
            value, logits = cosface_loss(features, labels)
            if whitening is not None:
                rows = (features.float(), old_features.float(), labels - first)
                change = across_processes(partial(distance_change, whitening=whitening), ctx.accelerator, *rows)
                value = value + config.distance_weight * change
            prefix = vit.num_prefix_tokens
            classes = features if features.shape[1] == new.shape[2] else new[:, 0]  # a joint space may be narrower
            return value + config.patch_weight * patch_change(new[:, prefix:], old[:, prefix:], classes), logits

        fit(loss, groups, task.train, recipe, ctx, batch_loss=whitening is not None)

    @exact()
    def whitening(self, features: Tensor, labels: Tensor, first: int) -> Tensor:
        """L_c⁻¹ of each new class, float32 [C_t, F, F], from features [N, F]; L_c L_cᵀ is the shrunk covariance."""
        moments = Mahalanobis(features.shape[1], (10.0, 10.0), normalize=False, correlation=False)
        moments.to(features.device).partial_fit(features, labels - first)
        eye = torch.eye(features.shape[1]).to(moments.sums)
        shrunk = (moments.shrunk(moments.own_or_pooled(c)) for c in range(moments.num_classes))
        factors = (shifted_cholesky(one, 1e-3)[0] for one in shrunk)
        return torch.stack([torch.linalg.solve_triangular(one, eye, upper=False).float() for one in factors])

    def align(self, ctx: Context) -> None:
        """Minimise CE(z / (n τ), y) over all rows, on vectors from all Gaussians."""
        loss = normalized_softmax_of(self.head, self.task_of, self.config.temperature)
        scales = mean_scales(self.task_of)
        align(loss, ParamGroup([self.head.weight]), self.gaussians, scales, self.config, ctx)
