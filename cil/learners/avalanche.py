"""Avalanche's strategies as learners."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from cil import avalanche
from cil.avalanche.memory import Memory
from cil.avalanche.model import Features, Model
from cil.avalanche.table import EWCConfig, ICaRLConfig, ReplayConfig, StoringStrategyConfig, StrategyConfig
from cil.backbone import FROZEN, Backbone
from cil.classifiers.heads import LinearHead
from cil.errors import StreamError
from cil.learner import Context, Learner
from cil.precision import without_autocast
from cil.stream import Task, TaskData
from cil.training import Optimizer, Recipe, Softmax
from cil.tuning import TunerConfig, build_tuner
from cil.tuning.table import FullConfig


class StrategyRecipe(Recipe):
    """What the two learners below share."""

    tuner: TunerConfig | None = Field(FullConfig(), description="what is trained beside the head; null: nothing")
    optimizer: Optimizer = Field("adamw", description="SGD with momentum, Adam or AdamW")
    lr: float = Field(3e-4, gt=0, description="peak learning rate, of tuner and head")
    warmup: float = Field(0.1, ge=0, lt=1, description="fraction of the steps with a linearly rising rate")

    @model_validator(mode="after")
    def _whole_batches(self) -> Any:
        if self.micro_batch_size is not None:
            raise ValueError("micro_batch_size: Avalanche's loop takes a batch at once; lower train_batch_size")
        return self


class AvalancheLearner(Learner):
    """An Avalanche strategy that keeps no images: Naive, EWC, LwF or MAS."""

    class Config(StrategyRecipe):
        strategy: StrategyConfig = Field(EWCConfig(), description="which, with its hyper-parameters")
        loss: Softmax = Field("global", description="classes in the softmax: all seen, or the task's")

    name = "avalanche"
    paper = "Lomonaco et al., Avalanche: an End-to-End Library for Continual Learning, CVPRW 2021, arXiv 2104.00405"
    trains_backbone = True

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        avalanche.load()  # here, so that no stage's seconds count it
        self.tuner = build_tuner(config.tuner, backbone) if config.tuner is not None else None
        self.head = LinearHead(backbone.feature_dim)
        self.memory = Memory()
        self.sizes: list[int] = []  # classes of each task

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index == 0 and self.tuner is not None:
            self.tuner.reset(ctx.generator)
        self.head.grow(len(task.seen), ctx.generator)
        self.sizes.append(len(task.classes))

    def learn(self, task: Task, ctx: Context) -> None:
        self.train_on({task.index: task.train}, task, ctx, task.classes[0] if self.config.loss == "local" else 0)

    def train_on(self, data: dict[int, TaskData], task: Task, ctx: Context, first: int = 0) -> Any:
        """Let the strategy train on ``task`` and read ``data``; returns it as training left it."""
        from cil.avalanche import stage  # imports Avalanche

        model = Model(Features(self.backbone, self.tuner, ctx), self.head)
        config = self.config
        return stage.learn(config.strategy, model, config, task, data, self.sizes, self.memory, ctx, first)

    def features(self, images: Tensor) -> Tensor:
        return self.backbone(images, self.tuner)

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features)

    @property
    def feature_version(self) -> Hashable:
        return FROZEN if self.tuner is None else self.stages


class AvalancheReplay(AvalancheLearner):
    """An Avalanche strategy that keeps old images: Replay, DER, ER_ACE, AGEM or ICaRL."""

    class Config(StrategyRecipe):
        strategy: StoringStrategyConfig = Field(ReplayConfig(), description="which, with its hyper-parameters")

        @model_validator(mode="after")
        def _smoothing(self) -> Any:
            if self.label_smoothing and self.strategy.name not in ("Replay", "AGEM"):
                raise ValueError(f"label_smoothing: {self.strategy.name} has a loss of its own, without smoothing")
            return self

    name = "avalanche_replay"
    stores_images = True

    means: Tensor

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tasks: dict[int, TaskData] = {}
        self.register_buffer("means", torch.zeros(0, backbone.feature_dim))

    def begin(self, task: Task, ctx: Context) -> None:
        if isinstance(self.config.strategy, ICaRLConfig) and len(task.seen) < self.seen + len(task.classes):
            raise StreamError(
                "avalanche_replay: ICaRL is defined for tasks of new classes only, and this stream shows classes "
                "again; use stream.type=class_incremental, or another strategy (Replay, DER, …)"
            )
        super().begin(task, ctx)
        self.tasks[task.index] = task.train

    def learn(self, task: Task, ctx: Context) -> None:
        strategy = self.train_on(self.tasks, task, ctx)
        if isinstance(self.config.strategy, ICaRLConfig):
            self.means = strategy.model.eval_classifier.class_means

    @without_autocast()
    def logits(self, features: Tensor) -> Tensor:
        """The head's, or for iCaRL the distance to the mean of each class's exemplars, both of length 1, negated."""
        if not len(self.means):
            return self.head(features)
        lengths = F.normalize(features.float(), dim=1)
        return -torch.cdist(lengths, self.means, compute_mode="donot_use_mm_for_euclid_dist")

    @property
    def exemplar_bytes(self) -> int:
        """The images kept, as uint8 at the backbone's input size."""
        return self.memory.images * int(np.prod(self.backbone.data_config["input_size"])) * torch.uint8.itemsize
