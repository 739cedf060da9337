"""Routed: one expert per task, kept as a low-rank update, and one of them chosen for each image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from cil.backbone import FROZEN, Backbone
from cil.classifiers import LDA
from cil.features import View
from cil.learner import Context, RoutedLearner
from cil.learners.bases.adapter_bank import select_adapter
from cil.learners.bases.banked import BankedRecipe, experts_of
from cil.learners.bases.merged_space import mergeable, require_weights
from cil.learners.bases.new_classes import TaskOfClass
from cil.learners.bases.routers import Gates, OwnScale, certainty, of_tasks
from cil.learners.bases.some_views import SomeViews
from cil.learners.bases.task_training import train_tuner
from cil.merging import ExpertBank
from cil.stream import Task
from cil.tuning import AddedWeights, Tuner
from cil.tuning.token_experts import InputEnergies
from cil.utils.precision import without_autocast


class Routed(TaskOfClass, RoutedLearner):
    """A bank of experts with a router per image and one classifier over all classes. This combination is ours.

    Task t: θ_t = θ_0 + Δ_t is trained from the pre-trained θ_0 on the task's own classes, with a cosine head that is
    then dropped, and Δ_t is kept at its rank (:class:`cil.merging.ExpertBank`). Every class is measured through its own
    task's expert, so no statistic is ever stale. An image takes one expert t̂, chosen by the router:

    * ``frozen_lda``: argmax_t Σ_{c of task t} p_0(c | x), the posterior of an LDA on frozen features φ_0.
    * ``entropy``: the expert whose posterior over all classes has the lowest entropy (TUNA, arXiv 2508.08165).
    * ``smile``: argmax_t of Σ_l mean_tokens ‖V_{t,l}ᵀ h_l‖² / ‖h_l‖², with the first input directions V_{t,l} of Δ_t in
      layer l and the frozen inputs h_l (SMILE, arXiv 2408.10174), standardised on task t's own training images.
    * ``gates``: linear gates on φ_0, each fitted to its task's images alone (:class:`Gates`, after arXiv 2505.11883).

    Scores are an LDA over all classes at φ_{t̂}(x) (``all``), that of the classes of t̂ alone (``task``), or the sum of
    its log-posterior and that of the frozen LDA (``sum``). Keeps the bank and the sums of both LDAs. Forward passes per
    training image: one per epoch, and one under each of θ_0 and θ_t (and one for energies, with ``smile``).
    """

    class Config(BankedRecipe):
        router: Literal["frozen_lda", "entropy", "smile", "gates"] = Field(
            "frozen_lda", description="what chooses the expert of an image"
        )
        scores: Literal["all", "task", "sum"] = Field(
            "all",
            description="classes that the chosen expert's features are compared with: all; those of its task; or all, "
            "with the log-posterior of the frozen backbone added",
        )
        directions: PositiveInt = Field(
            4, description="directions per layer that smile measures, or per task that gates protects"
        )
        shrinkage: float = Field(1e-2, ge=0, le=1, description="shrinkage in [0, 1] of the covariances of both LDAs")

    name = "routed"
    summary = "one low-rank expert per task, chosen for each image without the task"
    trains = "one tuner per task"
    paper = "unpublished, a method of this library; its routers are of SMILE, TUNA and MINGLE"
    trains_backbone = True

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.models = mergeable(config.tuner, backbone)
        require_weights(self.name, self.models, "a bank keeps updates of weights")
        self.bank = self.models.start(ExpertBank(config.max_rank, config.dtype))
        self.frozen = LDA(backbone.feature_dim, config.shrinkage, priors="uniform")
        self.classifier = LDA(backbone.feature_dim, config.shrinkage, priors="uniform")
        self.gates = Gates(backbone.feature_dim, config.directions) if config.router == "gates" else None
        self.own_scale = OwnScale() if config.router == "smile" else None
        self._experts: list[tuple[AddedWeights]] = []  # in tuples, which keep the tuners out of the state
        self._energies: tuple[InputEnergies, ...] = ()
        self._newest = SomeViews(self, self._newest_views)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index == 0:
            self.models.draw(ctx.generator)
            self._experts, self._energies = [], ()
        self.frozen.grow(len(task.seen))
        self.classifier.grow(len(task.seen))

    def learn(self, task: Task, ctx: Context) -> None:
        self.bank.add_update(self.models.update(self.train_task(task, ctx), self.models.initial))
        self._energies = ()
        ctx.log("bank_bytes", self.bank.bytes)
        features, labels = ctx.features(self.backbone, task.train)
        self.frozen.partial_fit(features, labels)
        if self.gates is not None:
            self.gates.fit(features)
        own, _ = ctx.features(self._newest, task.train)
        self.classifier.partial_fit(own[:, : self.backbone.feature_dim], labels)
        if self.own_scale is not None:
            self.own_scale.fit(own[:, -1])

    def train_task(self, task: Task, ctx: Context) -> Tuner:
        """Train θ_t from θ_0, with the task's own classes in the softmax of a head that is dropped."""
        return train_tuner(self.models, self.models.initial, self.backbone, self.config, task, ctx)[0]

    def expert(self, t: int) -> View:
        """The features under θ_t."""
        for i in range(len(self._experts), t + 1):
            self._experts.append((AddedWeights(self.models.initial, self.bank.products(i)),))
        return partial(self.backbone, tuner=self._experts[t][0])

    def energies(self, images: Tensor) -> Tensor:
        """The energy of the layers' inputs in every expert's directions, [B, T]."""
        if not self._energies:
            self._energies = (InputEnergies(self.backbone, experts_of(self.bank), self.config.directions),)
        found = self._energies[0].energies(self.backbone, images)
        return images.new_zeros(images.shape[0], int(self.bank.count)) if found is None else found

    def views(self) -> Mapping[Hashable, View]:
        # the count is the value of a tensor, which a program must not read while it is exported
        tasks = self.stages if torch.compiler.is_exporting() else int(self.bank.count)
        found: dict[Hashable, View] = {FROZEN: self.backbone}
        found |= {("expert", t): self.expert(t) for t in range(tasks)}
        return found | ({("energies", tasks): self.energies} if self.own_scale is not None and tasks else {})

    def _newest_views(self) -> Mapping[Hashable, View]:
        newest = int(self.bank.count) - 1
        found: dict[Hashable, View] = {("newest", newest): self.expert(newest)}
        return found | ({("energies", newest + 1): self.energies} if self.own_scale is not None else {})

    def split(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, …] → frozen [B, F], those of all experts [B, T, F], energies [B, T] (or [B, 0])."""
        width, measured = self.backbone.feature_dim, 0 if self.own_scale is None else 1
        tasks = (features.shape[1] - width) // (width + measured)
        frozen, experts, energies = features.float().split([width, width * tasks, measured * tasks], dim=1)
        return frozen, experts.unflatten(1, (-1, width)), energies

    @without_autocast()
    def route(self, features: Tensor) -> Tensor:
        frozen, experts, energies = self.split(features)
        if self.own_scale is not None:
            return self.own_scale(energies).argmax(1)
        if self.gates is not None:
            return self.gates(frozen).argmax(1)
        if self.config.router == "entropy":
            return certainty(torch.stack([self.classifier.logits(x) for x in experts.unbind(1)], dim=1)).argmax(1)
        return of_tasks(self.frozen.logits(frozen), self.task_of, experts.shape[1]).argmax(1)

    @without_autocast()
    def routed_logits(self, features: Tensor, tasks: Tensor) -> Tensor:
        frozen, experts, _ = self.split(features)
        logits = self.classifier.logits(select_adapter(experts, tasks))
        if self.config.scores == "sum":
            return logits.log_softmax(1) + self.frozen.logits(frozen).log_softmax(1)
        if self.config.scores == "task":
            lowest = logits.amin(1, keepdim=True) - 1
            return torch.where(self.task_of[None] == tasks[:, None], logits, lowest)
        return logits
