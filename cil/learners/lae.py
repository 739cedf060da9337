"""LAE: an online tuner, its moving average, and an ensemble of the two."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cil.backbone import Backbone, feature_width
from cil.classifiers import LinearHead
from cil.features import View
from cil.learner import Context, Learner
from cil.stream import Task
from cil.training import Optimizer, ParamGroup, Recipe, Schedule, cross_entropy, fit
from cil.tuning import Tuner, TunerConfig, build_tuner
from cil.tuning.configs import AdapterConfig
from cil.utils.precision import without_autocast


class LAE(Learner):
    """LAE: learning, accumulation, ensemble (Gao et al., arXiv 2303.10070), with any tuner.

    Learning: the online tuner θ_on is trained further on every task, with a cross-entropy over the task's own classes;
    from the second task on it is frozen in the first epochs, in which only the head is trained. Accumulation: the
    offline tuner θ_off starts as a copy of θ_on after the first task; from then on, after every step (frozen epochs
    included), θ_off ← β θ_off + (1 − β) θ_on. Ensemble: the score of a class is
    max(softmax(h(f_on(x))), softmax(h(f_off(x)))), with one head h for both. One pass per image through each tuner.
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
            description="tuner that is trained and averaged; default: LAE's adapter in the first five blocks",
        )
        epochs: int = Field(5, gt=0, description="epochs per task")
        frozen_epochs: NonNegativeInt = Field(
            3, description="epochs at the start of every task but the first in which only the head is trained"
        )
        train_batch_size: int = Field(24, gt=0, description="images per optimiser step")
        optimizer: Optimizer = Field("adam", description="optimiser: SGD with momentum, Adam or AdamW")
        lr: float = Field(0.0028125, gt=0, description="peak learning rate")
        schedule: Schedule = Field("constant", description="learning-rate schedule")
        decay: float = Field(
            0.9999, ge=0, le=1, description="decay β in [0, 1] of the moving average per optimiser step"
        )
        predict: Literal["ensemble", "online", "offline"] = Field(
            "ensemble", description="tuners used for prediction; training is the same"
        )

        @model_validator(mode="after")
        def _some_epochs_train_the_tuner(self) -> LAE.Config:
            if self.frozen_epochs >= self.epochs:
                raise ValueError(
                    f"frozen_epochs is {self.frozen_epochs} of {self.epochs} epochs, so the tuner would be trained on "
                    f"the first task only; give at most {self.epochs - 1}"
                )
            return self

    name = "lae"
    summary = "a tuner and its moving average, the more confident one decides"
    trains = "one tuner, head"
    paper = (
        "Gao et al., A Unified Continual Learning Framework with General Parameter-Efficient Tuning, ICCV 2023, "
        "arXiv 2303.10070"
    )

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.online = build_tuner(config.tuner, backbone)
        self.offline: Tuner | None = None
        self.head = LinearHead(feature_width(backbone, self.online), std=0.001)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index == 0:
            self.online.reset(ctx.generator)
        elif self.offline is None:
            self.offline = copy.deepcopy(self.online).requires_grad_(False)
        self.head.grow(len(task.seen), ctx.generator)

    def learn(self, task: Task, ctx: Context) -> None:
        frozen = self.config.frozen_epochs if task.index else 0
        groups = [ParamGroup(self.online.parameters(), start=frozen), ParamGroup(self.head.parameters())]
        loss = cross_entropy(
            lambda images: self.head(self.backbone(images, self.online)), self.config, first=task.classes[0]
        )
        fit(loss, groups, task.train, self.config, ctx, after_step=self.accumulate)

    def accumulate(self) -> None:
        """θ_off ← β θ_off + (1 − β) θ_on; nothing in the first task, in which there is no θ_off."""
        if self.offline is not None:
            average = get_ema_multi_avg_fn(self.config.decay)
            average([*self.offline.parameters()], [*self.online.parameters()], None)

    def views(self) -> Mapping[Hashable, View]:
        """Views under θ_on, θ_off or both, as ``predict`` requires; only θ_on during the first task."""
        tuners = {"online": self.online} if self.offline is None else {"online": self.online, "offline": self.offline}
        used = {self.config.predict} & tuners.keys() or tuners.keys()
        return {(b, self.stages): partial(self.backbone, tuner=tuner) for b, tuner in tuners.items() if b in used}

    @without_autocast()
    def logits(self, features: Tensor) -> Tensor:
        """max_b log softmax(h(f_b)) over the branches b, [B, C]; same order as the probabilities, without underflow."""
        branches = features.float().unflatten(1, (-1, self.head.feature_dim))
        return self.head(branches).log_softmax(dim=2).amax(dim=1)
