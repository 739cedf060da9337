"""LAE: a tuner that learns, a slower copy that accumulates, and an ensemble of the two."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cil.backbone import Backbone
from cil.classifiers import LinearHead
from cil.features import View
from cil.learner import Context, Learner
from cil.precision import without_autocast
from cil.stream import Task
from cil.training import Group, Optimizer, Recipe, Schedule, cross_entropy, fit
from cil.tuning import Tuner, TunerConfig, build_tuner
from cil.tuning.table import AdapterConfig


class LAE(Learner):
    """LAE: learning, accumulation, ensemble (Gao et al., arXiv 2303.10070), with any tuner.

    Learning: the online tuner θ_on goes on from task to task under a cross-entropy over the task's own classes; from
    the second task on it is frozen in the first epochs, while only the new rows of the head learn. Accumulation: after
    every step from the second task on, frozen epochs included, θ_off ← β θ_off + (1 − β) θ_on, the offline tuner
    having started as θ_on was after the first task. Ensemble: a class scores
    max(softmax(h(f_on(x))), softmax(h(f_off(x)))), one head h for both. Every image passes once through each tuner.
    """

    class Config(Recipe):
        tuner: TunerConfig = Field(
            AdapterConfig(
                bottleneck=5,
                form="attention",
                activation="gelu",
                scale=1.0,
                learned_scale=True,
                dropout=0.0,
                blocks=[0, 1, 2, 3, 4],
            ),
            description="what learns and is averaged; the default is LAE's adapter, in the first five blocks",
        )
        epochs: int = Field(5, gt=0, description="passes over each task")
        frozen_epochs: NonNegativeInt = Field(
            3, description="first epochs of every task but the first, in which the head learns alone"
        )
        train_batch_size: int = Field(24, gt=0, description="images an optimiser step")
        optimizer: Optimizer = Field("adam", description="SGD with momentum, Adam or AdamW")
        lr: float = Field(0.0028125, gt=0, description="peak learning rate")
        schedule: Schedule = Field("constant", description="of the learning rate")
        decay: float = Field(0.9999, ge=0, le=1, description="β of the moving average, per optimiser step")
        predict: Literal["ensemble", "online", "offline"] = Field(
            "ensemble", description="whose probabilities decide; training is the same"
        )

        @model_validator(mode="after")
        def _some_epochs_train_the_tuner(self) -> LAE.Config:
            if self.frozen_epochs >= self.epochs:
                raise ValueError(
                    f"frozen_epochs is {self.frozen_epochs} of {self.epochs} epochs, and the tuner would learn on the "
                    f"first task only; give at most {self.epochs - 1}"
                )
            return self

    name = "lae"
    paper = (
        "Gao et al., A Unified Continual Learning Framework with General Parameter-Efficient Tuning, ICCV 2023, "
        "arXiv 2303.10070"
    )

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.online = build_tuner(config.tuner, backbone)
        self.offline: Tuner | None = None
        self.head = LinearHead(backbone.feature_dim, std=0.001)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index == 0:
            self.online.reset(ctx.generator)
        elif self.offline is None:
            self.offline = copy.deepcopy(self.online).requires_grad_(False)
        self.head.grow(len(task.seen), ctx.generator)

    def learn(self, task: Task, ctx: Context) -> None:
        frozen = self.config.frozen_epochs if task.index else 0
        groups = [Group(self.online.parameters(), start=frozen), Group(self.head.parameters())]
        loss = cross_entropy(
            lambda images: self.head(self.backbone(images, self.online)), self.config, first=task.classes[0]
        )
        fit(loss, groups, task.train, self.config, ctx, after_step=self.accumulate)

    def accumulate(self) -> None:
        """θ_off ← β θ_off + (1 − β) θ_on; nothing in the first task, which has no θ_off."""
        if self.offline is not None:
            average = get_ema_multi_avg_fn(self.config.decay)
            average([*self.offline.parameters()], [*self.online.parameters()], None)

    def views(self) -> Mapping[Hashable, View]:
        """Through θ_on, θ_off or both, as far as the prediction asks for them; through θ_on until there is a θ_off."""
        tuners = {"online": self.online} if self.offline is None else {"online": self.online, "offline": self.offline}
        asked = {self.config.predict} & tuners.keys() or tuners.keys()
        return {(b, self.stages): partial(self.backbone, tuner=tuner) for b, tuner in tuners.items() if b in asked}

    def features(self, images: Tensor) -> Tensor:
        return torch.cat([view(images) for view in self.views().values()], dim=1)

    @property
    def feature_version(self) -> Hashable:
        return self.stages

    @without_autocast()
    def logits(self, features: Tensor) -> Tensor:
        """max_b log softmax(h(f_b)) over the branches b, [B, C]: ordered as the probabilities, without underflow."""
        branches = features.float().unflatten(1, (-1, self.backbone.feature_dim))
        return self.head(branches).log_softmax(dim=2).amax(dim=1)
