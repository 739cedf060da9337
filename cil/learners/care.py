"""CaRE: experts of all tasks in every block, mixed by the routers of the tasks that are surest of an image."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers import CosineHead, Gaussians
from cil.features import View
from cil.learner import Context, RoutedLearner
from cil.learners.bases.adapter_bank import select_adapter
from cil.learners.bases.alignment import AlignedRecipe, align, mean_scales, softmax_of
from cil.learners.bases.new_classes import TaskOfClass, task_head
from cil.learners.bases.some_views import SomeViews
from cil.stream import Task
from cil.training import ParamGroup, cosface, fit
from cil.tuning.routed import RoutedBank, entropy
from cil.utils.precision import without_autocast


class CaRE(TaskOfClass):
    """CaRE (arXiv 2602.03473) in its single-pass form.

    In every block each task has an expert (a small adapter), a router over the experts up to its own, and a head that
    guesses its classes from the expert's class token. For an image, the routers of the M tasks whose guesses have the
    lowest entropy each mix their top K experts; the block adds the sum, and an adapter that task 0 trained. Task t
    trains its own three parts, with its own router always among the M: L = CosFace + mean over blocks of ½ (CosFace of
    the guess + τ² KL(final scores ‖ guess)). Then the head's rows are aligned on one Gaussian per class. Keeps
    all parts, the head and the Gaussians. One pass per image at test, through one expert per task and block.
    """

    class Config(AlignedRecipe):
        epochs: int = Field(20, gt=0, description="epochs per task")
        train_batch_size: int = Field(32, gt=0, description="images per optimiser step")
        lr: float = Field(0.02, gt=0, description="peak learning rate")
        weight_decay: float = Field(5e-4, ge=0, description="L2 penalty, in training and alignment")
        shared: PositiveInt = Field(64, description="width of the adapter that the first task trains")
        bottleneck: PositiveInt = Field(16, description="width of the experts in units")
        dropout: float = Field(0.1, ge=0, lt=1, description="dropout probability inside the adapters, in training")
        routers: int = Field(2, ge=2, description="number M ≥ 2 of tasks whose routers act on an image")
        experts: PositiveInt = Field(3, description="number K of experts that a router mixes")
        scale: float = Field(20.0, gt=0, description="factor s > 0 on the cosines in every softmax")
        margin: float = Field(0.0, ge=0, lt=2, description="margin m of CosFace, a cosine in [0, 2)")
        guess_weight: float = Field(1.0, ge=0, description="weight ≥ 0 of the losses of the blocks' guesses")
        alignment_epochs: int = Field(30, ge=0, description="epochs of the alignment; 0: no alignment")
        alignment_lr: float = Field(0.005, gt=0, description="peak learning rate of the alignment")

    name = "care"
    summary = "experts of all tasks in each block, mixed by the surest tasks' routers, in one pass"
    trains = "one expert and router per block and task, head"
    paper = "CaRE, ICML 2026, arXiv 2602.03473"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        c = config
        self.bank = RoutedBank(backbone, c.shared, c.bottleneck, c.dropout, c.routers, c.experts).requires_grad_(False)
        self.head = CosineHead(backbone.feature_dim)
        self.head.sigma.requires_grad_(False)  # it stays 1: the factor s is in the configuration
        self.gaussians = Gaussians(backbone.feature_dim, rank=config.covariance_rank)
        self._own = SomeViews(self, self.own_view)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index == 0:
            self.bank.shared.reset(ctx.generator)
        self.bank.grow(len(task.classes), ctx.generator)
        self.bank.requires_grad_(False)

    def learn(self, task: Task, ctx: Context) -> None:
        self.head.extend(self.train_part(task, ctx))
        self.gaussians.partial_fit(*ctx.features(self._own, task.train))
        if task.index and self.config.alignment_epochs:
            scales = mean_scales(self.task_of)
            align(softmax_of(self.scores), ParamGroup(self.head.rows), self.gaussians, scales, self.config, ctx)

    def train_part(self, task: Task, ctx: Context) -> CosineHead:
        """Train the task's part and new rows, on task 0 also the shared adapter; returns the rows."""
        config, first, routed = self.config, task.classes[0], self.bank.under(task.index)
        rows = task_head(CosineHead(self.backbone.feature_dim), task, ctx)

        def padded(scores: Tensor) -> Tensor:
            return F.pad(scores, (first, 0), value=-math.inf)

        margin_loss = cosface(padded, config, first, config.scale, config.margin)

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            cosines = rows(self.backbone(images, routed))
            value, logits = margin_loss(cosines, labels)
            final = config.scale * cosines.detach().float()
            for i, guess in enumerate(routed.guesses):
                tau = 1.0 if 2 * i < len(routed.guesses) else 2.0
                told = F.kl_div(
                    (guess / tau).log_softmax(1), (final / tau).log_softmax(1), reduction="batchmean", log_target=True
                )
                part = margin_loss(guess, labels)[0] + tau**2 * told
                value = value + config.guess_weight / 2 * part / len(routed.guesses)
            return value, logits

        trained = [*self.bank.parts[-1].parameters(), *(() if task.index else self.bank.shared.parameters())]
        fit(loss, [ParamGroup([*trained, rows.weight])], task.train, config, ctx)
        return rows

    def under(self, task: int | None, images: Tensor) -> Tensor:
        """Features [B, F] of images under a task's routing, or under that for any image."""
        return self.backbone(images, self.bank.under(task))

    def own_view(self) -> Mapping[Hashable, View]:
        """The view under the newest task's routing."""
        return {("task", self.stages - 1): partial(self.under, self.stages - 1)}

    def views(self) -> Mapping[Hashable, View]:
        return {("any", self.stages): partial(self.under, None)}

    def scores(self, features: Tensor) -> Tensor:
        return self.config.scale * self.head(features)

    @without_autocast()
    def logits(self, features: Tensor) -> Tensor:
        return self.scores(features.float())


class CaREEnsemble(CaRE, RoutedLearner):
    """CaRE as its published numbers were made: an ensemble of passes over the same parts as ``care``.

    An image also passes under the routing of every task's training. The score of a class is the sum of its
    probabilities under the task whose softmax over all classes has the lowest entropy, and under the routing for any
    image. t + 2 passes per image at test (1 after the first task, when all are equal).
    """

    name = "care_ensemble"
    summary = "CaRE's pass for any image, with one under the surest task's own routing"

    def views(self) -> Mapping[Hashable, View]:
        tasks: dict[Hashable, View] = {("task", i): partial(self.under, i) for i in range(len(self.bank.parts))}
        return {**tasks, **super().views()} if len(tasks) != 1 else tasks

    def by_view(self, features: Tensor) -> Tensor:
        """log p of all views [B, S, C]; those of the tasks come first."""
        views = features.float().unflatten(1, (-1, self.backbone.feature_dim))
        return torch.stack([self.scores(view) for view in views.unbind(1)], dim=1).log_softmax(2)

    @without_autocast()
    def route(self, features: Tensor) -> Tensor:
        return entropy(self.by_view(features)[:, : max(1, len(self.bank.parts))]).argmin(1)

    @without_autocast()
    def routed_logits(self, features: Tensor, tasks: Tensor) -> Tensor:
        """p under the routing of ``tasks`` + p under that for any image, [B, C]."""
        p = self.by_view(features).exp()
        return select_adapter(p, tasks) + p[:, -1]

    def logits(self, features: Tensor) -> Tensor:
        return RoutedLearner.logits(self, features)
