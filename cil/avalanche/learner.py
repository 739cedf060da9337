"""Avalanche's strategies as learners."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from cil import avalanche
from cil.avalanche.configs import EWCConfig, ICaRLConfig, ReplayConfig, StoringStrategyConfig, StrategyConfig
from cil.avalanche.memory import Memory
from cil.avalanche.model import Features, Model
from cil.backbone import FROZEN, Backbone, feature_width
from cil.classifiers.heads import LinearHead
from cil.errors import StreamError
from cil.features import View
from cil.learner import Context
from cil.learners.bases.exemplars import bytes_of_images
from cil.learners.bases.sequential import SequentialTuning
from cil.stream import Task, TaskData
from cil.training import Recipe, Softmax
from cil.tuning import TunerConfig, build_tuner
from cil.tuning.configs import FullConfig
from cil.utils.precision import without_autocast


class StrategyRecipe(Recipe):
    """Hyper-parameters that both Avalanche learners have."""

    tuner: TunerConfig | None = Field(FullConfig(), description="tuner trained in addition to the head; null: none")

    @model_validator(mode="after")
    def _whole_batches(self) -> Any:
        if self.micro_batch_size is not None:
            raise ValueError(
                "micro_batch_size: Avalanche's training loop has no gradient accumulation; lower train_batch_size"
            )
        return self


class AvalancheLearner(SequentialTuning):
    """An Avalanche strategy that keeps no images: Naive, EWC, LwF or MAS.

    Avalanche's own training loop and plugins minimise L = CE(f_θ(x) Wᵀ + b, y) + penalty over the parameters θ of any
    tuner on the frozen backbone (``full``: all its weights) and a head W, b that grows with the classes. Task ids are
    not used.

    * Naive: no penalty.
    * EWC: λ Σ_{s<t} Σ_i F_i^s (θ_i − θ_i^s)². Keeps F and θ of every task; with ``mode: online`` only those of the last
      task, with F ← γ F + F^t. One more pass with gradients per task.
    * LwF: α KL(softmax(z_old / τ) ‖ softmax(z / τ)) over the old classes, with logits z_old of the model
      before the task. Keeps nothing but the weights. Two passes per epoch from the second task on.
    * MAS: λ Σ_i Ω_i (θ_i − θ*_i)², Ω_i ← a Ω_i + (1 − a) |∂‖z‖²/∂θ_i|. Keeps Ω and θ*. One more pass with gradients per
      task.

    As in Avalanche, F is the mean over batches of the squared gradient of a batch's mean loss on the true labels. It
    decreases with ``train_batch_size``, so a value of λ is only meaningful with its batch size. New rows of the head
    have no penalty.

    Differences from an Avalanche script: optimiser and schedule restart at every task, and the recipe sets batch size,
    warm-up, clipping and label smoothing. A new strategy object is built for every task and receives the previous
    one's state as tensors and JSON. With plain SGD this gives the same weights as one strategy object for the whole
    stream, which is tested. ``loss: local`` (the task's classes only in the softmax) is an addition of this package.
    With several processes, each trains on all data.
    """

    class Config(StrategyRecipe):
        strategy: StrategyConfig = Field(EWCConfig(), description="Avalanche strategy with its hyper-parameters")
        loss: Softmax = Field("global", description="classes in the softmax: all classes seen, or the task's own")

    name = "avalanche"
    summary = "Avalanche's Naive, EWC, LwF or MAS"
    trains = "all weights or a tuner, head"
    paper = "Lomonaco et al., Avalanche: an End-to-End Library for Continual Learning, CVPRW 2021, arXiv 2104.00405"
    trains_backbone = True

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        avalanche.import_avalanche()  # here, so that its seconds are not counted for a stage
        self.tuner = build_tuner(config.tuner, backbone) if config.tuner is not None else None
        self.head = LinearHead(feature_width(backbone, self.tuner))
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
        """Train the strategy on ``task`` with ``data``, the images by task; returns the strategy after training."""
        from cil.avalanche import stage  # imports Avalanche

        model = Model(Features(self.backbone, self.tuner, ctx), self.head)
        config = self.config
        return stage.learn(config.strategy, model, config, task, data, self.sizes, self.memory, ctx, first)

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features)

    def views(self) -> Mapping[Hashable, View]:
        return {FROZEN if self.tuner is None else self.stages: self.tuned}


class AvalancheReplay(AvalancheLearner):
    """An Avalanche strategy that keeps old images: Replay, DER, ER_ACE, AGEM or ICaRL.

    As ``avalanche``, with a memory of exemplars (``stores_images``). The state contains the exemplars' indices in the
    data set, and their images are read again for training; results count the bytes of these images.

    * Replay: each batch of new images is extended by as many exemplars. Memory: random, equal parts per task.
    * DER: CE on new images, α MSE to the logits stored with the exemplars and β CE on their labels (DER++). Memory:
      random, equal parts per class.
    * ER_ACE: the mean of CE on exemplars and CE on new images with only the batch's classes in the softmax.
    * AGEM: g ← g − (g·r / r·r) r if g·r < 0, where r is the gradient on exemplars, with equally many per task.
    * ICaRL: sigmoid cross-entropy on new images and exemplars, with the old model's outputs as targets for old classes.
      Exemplars are selected by herding. The prediction is the nearest class mean of the exemplars and their mirror
      images, all of length 1; the other strategies predict with the head.

    With ``selection: herding``, the memory of Replay, DER and ER_ACE has equally many images of every class: the first
    ones in the order of herding on features of length 1 (:func:`~cil.learners.bases.exemplars.herding`), by the model
    after the task, for ER_ACE before it. The order does not depend on the budget, so a smaller share drops the last
    ones. One more pass per new image.

    Passes per epoch: two for Replay and DER, three to four for ICaRL (new images and exemplars, old and new model), for
    the others one plus the exemplars of each step. Avalanche needs a head of the final width for DER and ICaRL; here
    the head grows. DER's MSE leaves out classes that are newer than the exemplar, because its stored logits lack them.
    """

    class Config(StrategyRecipe):
        strategy: StoringStrategyConfig = Field(
            ReplayConfig(), description="Avalanche strategy with its hyper-parameters"
        )

        @model_validator(mode="after")
        def _smoothing(self) -> Any:
            if self.label_smoothing and self.strategy.name not in ("Replay", "AGEM"):
                raise ValueError(
                    f"label_smoothing: the loss of {self.strategy.name} has no label smoothing; leave it at 0"
                )
            return self

    name = "avalanche_replay"
    summary = "Avalanche's Replay, DER, ER-ACE, A-GEM or iCaRL"
    stores_images = True

    means: Tensor

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tasks: dict[int, TaskData] = {}
        self.register_buffer("means", torch.zeros(0, self.head.feature_dim))

    def begin(self, task: Task, ctx: Context) -> None:
        if isinstance(self.config.strategy, ICaRLConfig) and len(task.seen) < self.seen + len(task.classes):
            raise StreamError(
                "avalanche_replay: ICaRL is defined for tasks of new classes only, but this stream repeats "
                "classes; use stream.type=class_incremental, or another strategy (Replay, DER, …)"
            )
        super().begin(task, ctx)
        self.tasks[task.index] = task.train

    def learn(self, task: Task, ctx: Context) -> None:
        strategy = self.train_on(self.tasks, task, ctx)
        if isinstance(self.config.strategy, ICaRLConfig):
            self.means = strategy.model.eval_classifier.class_means

    @without_autocast()
    def logits(self, features: Tensor) -> Tensor:
        """Logits of the head; for iCaRL the negated distances to the class means of exemplars, both of length 1."""
        if not len(self.means):
            return self.head(features)
        directions = F.normalize(features.float(), dim=1)
        return -torch.cdist(directions, self.means, compute_mode="donot_use_mm_for_euclid_dist")

    @property
    def exemplar_bytes(self) -> int:
        """Size in bytes of all exemplars, as uint8 at the backbone's input size."""
        return bytes_of_images(self.backbone, self.memory.images)
