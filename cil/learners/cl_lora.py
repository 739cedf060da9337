"""CL-LoRA: low-rank updates that all tasks share in the first blocks, and one per task in the others."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.views import require_views
from cil.classifiers import NCM, CosineHead
from cil.errors import ConfigError
from cil.features import View
from cil.learner import Context
from cil.learners.bases.new_classes import TaskOfClass, task_head
from cil.learners.bases.some_views import SomeViews
from cil.stream import Task
from cil.training import Loss, ParamGroup, Recipe, fit, local_cross_entropy
from cil.tuning.passes import Branches, FirstBlocks
from cil.tuning.query_value import QueryValueLora
from cil.utils.precision import without_autocast


class CLLoRA(TaskOfClass):
    """CL-LoRA: continual low-rank adaptation for rehearsal-free CIL (He et al., CVPR 2025, arXiv 2505.24816).

    Queries and values of the first blocks get B A: A has fixed orthonormal rows, and B is trained through all tasks.
    Those of the other blocks get μ_t B_t A_t per task, with μ_t a trained number per block and projection. Loss of task
    t: CE(σ cos(f_t(x), W)) over the task's own classes, with a head W that is dropped; from the second task on + 5 ·
    CE(softmax(h'/T), softmax(h/T)) + 10⁻⁴ · mean over k < t of |cos(μ_t, μ_k)|. h are the head's scores of the features
    after the first blocks, and h' those before the task. In the gradient of h with respect to B, each row is weighted
    by its length before the task. Score of class c of task k: the cosine of f_k(x) and the mean of the class under
    f_k. Keeps the shared pair, and a pair per task and block. At test the first blocks run once per image, the others
    once per task.
    """

    class Config(Recipe):
        rank: PositiveInt = Field(10, description="rank r of the updates")
        shared_blocks: PositiveInt | None = Field(
            None, description="number of first blocks with an update for all tasks; null: half of the blocks"
        )
        epochs: int = Field(20, gt=0, description="epochs per task")
        train_batch_size: int = Field(48, gt=0, description="images per optimiser step")
        lr: float = Field(0.03, gt=0, description="peak learning rate")
        weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")
        distillation: float = Field(5.0, ge=0, description="weight ≥ 0 of the distillation of the first blocks")
        temperature: float = Field(2.0, gt=0, description="temperature T > 0 of the distillation")
        orthogonality: float = Field(1e-4, ge=0, description="weight ≥ 0 of the cosines between tasks' μ")

    name = "cl_lora"
    summary = "a shared low-rank update in first blocks, one per task in others, class means in each"
    trains = "queries and values by low-rank updates, head"
    paper = "He et al., CL-LoRA: Continual Low-Rank Adaptation for Rehearsal-Free CIL, CVPR 2025, arXiv 2505.24816"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        require_views(backbone.model)
        self.depth = len(backbone.model.blocks)  # type: ignore[arg-type]
        self.first = self.depth // 2 if config.shared_blocks is None else config.shared_blocks
        if not 0 < self.first < self.depth:
            raise ConfigError(
                f"shared_blocks: got {self.first}, this backbone has {self.depth} blocks, of which at least one is for "
                f"the tasks' own updates; give 1 to {self.depth - 1}"
            )
        self.shared = QueryValueLora(backbone, config.rank, range(self.first)).requires_grad_(False)
        self.own = nn.ModuleList([self.fresh()])
        self.prototypes = NCM(backbone.feature_dim)
        self._newest = SomeViews(self, self.newest_view)

    def fresh(self) -> QueryValueLora:
        own = QueryValueLora(self.backbone, self.config.rank, range(self.first, self.depth), lengths=True)
        return own.requires_grad_(False)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index:
            self.own.append(self.fresh().to(ctx.device))
        else:
            self.shared.reset(ctx.generator)
        newest: Any = self.own[-1]
        newest.reset(ctx.generator)

    def learn(self, task: Task, ctx: Context) -> None:
        own: Any = self.own[-1]
        rows = task_head(CosineHead(self.backbone.feature_dim), task, ctx)
        loss = local_cross_entropy(lambda images: rows(self.newest(images)), self.config, task.classes[0])
        groups = [ParamGroup([self.shared.up, *own.parameters(), *rows.parameters()])]
        fit(self.keeping(loss, rows) if task.index else loss, groups, task.train, self.config, ctx)
        self.prototypes.partial_fit(*ctx.features(self._newest, task.train))

    def keeping(self, plain: Loss, rows: CosineHead) -> Loss:
        """``plain`` with the distillation of the shared updates, and the cosines between the tasks' μ."""
        config, old = self.config, FirstBlocks(copy.deepcopy(self.shared), self.first)
        lengths = self.shared.up.detach().norm(dim=3)  # of the rows of B, [L, 2, w]
        factors = lengths / lengths.mean(2, keepdim=True).clamp(min=1e-12)
        pairs: list[Any] = list(self.own)
        past = torch.stack([own.lengths.detach().flatten() for own in pairs[:-1]])

        def kept(images: Tensor) -> Tensor:
            with torch.no_grad():
                before = rows(self.backbone(images, old)) / config.temperature
            self.shared.gradient_factors = factors
            now = rows(self.backbone(images, FirstBlocks(self.shared, self.first))) / config.temperature
            self.shared.gradient_factors = None
            return F.cross_entropy(now, before.softmax(1))

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            value, logits = plain(images, labels)
            if config.distillation:
                value = value + config.distillation * kept(images)
            overlap = F.cosine_similarity(pairs[-1].lengths.flatten()[None], past, dim=1).abs().mean()
            return value + config.orthogonality * overlap, logits

        return loss

    def seen_by(self, tasks: Sequence[int], images: Tensor) -> Tensor:
        """Features [B, S · F] of images under the updates of S tasks, by index; the first blocks run once."""
        if not torch.compiler.is_exporting():  # the backbone counts one pass; these are the others, rounded up
            self.backbone.passes += -(-len(images) * (len(tasks) - 1) * (self.depth - self.first) // self.depth)
        chosen: list[Any] = [self.own[i] for i in tasks]
        return self.backbone(images, Branches(self.shared, chosen, self.first))

    def newest(self, images: Tensor) -> Tensor:
        """Features [B, F] under the updates of the newest task."""
        return self.seen_by([-1], images)

    def tuned(self, images: Tensor) -> Tensor:
        """Features [B, S · F] under the updates of every task."""
        return self.seen_by(range(len(self.own)), images)

    def newest_view(self) -> Mapping[Hashable, View]:
        return {("newest", self.stages): self.newest}

    def views(self) -> Mapping[Hashable, View]:
        return {self.stages: self.tuned}

    @without_autocast()
    def logits(self, features: Tensor) -> Tensor:
        """cos(f_k(x), mean of class c under f_k), with k the task of c, [B, C]."""
        views = features.float().unflatten(1, (-1, self.backbone.feature_dim)).unbind(1)
        by_view = torch.stack([self.prototypes.logits(view) for view in views])  # [S, B, C]
        return by_view.gather(0, self.task_of.expand(1, features.shape[0], -1))[0]
