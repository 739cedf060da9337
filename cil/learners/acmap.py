"""ACMap: the running mean of the tasks' adapters, and class prototypes that are moved to it."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.classifiers import NCM
from cil.features import View
from cil.learner import Context
from cil.learners.bases.new_classes import TaskOfClass
from cil.learners.bases.some_views import SomeViews
from cil.learners.bases.task_adapters import AdapterRecipe, train_apart
from cil.stream import Task
from cil.tuning import Adapter
from cil.utils.precision import exact, without_autocast


class ACMap(TaskOfClass):
    """ACMap: adapter merging with centroid prototype mapping (Fukuda et al., arXiv 2412.18219).

    Task 0 trains an adapter θ_0 from random weights; every later task starts from θ_0 again. The adapter in use is
    the mean of all, θ^(t) = (t θ^(t−1) + θ_t)/(t + 1), until ``merges`` are in it; then it stays. The prototype of a
    class is its mean feature under the adapter in use at its task i. It is moved by the mean, over the current classes,
    of their mean features under θ^(t) less those under θ^(i). Keeps the merged adapters and one prototype per class.
    One pass per image at test.
    """

    class Config(AdapterRecipe):
        merges: PositiveInt = Field(10, description="number of tasks that are trained and merged, the first included")
        mapped: bool = Field(True, description="whether prototypes of old classes are moved")

    name = "acmap"
    summary = "running mean of the tasks' adapters, with class prototypes moved to it"
    trains = "one adapter per task"
    paper = "Fukuda et al., Adapter Merging with Centroid Prototype Mapping, CVPR 2025, arXiv 2412.18219"

    shifts: Tensor

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.merged = nn.ModuleList([Adapter(backbone, config.bottleneck, dropout=config.dropout)])
        self.prototypes = NCM(backbone.feature_dim)
        # of the classes of each task, float64 [T, F]
        self.register_buffer("shifts", torch.zeros(0, backbone.feature_dim, dtype=torch.float64))
        self._all = SomeViews(self, self.all_views)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.prototypes.grow(len(task.seen))
        self.shifts = torch.cat([self.shifts, self.shifts.new_zeros(1, self.backbone.feature_dim)])
        if task.index == 0:
            self.merged[0].reset(ctx.generator)  # type: ignore[operator]
        elif task.index < self.config.merges:
            self.merged.append(copy.deepcopy(self.merged[-1]))

    def learn(self, task: Task, ctx: Context) -> None:
        changes = task.index < self.config.merges
        if changes:
            self.merge(self.train_adapter(task, ctx), task.index)
        features, labels = ctx.features(self._all if changes and self.config.mapped else self, task.train)
        by_adapter = features.split(self.backbone.feature_dim, dim=1)
        if changes and self.config.mapped:
            self.map(by_adapter, labels - task.classes[0])
            ctx.log("mean_shift", float(self.shifts[:-1].norm(dim=1).mean()) if task.index else 0.0)
        self.prototypes.partial_fit(by_adapter[-1], labels)

    def train_adapter(self, task: Task, ctx: Context) -> Adapter:
        """θ_t, with the task's own classes in the softmax of a temporary cosine head."""
        adapter: Any = copy.deepcopy(self.merged[0])
        train_apart(self, adapter, task, ctx)
        return adapter

    @exact()
    def merge(self, adapter: Adapter, t: int) -> None:
        """θ^(t), from its copy of θ^(t−1) and θ_t."""
        for mean, new in zip(self.merged[-1].parameters(), adapter.parameters(), strict=True):
            mean.copy_((t * mean + new) / (t + 1))

    @exact()
    def map(self, by_adapter: tuple[Tensor, ...], labels: Tensor) -> None:
        """Set the shift of each earlier task's classes, from the current features [N, F] under θ^(0) … θ^(t)."""
        present = labels.unique()
        means = [NCM(one.shape[1]).to(one.device).partial_fit(one, labels).means[present] for one in by_adapter]
        for i, before in enumerate(means):
            self.shifts[i] = (means[-1] - before).mean(0)

    def all_views(self) -> Mapping[Hashable, View]:
        """The views under every merged adapter, the newest last."""
        adapters: Any = self.merged
        return {("merged", i): partial(self.backbone, tuner=adapter) for i, adapter in enumerate(adapters)}

    def views(self) -> Mapping[Hashable, View]:
        version, view = list(self.all_views().items())[-1]
        return {version if self.seen else "not trained yet": view}

    @without_autocast()
    def logits(self, features: Tensor) -> Tensor:
        """cos(φ(x), p_c + the shift of its task)."""
        moved = self.prototypes.means + self.shifts[self.task_of]
        scores = F.normalize(features, dim=1) @ F.normalize(moved, dim=1).T.to(features)
        return self.prototypes.only_seen(scores)
