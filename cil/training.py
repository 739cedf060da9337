"""The one fit loop. Learners that train state what to train, on what, and with which loss; none writes its own loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from cil.batches import Batches
from cil.errors import ConfigError, TrainingError
from cil.learner import Context, LearnerConfig
from cil.processes import sum_gradients
from cil.randomness import derived_seed, isolated

Optimizer = Literal["sgd", "adam", "adamw"]
Loss = Callable[..., tuple[Tensor, Tensor]]
"""(inputs, labels) → (scalar loss, logits [B, C]); where the data has more than one input: (*inputs, labels)."""

Schedule = Literal["cosine", "quarter_cosine", "constant", "multistep"]
Per = Literal["step", "epoch"]
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
    schedule: Schedule = Field(
        "cosine",
        description="cosine: half a wave, to 0 over the stage; quarter_cosine: a quarter of one, to 0.016 at its last "
        "step; multistep: a tenth of the rate from each milestone on",
    )
    milestones: list[PositiveInt] = Field([], description="epochs at which a multistep schedule lowers the rate")
    schedule_per: Per = Field("step", description="when the rate changes")
    warmup: float = Field(0.0, ge=0, lt=1, description="fraction of the steps with a linearly rising rate")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    clip: float | None = Field(None, gt=0, description="largest gradient norm")
    micro_batch_size: PositiveInt | None = Field(
        None, description="images at once; an optimiser step gathers gradients over its batch (default: all at once)"
    )

    @model_validator(mode="after")
    def _milestones(self) -> Recipe:
        if (self.schedule == "multistep") != bool(self.milestones):
            raise ValueError("schedule: multistep and milestones go together, e.g. milestones: [18]")
        return self


def check_whole_steps(recipe: Recipe, weight: str) -> None:
    """Of a ``Config`` with a term over all images of a step, whose weight is its key ``weight``: no micro-batches then.

    Raises:
        ValueError: It has both.
    """
    if recipe.micro_batch_size is not None and getattr(recipe, weight):
        raise ValueError(
            f"micro_batch_size: {recipe.micro_batch_size}; {weight} compares all images of a step with one another, so "
            f"leave it out and lower train_batch_size where memory is short, or set {weight}: 0"
        )


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


def local_cross_entropy(rows_of: Callable[[Tensor], Tensor], recipe: Recipe, first: int) -> Loss:
    """:func:`cross_entropy` for rows trained by themselves: column 0 of ``rows_of``'s logits is class ``first``."""
    return cross_entropy(lambda inputs: F.pad(rows_of(inputs), (first, 0), value=-math.inf), recipe, first)


def cosface(
    cosines_of: Callable[[Tensor], Tensor], recipe: Recipe, first: int = 0, scale: float = 20.0, margin: float = 0.0
) -> Loss:
    """CE(s · (cos θ_c − m · 1[c = y]), y): the true class must win by a margin (CosFace, arXiv 1801.09414).

    Args:
        cosines_of: Inputs → cosines [B, C] in [−1, 1].
        recipe: Where the label smoothing comes from.
        first: As in :func:`cross_entropy`.
        scale: s.
        margin: m, a cosine; 0 is softmax cross-entropy of s · cos θ.
    """

    def loss(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        cosines = cosines_of(inputs)
        target = F.one_hot(labels, cosines.shape[1]).to(cosines)
        value = cross_entropy(lambda logits: logits, recipe, first)(scale * (cosines - margin * target), labels)[0]
        return value, scale * cosines

    return loss


@dataclass(frozen=True)
class Group:
    """Parameters trained with one rate.

    Attributes:
        parameters: What to train.
        lr: Factor on the recipe's learning rate.
        start: Epochs they stay frozen first; without gradients meanwhile, so that no optimiser moves them.
    """

    parameters: Iterable[nn.Parameter]
    lr: float = 1.0
    start: int = 0


def fit(
    loss: Loss,
    groups: Sequence[Group],
    data: Batches,
    recipe: Recipe,
    ctx: Context,
    after_step: Callable[[], None] | None = None,
    prefix: str = "",
    together: bool = False,
) -> None:
    """Minimise ``loss`` over ``data``; the parameters are left without gradients and frozen again.

    With several processes each takes its share of every batch, and gradients are summed: a step is that of one process
    on the whole batch, whatever the number of processes; ``micro_batch_size`` does the same in turn. Modules that draw
    from the global random state (dropout) draw from one seeded by (seed, stage, process); the caller's stays as it was.

    Args:
        loss: (*inputs, labels) → (mean loss over the batch, logits); the logits are for the training accuracy only.
        groups: What to train.
        data: The task's images, or features in memory.
        recipe: Epochs, optimiser, schedule.
        ctx: Device, generator, log. Logs loss, accuracy, learning rate and images a second once per epoch.
        after_step: Called after every optimiser step, e.g. for a moving average.
        prefix: Before every name in the log, where a stage trains twice.
        together: The loss compares images of a step with one another, through :func:`cil.processes.over_step`: it is
            called in every process at every step, even for no image.

    Raises:
        ConfigError: ``together`` with a ``micro_batch_size``, which would take a step's images apart.
        TrainingError: The loss is not finite.
    """
    if together and recipe.micro_batch_size is not None:
        raise ConfigError(
            f"micro_batch_size is {recipe.micro_batch_size}, and this loss compares all images of a step with one "
            "another; leave it out and lower train_batch_size where memory is short, or take that term's weight to 0"
        )
    accelerator = ctx.accelerator
    taken = [Group(list(group.parameters), group.lr, group.start) for group in groups]
    parameters = [p for group in taken for p in group.parameters]
    ctx.trainable_parameters = max(ctx.trainable_parameters, sum(p.numel() for p in parameters))
    optimizer = accelerator.prepare(build_optimizer(taken, recipe))
    size, count = recipe.train_batch_size, len(data)
    per_epoch = math.ceil(count / size)
    scheduler = LambdaLR(optimizer, rate_factor(recipe, per_epoch))
    part = (accelerator.process_index, accelerator.num_processes)
    every = asked_every(ctx.device)
    with isolated(derived_seed(_peek(ctx.generator), accelerator.process_index)):
        for epoch in ctx.track(range(recipe.epochs), "training", recipe.epochs):
            for group in taken:
                for p in group.parameters:
                    p.requires_grad_(epoch >= group.start)
            tally, started = torch.zeros(2, dtype=torch.float64), time.perf_counter()  # loss, correct
            waiting: list[tuple[int, Tensor]] = []  # of steps the device has not been asked about
            batches = data.batches(size, generator=ctx.generator, augment=True, device=ctx.device, part=part)
            for step, batch in enumerate(batches):
                whole = min(size, count - step * size)  # images in this step, over all processes
                value, correct = _backward(loss, batch, whole, recipe, accelerator, together)
                mean = sum_gradients(parameters, value, accelerator)
                waiting.append((whole, torch.stack([mean, correct])))
                if len(waiting) == every or step + 1 == per_epoch:
                    for images, (found, hits) in _asked(waiting):
                        if not math.isfinite(found):
                            raise TrainingError(
                                f"stage {ctx.stage}, epoch {epoch}: the training loss is {found}; lower the learner's "
                                f"lr ({recipe.lr:g}) or set its clip. Earlier stages are kept"
                            )
                        tally += torch.tensor([found * images / part[1], hits], dtype=torch.float64)
                    waiting.clear()
                if recipe.clip is not None:
                    accelerator.clip_grad_norm_(parameters, recipe.clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if after_step is not None:
                    after_step()
            tally = accelerator.reduce(tally.float().to(ctx.device), "sum").cpu()
            ctx.log(f"{prefix}loss", float(tally[0]) / count)
            ctx.log(f"{prefix}accuracy", float(tally[1]) / count)
            ctx.log(f"{prefix}learning_rate", float(scheduler.get_last_lr()[0]))
            ctx.log(f"{prefix}images_per_second", count / (time.perf_counter() - started))
    for p in parameters:
        p.grad = None
        p.requires_grad_(False)


def _backward(
    loss: Loss, batch: tuple[Tensor, ...], whole: int, recipe: Recipe, accelerator: Accelerator, together: bool
) -> tuple[Tensor, Tensor]:
    """Add the batch's gradients, in micro-batches; this process's share of the step's mean loss, and its hits.

    Both stay on the device, float32 scalars: reading them would make it wait.
    """
    value, correct = torch.zeros(2, device=accelerator.device)
    at_once = recipe.micro_batch_size or whole
    for *inputs, labels in zip(*(tensor.split(at_once) for tensor in batch), strict=True):
        if not len(labels):
            if together:  # the others wait for this process's rows, none as they are
                with torch.no_grad(), accelerator.autocast():
                    loss(*inputs, labels)
            continue
        with accelerator.autocast():
            mean, logits = loss(*inputs, labels)
        share = mean * (len(labels) / whole)
        accelerator.backward(share)
        value += share.detach()
        correct += (logits.argmax(1) == labels).sum()
    return value, correct


def asked_every(device: torch.device) -> int:
    """Steps after which a device is asked for their losses.

    Every question empties a GPU's queue, and it idles until new work comes; a CPU is asked about each step before that
    changes anything.
    """
    return 1 if device.type == "cpu" else 32


def _asked(waiting: list[tuple[int, Tensor]]) -> Iterator[tuple[int, list[float]]]:
    """(images, [loss, correct]) of the steps that wait, read from the device at once."""
    read = torch.stack([figures for _, figures in waiting]).tolist()
    return zip((images for images, _ in waiting), read, strict=True)


def build_optimizer(groups: Sequence[Group], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser, each group with its own peak rate."""
    rates = [{"params": group.parameters, "lr": recipe.lr * group.lr} for group in groups]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(rates, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(rates, recipe.lr, weight_decay=recipe.weight_decay)


def rate_factor(recipe: Recipe, per_epoch: int) -> Callable[[int], float]:
    """Step → factor on the peak learning rate, for a stage of ``per_epoch`` steps an epoch."""
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


def _peek(generator: torch.Generator) -> int:
    """A seed from the generator's state that leaves the state as it is."""
    return int(torch.randint(2**62, (), generator=generator.clone_state()))
