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
from cil.training import Recipe, Softmax
from cil.tuning import TunerConfig, build_tuner
from cil.tuning.table import FullConfig


class StrategyRecipe(Recipe):
    """What the two learners below share."""

    tuner: TunerConfig | None = Field(FullConfig(), description="what is trained beside the head; null: nothing")

    @model_validator(mode="after")
    def _whole_batches(self) -> Any:
        if self.micro_batch_size is not None:
            raise ValueError("micro_batch_size: Avalanche's loop takes a batch at once; lower train_batch_size")
        return self


class AvalancheLearner(Learner):
    """An Avalanche strategy that keeps no images: Naive, EWC, LwF or MAS.

    Avalanche's own loop and plugins minimise L = CE(f_θ(x) Wᵀ + b, y) + penalty over θ, any tuner on the frozen
    backbone (``full``: all its weights), and a head W, b that grows with the classes; no task ids anywhere.

    * Naive: no penalty.
    * EWC: λ Σ_{s<t} Σ_i F_i^s (θ_i − θ_i^s)². Keeps F and θ of every task; with ``mode: online`` of the last one, and
      F ← γ F + F^t. One more pass a task, with gradients.
    * LwF: α KL(softmax(z_old / τ) ‖ softmax(z / τ)) over the old classes, z_old from the model before the task. Keeps
      nothing but the weights. From the second task on two passes an epoch.
    * MAS: λ Σ_i Ω_i (θ_i − θ*_i)², Ω_i ← a Ω_i + (1 − a) |∂‖z‖²/∂θ_i|. Keeps Ω and θ*. One more pass a task, with
      gradients.

    As Avalanche has it, F is the mean over batches of the squared gradient of a batch's mean loss on the true labels:
    it falls with ``train_batch_size``, so λ belongs to one batch size. New rows of the head are not held back.

    Departures from an Avalanche script: optimiser and schedule start anew at every task, and batch size, warm-up,
    clipping and label smoothing are the recipe's. A strategy is built anew for every task and given what it kept, as
    tensors and JSON; with plain SGD it ends at the weights of one that lived through the stream, which is tested.
    ``loss: local`` (the task's classes only in the softmax) is ours. Under several processes each trains on everything.
    """

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
    """An Avalanche strategy that keeps old images: Replay, DER, ER_ACE, AGEM or ICaRL.

    As ``avalanche``, with a memory of exemplars (``stores_images``). What is kept are their places in the data, and
    they are read again when they are trained on; the bytes counted are those of the images.

    * Replay: every batch of new images is joined by as many kept ones, random, in equal parts from the tasks.
    * DER: CE on new images, α MSE to the logits stored with kept ones and β CE on their labels (DER++); random, in
      equal parts from the classes.
    * ER_ACE: the mean of CE on kept images and of CE on new ones with only the batch's classes in the softmax.
    * AGEM: g ← g − (g·r / r·r) r where g·r < 0, r being the gradient on kept images, as many of every task.
    * ICaRL: sigmoid cross-entropy on new and kept images, with the old model's outputs as the old classes' targets;
      exemplars by herding. The nearest mean of exemplars decides (of them and their mirror images, all of length 1),
      for the others the head.

    Passes an epoch: two for Replay and DER, three to four for ICaRL (kept and new images, old and new model), else one
    and the kept images of a step. Where Avalanche needs a head as wide as the last task's (DER, ICaRL) it grows here,
    too: a class that came after an exemplar was stored has no logit to be held to, and is left out of DER's MSE.
    """

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
