"""RAPF: one linear map of CLIP's image features, trained beside Gaussians of old classes and fused with its past."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from cil.classifiers.gaussians import Gaussians, ShrunkGaussians
from cil.learner import Context
from cil.learners.bases.old_vectors import WithOldClasses
from cil.learners.bases.texts import NamesClasses
from cil.prompts import TEMPLATES, Templates
from cil.stream import Task
from cil.training import ParamGroup, Recipe, Schedule, fit
from cil.training.recipe import Optimizer, Per

MARGIN = 0.1
"""Least difference of the cosines with a sample's own and with a similar new class."""


class RAPF(NamesClasses):
    """RAPF: adaptive representation adjustment and parameter fusion (Huang et al., arXiv 2407.14143).

    logits_c = s cos(A f, t_c), with f the raw feature in the joint space, A [d, d] the only trained weights, and a text
    t_c per class. A task minimises CE over all seen classes on its images and on 10 β vectors of each of m old classes'
    Gaussians, plus the mean of max(0, cos(A e, t_j) − cos(A e, t_i) + 0.1) over 20 β vectors e of the old class i of
    each hard pair: a new class j with ‖t_i − t_j‖ < θ. Then A is fused with the A before: entries that moved most, in
    the basis of the old one's left singular vectors, keep the new value (:func:`fused`). Images pass once, under the
    test transform. Keeps d² + d numbers per class.
    """

    class Config(NamesClasses.Config, Recipe):
        templates: Templates = Field(TEMPLATES["good"], description="sentences with {} for the class, or a set's name")
        epochs: PositiveInt = Field(15, description="epochs per task")
        train_batch_size: PositiveInt = Field(100, description="images per optimiser step, beside the sampled vectors")
        optimizer: Optimizer = Field("adam", description="optimiser")
        lr: PositiveFloat = Field(1e-3, description="peak learning rate")
        schedule: Schedule = Field("multistep", description="learning-rate schedule")
        milestones: list[PositiveInt] = Field([4, 10], description="epochs at which the rate falls to a tenth")
        schedule_per: Per = Field("epoch", description="interval at which the rate changes")
        init: Literal["uniform", "identity"] = Field(
            "uniform", description="first A; uniform: as in the paper's code, which does not start from zero-shot"
        )
        amount: PositiveFloat = Field(2.0, description="β: a tenth of the vectors per old class and step")
        per_step: PositiveInt = Field(2, description="number m of old classes that are sampled in a step")
        threshold: float = Field(0.55, ge=0, description="θ, the distance of texts below which classes are a hard pair")
        bias: float = Field(0.6, ge=0, le=1, description="b, the least share of the new value in the fusion")
        shrink: bool = Field(False, description="whether covariances are shrunk as in FeCAM before they are sampled")

    name = "rapf"
    summary = "one linear map of CLIP's features, trained beside Gaussians of old classes (RAPF)"
    trains = "one linear map"
    paper = "Huang et al., Class-Incremental Learning with CLIP, ECCV 2024, arXiv 2407.14143"
    needs_new_classes = True

    def make_parts(self, joint: int) -> None:
        self.gaussians = ShrunkGaussians(joint) if self.config.shrink else Gaussians(joint)
        self.map = nn.Parameter(torch.eye(joint), requires_grad=False)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.gaussians.grow(len(task.seen))
        if task.index == 0 and self.config.init == "uniform":
            bound = 1 / math.sqrt(len(self.map))
            drawn = torch.rand(self.map.shape, generator=ctx.generator, device=ctx.generator.device)
            self.map.data.copy_((2 * drawn - 1) * bound)

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        config = self.config
        features, labels = ctx.features(self, task.train)
        joint, old = self.text.project(features), self.map.detach().clone()
        size, pairs = config.train_batch_size, self._hard_pairs(task)
        data = WithOldClasses(
            joint, labels, self.gaussians, pairs, amount=config.amount, per_step=config.per_step, size=size
        )
        recipe = config.model_copy(update={"train_batch_size": size + data.sampled})
        fit(self._loss, [ParamGroup([self.map])], data, recipe, ctx)
        if task.index:
            self.map.data.copy_(fused(old, self.map.detach(), config.bias))
        self.gaussians.partial_fit(joint, labels)
        ctx.log("hard_pairs", len(pairs))

    def _hard_pairs(self, task: Task) -> list[tuple[int, int]]:
        """(old class, new class) with similar texts."""
        near = torch.cdist(self.text.prototypes.double(), self.text.prototypes.double()) < self.config.threshold
        first = task.classes[0]
        return [(i, j) for j in task.classes for i in range(first) if bool(near[i, j])]

    def _loss(self, joint: Tensor, rivals: Tensor, weights: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean over rows: cross-entropy, or the hinge where there is a rival class; and the logits."""
        cosines = F.normalize(joint @ self.map.T, dim=1) @ self.text.prototypes.T
        logits = self.text.scale * cosines
        own, rival = (cosines.gather(1, c.clamp(min=0)[:, None])[:, 0] for c in (labels, rivals))
        hinge = (rival - own + MARGIN).clamp(min=0)
        entropy = F.cross_entropy(logits, labels, reduction="none")
        return (weights * torch.where(rivals < 0, entropy, hinge)).mean(), logits

    def logits(self, features: Tensor) -> Tensor:
        mapped = F.normalize(self.text.project(features) @ self.map.T.to(features.dtype), dim=1)
        return self.text.scale * mapped @ self.text.prototypes.T.to(features.dtype)


def fused(old: Tensor, new: Tensor, bias: float) -> Tensor:
    """U (P ⊙ M + P₀ ⊙ (1 − M)) with A_old = U diag(S) Vᵀ, P = UᵀA_new, P₀ = diag(S) Vᵀ.

    M = min(1, |P − P₀| / max |P − P₀| + b).

    Args:
        old: A before the task, [d, d].
        new: A after it.
        bias: b in [0, 1]; 1 gives the new one.
    """
    u = torch.linalg.svd(old.double()).U
    before, after = u.T @ old.double(), u.T @ new.double()  # P₀ in this form is P itself if nothing moved
    moved = (after - before).abs()
    if not bool(moved.any()):
        return old
    share = (moved / moved.max() + bias).clamp(max=1)
    return (u @ (after * share + before * (1 - share))).to(old.dtype)
