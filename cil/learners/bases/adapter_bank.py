"""The base of TUNA and MOS: one adapter per task, a head aligned on Gaussians, and a choice of adapter per image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers import Gaussians
from cil.classifiers.heads import Head
from cil.features import View
from cil.learner import Context, RoutedLearner
from cil.learners.bases.alignment import AlignedRecipe, align, mean_scales, softmax_of
from cil.learners.bases.some_views import SomeViews
from cil.learners.bases.task_adapters import TaskAdapters
from cil.stream import Task
from cil.training import Loss, ParamGroup, fit


class BankRecipe(AlignedRecipe):
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty, in training and alignment")
    bottleneck: PositiveInt = Field(16, description="width of the adapters in units")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout probability inside the adapters, in training")
    warm_start: bool = Field(
        True, description="start an adapter from the previous one's weights; false: from random weights"
    )
    head_lr_factor: float = Field(1.0, gt=0, description="factor on the learning rate for the head's new rows")
    alignment_epochs: NonNegativeInt = Field(30, description="epochs of the alignment; 0: no alignment")
    alignment_lr: float = Field(0.005, gt=0, description="peak learning rate of the alignment")
    samples: PositiveInt = Field(
        240, description="vectors sampled per class and epoch of the alignment, and per optimiser step"
    )
    shrink_means: bool = Field(
        False, description="scale the means of older tasks' Gaussians down before sampling, as SLCA does"
    )


class AdapterBank(TaskAdapters, RoutedLearner):
    """Adapter t is trained on task t only, then frozen; an image passes through the backbone once per adapter.

    One head serves the features of all adapters and has one row per class. After each task the learner stores one
    Gaussian per new class, estimated with the task's own adapter. From the second task on it then trains all rows of
    the head on vectors sampled from all Gaussians. Features are those of all adapters side by side, followed by
    :meth:`last_view`.
    """

    def __init__(self, config: Any, backbone: Backbone, head: Head) -> None:
        super().__init__(config, backbone)
        self.head = head
        self.gaussians = Gaussians(backbone.feature_dim, rank=config.covariance_rank)
        self._newest = SomeViews(self, self._newest_view)

    @property
    def warm_start(self) -> bool:
        return self.config.warm_start

    def acquire(
        self,
        task: Task,
        ctx: Context,
        loss: Loss,
        rows: Head,
        after_step: Callable[[], None] | None = None,
        batch_loss: bool = False,
    ) -> None:
        """Train the newest adapter and the new rows, estimate the new classes' Gaussians with it, align the head."""
        groups = [ParamGroup(self.adapters[-1].parameters()), ParamGroup(rows.rows, self.config.head_lr_factor)]
        fit(loss, groups, task.train, self.config, ctx, after_step, batch_loss=batch_loss)
        self.head.extend(rows)
        self.gaussians.partial_fit(*ctx.features(self._newest, task.train))
        if task.index and self.config.alignment_epochs:
            self.align(ctx)

    def align(self, ctx: Context) -> None:
        """Train all rows with CE over all classes on vectors from N(s_c μ_c, Σ_c); cosine decay over the epochs."""
        scales = mean_scales(self.task_of) if self.config.shrink_means else None
        align(softmax_of(self.scores), ParamGroup(self.head.rows), self.gaussians, scales, self.config, ctx)

    def scores(self, features: Tensor) -> Tensor:
        """Features [B, F] of one view → logits [B, C]."""
        return self.head(features)

    def _newest_view(self) -> Mapping[Hashable, View]:
        """Its version is the stage, so that the cache drops the training features of the previous stage."""
        newest: Any = self.adapters[-1]
        return {("newest adapter", self.stages): partial(self.backbone, tuner=newest)}

    @abstractmethod
    def last_view(self) -> Mapping[Hashable, View]:
        """One view in addition to those of the adapters, or none."""

    def views(self) -> Mapping[Hashable, View]:
        return {**super().views(), **self.last_view()}

    def split(self, features: Tensor) -> Tensor:
        """Features of all views [B, S · F] → one row per view, float32 [B, S, F]; those of the adapters come first."""
        return features.float().unflatten(1, (-1, self.backbone.feature_dim))

    def scores_by_view(self, views: Tensor) -> Tensor:
        """[B, S, F] → [B, S, C]."""
        return torch.stack([self.scores(view) for view in views.unbind(1)], dim=1)


def select_adapter(by_adapter: Tensor, tasks: Tensor) -> Tensor:
    """Row i of the result is ``by_adapter[i, tasks[i]]``: [B, T, C], int64 [B] → [B, C]."""
    # not take_along_dim, which fixes the batch size of an exported program
    return by_adapter.gather(1, tasks[:, None, None].expand(-1, 1, by_adapter.shape[2]))[:, 0]
