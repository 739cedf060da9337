"""EASE: one adapter a task, prototypes over all their subspaces."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from cil.backbone import FROZEN, Backbone
from cil.classifiers import NCM, CosineHead
from cil.features import View
from cil.learner import Context, Learner
from cil.precision import without_autocast
from cil.stream import Task
from cil.training import Group, Recipe, fit, local_cross_entropy
from cil.tuning import Adapter


class EASE(Learner):
    """EASE: expandable subspace ensemble (Zhou et al., arXiv 2403.12030).

    Task t trains a fresh adapter t, all others frozen; f_j(x) is the feature with adapter j. P[c, j], the prototype of
    class c in subspace j, is the mean of f_j over the class's images where these were there to see it (j ≤ task of c),
    and is synthesised from class similarities otherwise (:meth:`complement`). Every image passes once through every
    adapter that is asked for it: T(T+1)/2 adapter passes over a stream of T tasks of training images, T of test images.
    """

    class Config(Recipe):
        epochs: int = Field(20, gt=0, description="passes over each task")
        train_batch_size: int = Field(48, gt=0, description="images an optimiser step")
        lr: float = Field(0.025, gt=0, description="peak learning rate")
        weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")
        bottleneck: PositiveInt = Field(64, description="width of the adapters")
        dropout: float = Field(0.1, ge=0, lt=1, description="dropout inside the adapters, in training")
        alpha: float = Field(0.1, ge=0, description="weight of the subspaces of other tasks than the class's own")
        init_ptm: bool = Field(False, description="add the subspace of the backbone without adapter")
        beta: float = Field(0.0, ge=0, description="weight of that subspace")

    name = "ease"
    paper = "Zhou et al., Expandable Subspace Ensemble, CVPR 2024, arXiv 2403.12030"
    needs_new_classes = True

    prototypes: Tensor
    task_of: Tensor

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.adapters = nn.ModuleList([self.fresh_adapter(backbone)])
        # float64 [C, subspaces, F]; int64 [C]
        self.register_buffer("prototypes", torch.zeros(0, self.subspaces, backbone.feature_dim, dtype=torch.float64))
        self.register_buffer("task_of", torch.zeros(0, dtype=torch.int64))

    def fresh_adapter(self, backbone: Backbone) -> Adapter:
        return Adapter(backbone, self.config.bottleneck, dropout=self.config.dropout)

    @property
    def subspaces(self) -> int:
        return len(self.adapters) + self.config.init_ptm

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index:
            self.adapters.append(self.fresh_adapter(self.backbone).to(ctx.device))
        newest: Any = self.adapters[-1]
        newest.reset(ctx.generator)
        old = self.prototypes
        self.prototypes = old.new_zeros(len(task.seen), self.subspaces, self.backbone.feature_dim)
        self.prototypes[: len(old), : old.shape[1]] = old
        self.task_of = torch.cat([self.task_of, self.task_of.new_full((len(task.classes),), task.index)])

    def learn(self, task: Task, ctx: Context) -> None:
        adapter, first = self.adapters[-1], task.classes[0]
        head = CosineHead(self.backbone.feature_dim)
        head.grow(len(task.classes), ctx.generator)
        head.to(ctx.device)
        loss = local_cross_entropy(lambda images: head(self.backbone(images, adapter)), self.config, first)
        fit(loss, [Group([*adapter.parameters(), *head.parameters()])], task.train, self.config, ctx)
        features, labels = ctx.features(self, task.train)
        true = NCM(features.shape[1]).partial_fit(features.cpu(), (labels - first).cpu()).means
        self.prototypes[first:] = true.view(len(task.classes), self.subspaces, -1).to(self.prototypes)
        self.complement()

    def complement(self) -> None:
        """Prototypes of old classes in subspaces that came after them, all anew.

        For a task i < j, with R the classes of tasks j and later, whose prototypes are true in both subspaces:
        S = softmax_r cos(P[a, i], P[r, i]) over r ∈ R, and P[a, j] = Σ_r S[a, r] P[r, j] for the classes a of task i.
        """
        p, first = self.prototypes, int(self.config.init_ptm)  # subspace of adapter 0
        for j in range(1, len(self.adapters)):
            later = self.task_of >= j
            for i in range(j):
                own = self.task_of == i
                a, r = F.normalize(p[own, first + i], dim=1), F.normalize(p[later, first + i], dim=1)
                p[own, first + j] = (a @ r.T).softmax(dim=1) @ p[later, first + j]

    def views(self) -> Mapping[Hashable, View]:
        views: dict[Hashable, View] = {FROZEN: self.backbone} if self.config.init_ptm else {}
        for j, adapter in enumerate(self.adapters):
            views[j if self.seen else "not trained yet"] = partial(self.backbone, tuner=adapter)
        return views

    def features(self, images: Tensor) -> Tensor:
        return torch.cat([view(images) for view in self.views().values()], dim=1)

    @property
    def feature_version(self) -> Hashable:
        return tuple(self.views())

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
