"""InfLoRA: low-rank updates in directions that the inputs of old tasks do not have."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers import LinearHead
from cil.learner import Context
from cil.learners.bases.aligned_copy import OptionalAlignment
from cil.learners.bases.low_rank import LowRankUpdates, require_called
from cil.learners.bases.new_classes import task_head
from cil.learners.bases.subspaces import grown, new_directions
from cil.stream import Task
from cil.training import Optimizer, ParamGroup, Per, Schedule, fit, local_cross_entropy
from cil.tuning import LowRankBank


class InfLoRA(LowRankUpdates):
    """InfLoRA: interference-free low-rank adaptation (Liang and Li, CVPR 2024, arXiv 2404.00228).

    Keys and values of block l get W_t = W_{t−1} + B_t A_t. A_t is not trained: with C = mean x xᵀ of the inputs x of
    the attention over the task's images, before training, and P the projector on the inputs of old tasks, its rows are
    the leading left singular vectors of (I − P) C, divided by √3. So B_t A_t x = 0 for x in the range of P. B_t starts
    at zero and is trained with the task's new head rows by CE over the task's own classes; then B_t A_t is added to the
    weights. At the end of the task P grows by the fewest left singular vectors of (I − P) C, C measured again, with
    ‖P C‖² ≥ ε_t ‖C‖². With ``alignment_epochs`` a copy of the head is aligned as in SLCA (InfLoRA+CA).
    Keeps the updated weights, P and the head. One pass per image at test, for any number of tasks.
    """

    class Config(OptionalAlignment):
        rank: PositiveInt = Field(10, description="rank r of a task's update, at most the backbone's width")
        epochs: int = Field(20, gt=0, description="epochs per task")
        train_batch_size: int = Field(128, gt=0, description="images per optimiser step")
        optimizer: Optimizer = Field("adam", description="optimiser: SGD with momentum, Adam or AdamW")
        lr: float = Field(5e-4, gt=0, description="peak learning rate")
        schedule: Schedule = Field("quarter_cosine", description="learning-rate schedule")
        schedule_per: Per = Field("epoch", description="interval at which the rate changes")
        energy: float = Field(
            0.98, ge=0, le=1, description="share ε of the energy of a task's inputs that later tasks leave alone"
        )
        energy_step: float = Field(0.0, ge=0, le=1, description="increase of ε per task, up to ε = 1")

    name = "inflora"
    summary = "low-rank updates, folded, in directions that inputs of old tasks do not have"
    trains = "keys and values by low-rank updates, head"
    paper = "Liang and Li, InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning, arXiv 2404.00228"

    known: Tensor

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tuner = LowRankBank(backbone, config.rank, "kv")
        require_called(backbone, self.tuner.inputs)
        self.head = LinearHead(backbone.feature_dim)
        if config.alignment_epochs:
            self.keep_copy()
        blocks, _, width = self.tuner.down.shape
        self.register_buffer("known", torch.zeros(blocks, width, width))  # P of each block

    def learn(self, task: Task, ctx: Context) -> None:
        config, pairs = self.config, zip(self.grams(task, ctx), self.known, strict=True)
        self.tuner.give(torch.stack([new_directions(gram, known, config.rank) for gram, known in pairs]) / 3**0.5)
        rows = task_head(LinearHead(self.backbone.feature_dim), task, ctx)
        loss = local_cross_entropy(lambda images: rows(self.tuned(images)), config, task.classes[0])
        fit(loss, [ParamGroup([self.tuner.up]), ParamGroup(rows.parameters())], task.train, config, ctx)
        self.head.extend(rows)
        self.tuner.fold()
        if config.alignment_epochs:
            self.finish(self.head, task, ctx)
        self.remember(self.grams(task, ctx), min(1.0, config.energy + config.energy_step * task.index))
        ctx.log("known_share", float(self.known.diagonal(dim1=1, dim2=2).mean()))

    def remember(self, grams: Tensor, energy: float) -> None:
        """Extend P of each block by a task's inputs, given their C [L, D, D]."""
        self.known = torch.stack([grown(known, gram, energy) for known, gram in zip(self.known, grams, strict=True)])

    def logits(self, features: Tensor) -> Tensor:
        return self.predictor(features)
