"""SD-LoRA: every task adds a low-rank direction, and learns the lengths of all directions again."""

from __future__ import annotations

from pydantic import Field, PositiveInt
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers import LinearHead
from cil.learner import Context
from cil.learners.bases.new_classes import TaskOfClass, task_head
from cil.learners.bases.sequential import SequentialTuning
from cil.stream import Task
from cil.training import ParamGroup, Recipe, Schedule, fit, local_cross_entropy
from cil.tuning.directions import Directions


class SDLoRA(TaskOfClass, SequentialTuning):
    """SD-LoRA: scalable decoupled low-rank adaptation (Wu et al., ICLR 2025).

    Queries and values get ΔW = Σ_{k<t} α_k B_k A_k / (‖B_k‖ ‖A_k‖) + α_t B_t A_t. Task t trains A_t, B_t and every α,
    with the task's new head rows, by CE over the task's own classes; directions and rows of old tasks are frozen. There
    is one α per task for the whole network, which starts each task at 0.8. Keeps the factors of all tasks and the head.
    One pass per image at test, for any number of tasks.
    """

    class Config(Recipe):
        rank: PositiveInt = Field(10, description="rank r of a task's update")
        epochs: int = Field(20, gt=0, description="epochs per task")
        train_batch_size: int = Field(128, gt=0, description="images per optimiser step")
        schedule: Schedule = Field("constant", description="learning-rate schedule")
        length: float = Field(0.8, gt=0, description="value at which α starts")
        keep_lengths: bool = Field(
            False,
            description="whether old directions keep their lengths at the start of a task, with one α per task, block "
            "and projection; false: the α of all tasks start again",
        )

    name = "sd_lora"
    summary = "one low-rank direction per task, whose lengths are trained again with every task"
    trains = "queries and values by low-rank updates, head"
    paper = "Wu et al., SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning, ICLR 2025"

    tuner: Directions

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tuner = Directions(backbone, config.rank, config.length, keep=config.keep_lengths)
        self.head = LinearHead(backbone.feature_dim)

    def learn(self, task: Task, ctx: Context) -> None:
        (self.tuner.next if task.index else self.tuner.reset)(ctx.generator)
        rows = task_head(LinearHead(self.backbone.feature_dim), task, ctx)
        loss = local_cross_entropy(lambda images: rows(self.tuned(images)), self.config, task.classes[0])
        fit(loss, [ParamGroup([*self.tuner.parameters(), *rows.parameters()])], task.train, self.config, ctx)
        self.head.extend(rows)
        for i, length in enumerate(self.tuner.lengths.mean((1, 2))):
            ctx.log(f"length{i}", float(length))

    def logits(self, features: Tensor) -> Tensor:
        return self.head.logits(features)
