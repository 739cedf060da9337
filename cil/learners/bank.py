"""What TUNA and MOS share: an adapter a task, a head aligned on Gaussians, and for every image a choice of adapter."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.classifiers import Gaussians, mean_scales
from cil.classifiers.heads import Head
from cil.features import View
from cil.learner import Context, RoutedLearner
from cil.learners.aligning import AlignedRecipe, align, softmax_of
from cil.stream import Task
from cil.training import Group, Loss, fit
from cil.tuning import Adapter


class BankRecipe(AlignedRecipe):
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty, in the alignment too")
    bottleneck: PositiveInt = Field(16, description="width of the adapters")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout inside the adapters, in training")
    warm_start: bool = Field(True, description="an adapter starts where the one before ended; false: drawn afresh")
    head_lr: float = Field(1.0, gt=0, description="factor on the learning rate for the head's new rows")
    alignment_epochs: NonNegativeInt = Field(30, description="passes over drawn vectors; 0: no alignment")
    alignment_lr: float = Field(0.005, gt=0, description="peak learning rate of the alignment")
    samples: PositiveInt = Field(240, description="vectors drawn per class and epoch, and per optimiser step")
    shrink_means: bool = Field(False, description="draw from Gaussians of older tasks around shorter means, as SLCA")


class AdapterBank(RoutedLearner):
    """Adapter t learns task t beside the frozen backbone, all others stay; every image passes once through each.

    One head has a row a class, whatever adapter the feature came through. After a task a Gaussian per new class is
    taken through the task's own adapter, and from the second task on all rows are trained on vectors drawn from all
    Gaussians. Features are those of the adapters side by side, then whatever :meth:`last_view` adds.
    """

    needs_new_classes = True

    task_of: Tensor

    def __init__(self, config: Any, backbone: Backbone, head: Head) -> None:
        super().__init__(config, backbone)
        self.adapters = nn.ModuleList([self.fresh_adapter()])
        self.head = head
        self.gaussians = Gaussians(backbone.feature_dim)
        self.register_buffer("task_of", torch.zeros(0, dtype=torch.int64))  # [C]
        self._newest = _Newest(self)

    def fresh_adapter(self) -> Adapter:
        return Adapter(self.backbone, self.config.bottleneck, dropout=self.config.dropout)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index:
            warm = self.config.warm_start
            self.adapters.append(copy.deepcopy(self.adapters[-1]) if warm else self.fresh_adapter().to(ctx.device))
        if not task.index or not self.config.warm_start:
            newest: Any = self.adapters[-1]
            newest.reset(ctx.generator)
        self.task_of = torch.cat([self.task_of, self.task_of.new_full((len(task.classes),), task.index)])

    def new_rows(self, task: Task, ctx: Context) -> Head:
        """Rows for the task's classes, to be trained by themselves: column 0 is the task's first class."""
        rows = type(self.head)(self.backbone.feature_dim)
        rows.grow(len(task.classes), ctx.generator)
        return rows.to(ctx.device)

    def acquire(
        self,
        task: Task,
        ctx: Context,
        loss: Loss,
        rows: Head,
        after_step: Callable[[], None] | None = None,
        together: bool = False,
    ) -> None:
        """Train the newest adapter and the new rows; take the new classes' Gaussians through it; align the head."""
        groups = [Group(self.adapters[-1].parameters()), Group(rows.rows, self.config.head_lr)]
        fit(loss, groups, task.train, self.config, ctx, after_step, together=together)
        self.head.extend(rows)
        self.gaussians.partial_fit(*ctx.features(self._newest, task.train))  # type: ignore[arg-type]  # as read only
        if task.index and self.config.alignment_epochs:
            self.align(ctx)

    def align(self, ctx: Context) -> None:
        """CE over all classes on vectors from N(s_c μ_c, Σ_c), for all rows; half a cosine wave over all epochs."""
        scales = mean_scales(self.task_of) if self.config.shrink_means else None
        align(softmax_of(self.scores), Group(self.head.rows), self.gaussians, scales, self.config, ctx)

    def scores(self, features: Tensor) -> Tensor:
        """Features [B, F] of one view → logits [B, C]."""
        return self.head(features)

    @abstractmethod
    def last_view(self) -> Mapping[Hashable, View]:
        """A view beside the adapters', or none."""

    def views(self) -> Mapping[Hashable, View]:
        views: dict[Hashable, View] = {
            j if self.seen else "not trained yet": partial(self.backbone, tuner=adapter)
            for j, adapter in enumerate(self.adapters)
        }
        return {**views, **self.last_view()}

    def features(self, images: Tensor) -> Tensor:
        return torch.cat([view(images) for view in self.views().values()], dim=1)

    @property
    def feature_version(self) -> Hashable:
        return tuple(self.views())

    def split(self, features: Tensor) -> Tensor:
        """Features of all views [B, S · F] → one row a view, float32 [B, S, F]; the adapters' come first."""
        return features.float().unflatten(1, (-1, self.backbone.feature_dim))

    def scores_by_view(self, views: Tensor) -> Tensor:
        """[B, S, F] → [B, S, C]."""
        return torch.stack([self.scores(view) for view in views.unbind(1)], dim=1)


def chosen(by_adapter: Tensor, tasks: Tensor) -> Tensor:
    """Row i of the result is ``by_adapter[i, tasks[i]]``: [B, T, C], int64 [B] → [B, C]."""
    # not take_along_dim, which fixes the batch size of an exported program
    return by_adapter.gather(1, tasks[:, None, None].expand(-1, 1, by_adapter.shape[2]))[:, 0]


class _Newest:
    """Eyes of the newest adapter alone. With a version a stage, the cache drops the training features of the last."""

    def __init__(self, learner: AdapterBank) -> None:
        self.learner = learner

    @property
    def training(self) -> bool:
        return self.learner.training

    def train(self, mode: bool = True) -> Any:
        return self.learner.train(mode)

    def views(self) -> Mapping[Hashable, View]:
        learner: Any = self.learner
        return {("newest adapter", learner.stages): partial(learner.backbone, tuner=learner.adapters[-1])}
