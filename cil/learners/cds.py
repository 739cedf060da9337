"""CDS: SSIAT with a loss that keeps similarities to old classes, and Gaussians that follow similar new classes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cil.classifiers.drift import similarities
from cil.learner import Context
from cil.learners.bases.reusing import refuse_reuse
from cil.learners.bases.steering import similarity_change
from cil.learners.ssiat import SSIAT
from cil.stream import Task
from cil.training import Loss, ParamGroup, Recipe, fit


class CDS(SSIAT):
    """CDS (CVPR 2026), on top of SSIAT.

    Loss of later tasks: CosFace + λ · mean_i Σ_c (cos(φ_t(x_i), μ_c) − cos(φ_{t−1}(x_i), μ_c))² over the old classes c
    (:func:`~cil.learners.bases.steering.similarity_change`). φ_{t−1} uses a frozen copy of the tuner from before the
    task, which is dropped afterwards. Drift: δ_j is the shift of the mean of new class j during the training, and
    w_cj = softmax_j(γ · cos(μ_c, μ_j)) with μ_j from before it. Then μ_c ← μ_c + Σ_j w_cj δ_j and
    Σ_c ← Σ_c + ρ · Σ_j w_cj² δ_j δ_jᵀ. Statistics, alignment and what is kept are SSIAT's.
    """

    class Config(SSIAT.Config):
        consistency: float = Field(5.0, ge=0, description="weight λ ≥ 0 of the change of similarities to old classes")
        sharpness: float = Field(
            10.0, gt=0, description="factor γ > 0 on the cosines that decide which new classes an old class follows"
        )
        spread: float = Field(10.0, ge=0, description="factor ρ ≥ 0 on what the shifts add to old covariances")
        first_head_lr_factor: float = Field(
            10.0, gt=0, description="factor on the learning rate for the head's rows in the first task"
        )
        drift_bandwidth: float | None = Field(
            None,
            gt=0,
            description="standard deviation σ > 0 of SSIAT's correction of old means, which then replaces that of CDS; "
            "null: CDS's",
        )

        @model_validator(mode="after")
        def _own_terms(self) -> Any:
            refuse_reuse(self, "cds", "has its own term against drift")
            return self

    name = "cds"
    summary = "SSIAT that keeps new images' similarities to old classes, and widens old Gaussians"
    trains = "one tuner, head"
    paper = "CDS, CVPR 2026, code at github.com/lambor9973/cds"

    corrects = True

    def train_on(self, task: Task, cosface_loss: Loss, groups: list[ParamGroup], recipe: Recipe, ctx: Context) -> None:
        if task.index == 0:
            *tuner, rows = (p for group in groups for p in group.parameters)
            groups = [ParamGroup(tuner), ParamGroup([rows], self.config.first_head_lr_factor)]
        if task.index == 0 or not self.config.consistency:
            super().train_on(task, cosface_loss, groups, recipe, ctx)
            return
        means = self.gaussians.means.float()
        snapshot = copy.deepcopy(self.tuner).requires_grad_(False).eval()

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            features = self.tuned(images)
            value, logits = cosface_loss(features, labels)
            with torch.no_grad():
                old = self.backbone(images, snapshot)
            return value + self.config.consistency * similarity_change(features, old, means), logits

        fit(loss, groups, task.train, recipe, ctx)

    def correct_drift(self, before: Tensor, after: Tensor, labels: Tensor, ctx: Context) -> None:
        """Move old classes with the new ones they resemble, and widen them in these directions."""
        if self.config.drift_bandwidth is not None:
            super().correct_drift(before, after, labels, ctx)
            return
        old, new = self.gaussians.means, labels.unique()
        start, end = (torch.stack([x[labels == c].double().mean(0) for c in new]) for x in (before, after))
        weights, drifts = similarities(old, start.to(old), self.config.sharpness), (end - start).to(old)
        shifts = weights @ drifts
        ctx.log("mean_drift", float(shifts.norm(dim=1).mean()))
        self.gaussians.translate(shifts, self.config.spread**0.5 * weights[..., None] * drifts)
