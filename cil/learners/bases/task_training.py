"""Training of one tuner per task from given weights, with a head that is dropped: what learners share that merge."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers import CosineHead
from cil.learner import Context
from cil.learners.bases.merged_space import Mergeable
from cil.learners.bases.new_classes import task_head
from cil.learners.bases.soup import greedy_soup, held_out
from cil.stream import Task, TaskData
from cil.training import Optimizer, ParamGroup, Recipe, fit, local_cross_entropy
from cil.tuning import Tuner, TunerConfig
from cil.tuning.configs import LoraConfig


class TaskRecipe(Recipe):
    """How every task's tuner is trained."""

    tuner: TunerConfig = Field(
        LoraConfig(rank=16, alpha=16, targets=["qkv", "attn.proj", "fc1", "fc2"]),
        description="tuner trained per task; its weight update is merged, or its own parameters if it has none",
    )
    optimizer: Optimizer = Field("adamw", description="optimiser: SGD with momentum, Adam or AdamW")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    head_lr_factor: float = Field(
        10.0, gt=0, description="factor on the learning rate for the head a task is trained with"
    )
    head_scale: float = Field(
        16.0, gt=0, description="initial scale σ > 0 of the cosine logits of the head a task is trained with"
    )
    soup: list[Annotated[float, Field(gt=0)]] = Field(
        [],
        description="factors on the learning rate, one fine-tuning of each task per entry, of which the greedy soup is "
        "taken; empty: one fine-tuning",
    )
    held_out: float = Field(
        0.2, gt=0, lt=1, description="share of each class's training images that choose a soup or fit coefficients"
    )

    @property
    def holds_out(self) -> bool:
        """Whether a share of a task's images is not trained on."""
        return bool(self.soup)


def train_tuner(
    models: Mergeable, theta: Mapping[str, Tensor], backbone: Backbone, recipe: TaskRecipe, task: Task, ctx: Context
) -> tuple[Tuner, CosineHead]:
    """Train a tuner of the space ``models`` from θ, with the task's own classes in the softmax of a cosine head.

    With ``soup`` several are trained, and their greedy soup is returned (:func:`cil.learners.bases.soup.greedy_soup`).

    Returns:
        The tuner, and the head, whose column 0 is the first of the task's classes.
    """
    empty = CosineHead(models.width, recipe.head_scale)
    train, rest = held_out(task.train, recipe.held_out) if recipe.holds_out else (task.train, None)
    if not recipe.soup or rest is None:
        tuner = models.tuner(theta, ctx.generator)
        return tuner, _fine_tune(tuner, task_head(empty, task, ctx), backbone, recipe, task, train, ctx)
    start, members = task_head(empty, task, ctx), []
    for factor in recipe.soup if len(rest) else recipe.soup[:1]:  # without held-out images nothing can be chosen
        tuner, changed = models.tuner(theta, ctx.generator), recipe.model_copy(update={"lr": factor * recipe.lr})
        head = _fine_tune(tuner, copy.deepcopy(start), backbone, changed, task, train, ctx)
        members.append((models.update(tuner, theta), head))
    return greedy_soup(models, backbone, members, rest, task, ctx) if len(rest) else (tuner, head)


def _fine_tune(
    tuner: Tuner, head: CosineHead, backbone: Backbone, recipe: TaskRecipe, task: Task, data: TaskData, ctx: Context
) -> CosineHead:
    loss = local_cross_entropy(lambda images: head(backbone(images, tuner)), recipe, task.classes[0])
    groups = [ParamGroup(tuner.parameters()), ParamGroup(head.parameters(), lr_factor=recipe.head_lr_factor)]
    fit(loss, groups, data, recipe, ctx)
    return head
