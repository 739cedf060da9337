"""The one fit loop. Learners that train state what to train, on what, and with which loss; none writes its own loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from cil.errors import TrainingError
from cil.learner import Context, LearnerConfig

Optimizer = Literal["sgd", "adam", "adamw"]
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(inputs, labels) → (scalar loss, logits [B, C])."""


Softmax = Literal["global", "local"]
"""Classes in the softmax: all seen, or the task's own."""


class Recipe(LearnerConfig):
    """How a learner is trained. A learner's ``Config`` that derives from it has all of these keys."""

    epochs: PositiveInt = Field(5, description="passes over the task")
    train_batch_size: PositiveInt = Field(64, description="images an optimiser step")
    optimizer: Optimizer = Field("sgd", description="SGD with momentum, Adam or AdamW")
    lr: float = Field(0.01, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty (SGD, Adam) or decoupled decay (AdamW)")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="cosine: to 0 over all steps of the stage")
    warmup: float = Field(0.0, ge=0, lt=1, description="fraction of the steps with a linearly rising rate")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    clip: float | None = Field(None, gt=0, description="largest gradient norm")


class Batches(Protocol):
    """Training data that can be passed over many times; ``TaskData`` and :class:`TensorData` are such."""

    def __len__(self) -> int: ...

    def batches(
        self, batch_size: int, *, generator: torch.Generator | None, augment: bool, device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]: ...


class TensorData:
    """Features and labels in memory as training data."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, batch_size: int, *, generator: torch.Generator | None, augment: bool, device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for chunk in order.split(batch_size):
            chunk = chunk.to(self.labels.device)
            yield self.inputs[chunk].to(device), self.labels[chunk].to(device)


def cross_entropy(logits_of: Callable[[Tensor], Tensor], recipe: Recipe, first: int = 0) -> Loss:
    """Softmax cross-entropy over the classes from ``first`` on, with the recipe's label smoothing.

    Args:
        logits_of: Inputs → logits [B, C].
        recipe: Where the label smoothing comes from.
        first: The first class in the softmax: 0 for all seen, the task's first for a local loss. Labels lie above it.
    """

    def loss(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(inputs)
        return F.cross_entropy(logits[:, first:], labels - first, label_smoothing=recipe.label_smoothing), logits

    return loss


def fit(loss: Loss, groups: Sequence[Iterable[nn.Parameter]], data: Batches, recipe: Recipe, ctx: Context) -> None:
    """Minimise ``loss`` over ``data``; the parameters are left without gradients and frozen again.

    Args:
        loss: (inputs, labels) → (scalar loss, logits); the logits are for the training accuracy only.
        groups: What to train, as parameter groups.
        data: The task's images, or features in memory.
        recipe: Epochs, optimiser, schedule.
        ctx: Device, generator, log. Logs loss, accuracy, learning rate and images a second once per epoch.

    Raises:
        TrainingError: The loss is not finite.
    """
    parameters = [p for group in groups for p in group]
    for p in parameters:
        p.requires_grad_(True)
    ctx.trainable_parameters = max(ctx.trainable_parameters, sum(p.numel() for p in parameters))
    optimizer = ctx.accelerator.prepare(_optimizer(parameters, recipe))
    per_epoch = math.ceil(len(data) / recipe.train_batch_size)
    scheduler = LambdaLR(optimizer, _schedule(recipe, per_epoch * recipe.epochs))
    for epoch in ctx.track(range(recipe.epochs), "training", recipe.epochs):
        total, correct, started = 0.0, 0, time.perf_counter()
        batches = data.batches(recipe.train_batch_size, generator=ctx.generator, augment=True, device=ctx.device)
        for inputs, labels in batches:
            with ctx.accelerator.autocast():
                value, logits = loss(inputs, labels)
            if not torch.isfinite(value):
                raise TrainingError(
                    f"stage {ctx.stage}, epoch {epoch}: the training loss is {value.item()}; lower the learner's lr "
                    f"({recipe.lr:g}) or set its clip. Earlier stages are kept"
                )
            ctx.accelerator.backward(value)
            if recipe.clip is not None:
                ctx.accelerator.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += value.item() * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
        ctx.log("loss", total / len(data))
        ctx.log("accuracy", correct / len(data))
        ctx.log("learning_rate", float(scheduler.get_last_lr()[0]))
        ctx.log("images_per_second", len(data) / (time.perf_counter() - started))
    for p in parameters:
        p.grad = None
        p.requires_grad_(False)


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, recipe.lr, weight_decay=recipe.weight_decay)


def _schedule(recipe: Recipe, steps: int) -> Callable[[int], float]:
    warmup = int(recipe.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if recipe.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor
