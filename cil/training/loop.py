"""The one training loop. A learner states what to train, on what data and with which loss; none writes its own loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from cil.backbone import Backbone, Backbones
from cil.errors import ConfigError, TrainingError
from cil.learner import Context, check_trained
from cil.training.batches import Batches
from cil.training.losses import Loss
from cil.training.optimizer import ParamGroup, build_optimizer, rate_factor
from cil.training.processes import sum_gradients
from cil.training.recipe import Recipe
from cil.utils.randomness import derived_seed, isolated


def fit(
    loss: Loss,
    groups: Sequence[ParamGroup],
    data: Batches,
    recipe: Recipe,
    ctx: Context,
    after_step: Callable[[], None] | None = None,
    prefix: str = "",
    batch_loss: bool = False,
) -> None:
    """Minimise ``loss`` over ``data``. Afterwards the parameters are frozen and their gradients are None.

    With several processes, each takes its share of every batch, and gradients are summed, so a step equals a
    single-process step on the whole batch. ``micro_batch_size`` accumulates gradients to the same effect. Modules that
    draw from the global random state (dropout) draw from one seeded by (seed, stage, process); the caller's state is
    unchanged.

    Args:
        loss: (*inputs, labels) → (mean loss over the batch, logits); the logits are for the training accuracy only.
        groups: The parameters to train.
        data: The task's images, or features in memory.
        recipe: Epochs, optimiser, schedule.
        ctx: Device, generator, log. Loss, accuracy, learning rate and images per second are logged per epoch.
        after_step: Called after every optimiser step, e.g. for a moving average.
        prefix: Prefix of every name in the log, for a stage that trains twice.
        batch_loss: The loss compares images of a step with one another, through
            :func:`cil.training.processes.across_processes`: every process calls it at every step, even for no image.

    Raises:
        ConfigError: ``batch_loss`` with a ``micro_batch_size``, which would separate a step's images.
        TrainingError: The loss, or a parameter after the last step, is not finite.
    """
    if batch_loss and recipe.micro_batch_size is not None:
        raise ConfigError(
            f"micro_batch_size is {recipe.micro_batch_size}, and this loss compares all images of a step with one "
            "another; leave it out and lower train_batch_size if memory is short, or set that term's weight to 0"
        )
    accelerator = ctx.accelerator
    groups = [ParamGroup(list(group.parameters), group.lr_factor, group.start) for group in groups]
    parameters = [p for group in groups for p in group.parameters]
    ctx.trainable_parameters = max(ctx.trainable_parameters, sum(p.numel() for p in parameters))
    optimizer = accelerator.prepare(build_optimizer(groups, recipe))
    size, count = recipe.train_batch_size, len(data)
    per_epoch = math.ceil(count / size)
    scheduler = LambdaLR(optimizer, rate_factor(recipe, per_epoch))
    part = (accelerator.process_index, accelerator.num_processes)
    every = sync_interval(ctx.device)
    with isolated(derived_seed(_peek(ctx.generator), accelerator.process_index)), _keeping_tokens(data, recipe, ctx):
        for epoch in ctx.track(range(recipe.epochs), "training", recipe.epochs):
            for group in groups:
                for p in group.parameters:
                    p.requires_grad_(epoch >= group.start)
            tally, started = torch.zeros(2, dtype=torch.float64), time.perf_counter()  # loss, correct
            waiting: list[tuple[int, Tensor]] = []  # steps whose losses have not been read from the device
            batches = data.batches(size, generator=ctx.generator, augment=True, device=ctx.device, part=part)
            for step, batch in enumerate(batches):
                whole = min(size, count - step * size)  # images in this step, over all processes
                value, correct = _backward(loss, batch, whole, recipe, accelerator, batch_loss)
                mean = sum_gradients(parameters, value, accelerator)
                waiting.append((whole, torch.stack([mean, correct])))
                if len(waiting) == every or step + 1 == per_epoch:
                    for images, (step_loss, hits) in _read_losses(waiting):
                        if not math.isfinite(step_loss):
                            raise TrainingError(
                                f"stage {ctx.stage}, epoch {epoch}: the training loss is {step_loss}; lower the "
                                f"learner's lr ({recipe.lr:g}) or set its clip"
                            )
                        tally += torch.tensor([step_loss * images / part[1], hits], dtype=torch.float64)
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
    check_trained(ctx, parameters, f"{prefix}lr")


def _backward(
    loss: Loss, batch: tuple[Tensor, ...], whole: int, recipe: Recipe, accelerator: Accelerator, batch_loss: bool
) -> tuple[Tensor, Tensor]:
    """Add the batch's gradients, in micro-batches.

    Returns:
        This process's share of the step's mean loss, and its number of correct images, as float32 scalars. Both stay on
        the device, because reading them would make it wait.
    """
    value, correct = torch.zeros(2, device=accelerator.device)
    at_once = recipe.micro_batch_size or whole
    for *inputs, labels in zip(*(tensor.split(at_once) for tensor in batch), strict=True):
        if not len(labels):
            if batch_loss:  # the other processes wait for this one, even if it has no rows
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


def _keeping_tokens(data: Batches, recipe: Recipe, ctx: Context) -> AbstractContextManager[None]:
    """Keep what is the same in every epoch: without augmentation, tokens below the first block that a tuner changes.

    Not on a GPU, which would have to hand every image to the CPU, where they are told apart.
    """
    backbone = None if ctx.learner is None else ctx.learner.backbone
    room = getattr(data, "repeated_bytes", 0.0)  # custom training data may lack it
    if not room or recipe.epochs == 1 or ctx.device.type != "cpu":
        return nullcontext()
    if not isinstance(backbone, Backbone) or isinstance(backbone, Backbones):
        return nullcontext()
    return backbone.keeping_tokens(room)


def sync_interval(device: torch.device) -> int:
    """Steps between reading losses from the device.

    Each read synchronises a GPU, which then idles until new work arrives. On a CPU reading is free, so every loss is
    checked before the step that it leads to.
    """
    return 1 if device.type == "cpu" else 32


def _read_losses(waiting: list[tuple[int, Tensor]]) -> Iterator[tuple[int, list[float]]]:
    """(images, [loss, correct]) of the waiting steps, read from the device at once."""
    read = torch.stack([figures for _, figures in waiting]).tolist()
    return zip((images for images, _ in waiting), read, strict=True)


def _peek(generator: torch.Generator) -> int:
    """A seed that depends on the generator's state and does not change it."""
    return int(torch.randint(2**62, (), generator=generator.clone_state()))
