"""The optimiser and the learning-rate schedule of a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cil.training.recipe import Recipe


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate.

    Attributes:
        parameters: The parameters to train.
        lr_factor: Factor on the recipe's learning rate, > 0.
        start: Number of epochs in which they stay frozen at first. They have no gradients then, so that no optimiser
            moves them.
    """

    parameters: Iterable[nn.Parameter]
    lr_factor: float = 1.0
    start: int = 0


def build_optimizer(groups: Sequence[ParamGroup], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser; each group has its own peak rate."""
    rates = [{"params": group.parameters, "lr": recipe.lr * group.lr_factor} for group in groups]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(rates, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(rates, recipe.lr, weight_decay=recipe.weight_decay)


def rate_factor(recipe: Recipe, per_epoch: int) -> Callable[[int], float]:
    """Step → factor on the peak learning rate, for a stage with ``per_epoch`` steps per epoch."""
    steps = per_epoch * recipe.epochs
    warmup = int(recipe.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        end = steps - 1
        if recipe.schedule_per == "epoch":
            step, end = step - step % per_epoch, steps - per_epoch
        if recipe.schedule == "quarter_cosine":
            return math.cos(0.99 * math.pi / 2 * min(1, (step - warmup) / max(1, end - warmup)))
        if recipe.schedule == "constant":
            return 1.0
        if recipe.schedule == "multistep":
            return 0.1 ** sum(step >= milestone * per_epoch for milestone in recipe.milestones)
        return 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))

    return factor
