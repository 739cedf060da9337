"""Coefficients of a new update, one per block, fitted to images of the task that the update was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.classifiers import CosineHead
from cil.learner import Context
from cil.learners.bases.merged_space import Mergeable
from cil.learners.bases.soup import held_out, tuner_with
from cil.learners.bases.task_training import TaskRecipe
from cil.merging.finalisers import BLOCK
from cil.stream import Task
from cil.training import ParamGroup, Recipe, fit
from cil.tuning import Tuner

LARGEST = 1.5
"""Upper bound of a coefficient; the lower one is 0."""
RATE = 0.02
"""Learning rate of Adam."""


class CoefficientRecipe(TaskRecipe):
    """How every task's tuner is trained, and by what factors its update is added."""

    coefficients: Literal["fixed", "layers"] = Field(
        "fixed",
        description="factors on each new update; fixed: 1; layers: one per block, fitted to the task's held-out "
        "images, with rule: {name: task_arithmetic, scale: 1.0}",
    )
    coefficient_epochs: PositiveInt = Field(25, description="epochs over the held-out images with coefficients: layers")
    coefficient_drift: float = Field(
        1.0, ge=0, description="weight μ of the change of features with coefficients: layers"
    )

    @property
    def holds_out(self) -> bool:
        return super().holds_out or self.coefficients == "layers"


class Scaled(Tuner):
    """The weights θ + λ τ, with one coefficient λ for the tensors of each block and one for all others.

    Args:
        theta: θ by name, kept by reference.
        update: τ by name, for some of these names.
        start: Initial value of all coefficients.

    Attributes:
        coefficients: λ, a parameter [L].
        blocks: The blocks' names in the order of the coefficients; "" stands for all other tensors.
    """

    rides_blocks = False  # it only replaces weights, so it fits any timm model

    def __init__(self, theta: Mapping[str, Tensor], update: Mapping[str, Tensor], start: float) -> None:
        super().__init__()
        self.theta, self.tau = theta, update
        blocks = {name: "" if (match := BLOCK.match(name)) is None else match[0][:-1] for name in update}
        self.blocks = tuple(dict.fromkeys(blocks.values()))
        self._of = {name: self.blocks.index(block) for name, block in blocks.items()}
        device = next(iter(update.values())).device
        self.coefficients = nn.Parameter(torch.full((len(self.blocks),), start, device=device))

    def products(self) -> dict[str, Tensor]:
        """λ τ by name."""
        return {name: self.coefficients[self._of[name]] * tau for name, tau in self.tau.items()}

    def weights(self) -> dict[str, Tensor]:
        return {name: self.theta[name].detach() + change for name, change in self.products().items()}


def scaled_update(
    models: Mergeable,
    update: Mapping[str, Tensor],
    theta: Mapping[str, Tensor],
    backbone: Backbone,
    head: CosineHead,
    recipe: CoefficientRecipe,
    task: Task,
    ctx: Context,
) -> dict[str, Tensor]:
    """Scale a task's update per block, so that adding it to the merged model predicts as the task's own model does.

    λ = argmin_{0 ≤ λ ≤ 1.5} mean over x of KL(p(x; θ_0 + τ) ‖ p(x; θ + λ τ)) + μ ‖φ_{θ+λτ}(x) − φ_θ(x)‖² / ‖φ_θ(x)‖²

    x are the task's held-out images, p is the softmax of the task's own head, and μ is ``coefficient_drift``. This is
    what AdaMerging (arXiv 2310.02575) becomes for a learner that has the newest task's training images alone: that
    method minimises the entropy of predictions on unlabelled test images of all tasks. Coefficients of earlier tasks
    do not change, so memory does not grow. λ starts at 1/t for the t-th task, and stays there without held-out images.
    The first task's update is added whole, because there are no older classes whose features it could move.

    Args:
        models: The space of the updates, the backbone's weights.
        update: τ by name.
        theta: θ, the weights merged so far, by name.
        backbone: The frozen backbone.
        head: The head that the task was trained with; column 0 is the first of the task's classes.
        recipe: Share of held-out images, epochs, batch size and μ.
        task, ctx: The stage; every coefficient is logged.

    Returns:
        λ τ by name.
    """
    scaled = Scaled(theta, update, 1 / (task.index + 1))
    own, merged = tuner_with(models, update), models.tuner_at(theta)
    first = task.classes[0]

    def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target, before = head(backbone(images, own)).float(), backbone(images, merged).float()
        features = backbone(images, scaled)
        logits = head(features).float()
        apart = F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)
        moved = (features.float() - before).square().sum(1) / before.square().sum(1)
        return apart + recipe.coefficient_drift * moved.mean(), F.pad(logits, (first, 0), value=-math.inf)

    @torch.no_grad()
    def into_range() -> None:
        scaled.coefficients.clamp_(0, LARGEST)

    data = held_out(task.train, recipe.held_out)[1]
    if task.index and len(data):
        adam = Recipe(
            optimizer="adam",
            lr=RATE,
            schedule="constant",
            epochs=recipe.coefficient_epochs,
            train_batch_size=recipe.train_batch_size,
            micro_batch_size=recipe.micro_batch_size,
        )
        fit(loss, [ParamGroup([scaled.coefficients])], data, adam, ctx, into_range, prefix="coefficient_")
    for block, value in zip(scaled.blocks, scaled.coefficients.tolist(), strict=True):
        ctx.log(f"coefficient/{block or 'rest'}", value)
    return {name: change.detach() for name, change in scaled.products().items()}
