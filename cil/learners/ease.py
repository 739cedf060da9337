"""EASE: one adapter per task, and class prototypes in the feature spaces of all adapters."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cil.backbone import FROZEN, Backbone
from cil.classifiers import NCM
from cil.features import View
from cil.learner import Context
from cil.learners.bases.task_adapters import AdapterRecipe, TaskAdapters, train_apart
from cil.stream import Task
from cil.utils.precision import without_autocast


class EASE(TaskAdapters):
    """EASE: expandable subspace ensemble (Zhou et al., arXiv 2403.12030).

    Task t trains a new adapter t with CE over the task's own classes, all others frozen; f_j(x) is the feature with
    adapter j. P[c, j], the prototype of class c in subspace j, is the mean of f_j over the class's training images if
    adapter j existed then (j ≤ task of c), and is synthesised from class similarities otherwise (:meth:`complement`).
    Keeps all adapters and prototypes. After T tasks an image has passed through the backbone once per adapter: the
    training images of task t through t adapters, each test image through T.
    """

    class Config(AdapterRecipe):
        alpha: float = Field(0.1, ge=0, description="weight α ≥ 0 of the subspaces of tasks other than the class's own")
        init_ptm: bool = Field(False, description="whether to add the subspace of the backbone without adapter")
        beta: float = Field(0.0, ge=0, description="weight ≥ 0 of the subspace without adapter")

    name = "ease"
    summary = "class prototypes in each adapter's features, missing ones estimated from similar classes"
    trains = "one adapter per task"
    paper = "Zhou et al., Expandable Subspace Ensemble, CVPR 2024, arXiv 2403.12030"

    prototypes: Tensor

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        # float64 [C, subspaces, F]
        self.register_buffer("prototypes", torch.zeros(0, self.subspaces, backbone.feature_dim, dtype=torch.float64))

    @property
    def subspaces(self) -> int:
        return len(self.adapters) + self.config.init_ptm

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        old = self.prototypes
        self.prototypes = old.new_zeros(len(task.seen), self.subspaces, self.backbone.feature_dim)
        self.prototypes[: len(old), : old.shape[1]] = old

    def learn(self, task: Task, ctx: Context) -> None:
        newest: Any = self.adapters[-1]
        train_apart(self, newest, task, ctx)
        first = task.classes[0]
        features, labels = ctx.features(self, task.train)
        means = NCM(features.shape[1]).partial_fit(features.cpu(), (labels - first).cpu()).means
        self.prototypes[first:] = means.view(len(task.classes), self.subspaces, -1).to(self.prototypes)
        self.complement()

    def complement(self) -> None:
        """Recompute the prototypes of old classes in all subspaces that are newer than the class.

        For tasks i < j let R be the classes of tasks j and later, whose prototypes in subspaces i and j are means of
        features: S = softmax_r cos(P[a, i], P[r, i]) over r ∈ R, and P[a, j] = Σ_r S[a, r] P[r, j] for the classes a of
        task i.
        """
        p, first = self.prototypes, int(self.config.init_ptm)  # subspace of adapter 0
        for j in range(1, len(self.adapters)):
            later = self.task_of >= j
            for i in range(j):
                own = self.task_of == i
                a, r = F.normalize(p[own, first + i], dim=1), F.normalize(p[later, first + i], dim=1)
                p[own, first + j] = (a @ r.T).softmax(dim=1) @ p[later, first + j]

    def views(self) -> Mapping[Hashable, View]:
        frozen: dict[Hashable, View] = {FROZEN: self.backbone} if self.config.init_ptm else {}
        return {**frozen, **super().views()}

    @without_autocast()
    def logits(self, features: Tensor) -> Tensor:
        """Σ_j w[c, j] · cos(f_j(x), P[c, j]) with w = 1 in the class's own subspace, α/t in the others."""
        f = F.normalize(features.float().unflatten(1, (self.subspaces, -1)), dim=2)
        p = F.normalize(self.prototypes, dim=2).to(f.dtype)
        own = F.one_hot(self.task_of, len(self.adapters)).to(f)
        weights = own + (1 - own) * self.config.alpha / max(1, len(self.adapters) - 1)
        if self.config.init_ptm:
            weights = torch.cat([weights.new_full((len(weights), 1), self.config.beta), weights], dim=1)
        return torch.einsum("bsf,csf,cs->bc", f, p, weights)
