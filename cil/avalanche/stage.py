"""Trains one task by one of Avalanche's strategies.

A new strategy is built for every task. It receives the state kept from earlier tasks, trains, and returns the state to
keep, so an interrupted run can be resumed as if it had not been interrupted. The training loop is Avalanche's own;
optimiser, schedule, clipping and logging are those of :mod:`cil.training`.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import avalanche
import torch
from avalanche.benchmarks.scenarios.dataset_scenario import DatasetExperience
from avalanche.training import supervised
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer
from avalanche.training.utils import ParamData
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from cil.avalanche.codec import Codec
from cil.avalanche.configs import AGEMConfig, Chooses, ICaRLConfig, ReplayConfig, StrategySection
from cil.avalanche.data import whole_task
from cil.avalanche.herded import choose_by_herding, directions
from cil.avalanche.memory import Memory
from cil.avalanche.model import Model
from cil.errors import TrainingError
from cil.learner import Context
from cil.stream import Task, TaskData
from cil.training import ParamGroup, Recipe, build_optimizer, cross_entropy, rate_factor
from cil.utils.randomness import isolated

KEPT: dict[str, tuple[str, ...]] = {
    "Naive": (),
    "EWC": ("EWCPlugin.saved_params", "EWCPlugin.importances"),
    "LwF": ("LwFPlugin.lwf.expcount", "LwFPlugin.lwf.prev_classes_by_task"),
    "MAS": ("MASPlugin.params", "MASPlugin.importance"),
    "Replay": ("ReplayPlugin.storage_policy.buffer_groups", "ReplayPlugin.storage_policy._num_exps"),
    "DER": ("strategy.storage_policy.buffer_groups", "strategy.storage_policy.seen_classes"),
    "ER_ACE": ("strategy.storage_policy.buffer_groups", "strategy.storage_policy.seen_classes"),
    "AGEM": ("AGEMPlugin.buffers",),
    "ICaRL": (
        "_ICaRLPlugin.x_memory",
        "_ICaRLPlugin.y_memory",
        "_ICaRLPlugin.order",
        "_ICaRLPlugin.observed_classes",
        "ICaRLLossPlugin.old_classes",
    ),
}
"""State that each strategy keeps between tasks: attributes of its plugins, or of the strategy itself."""
BY_CLASS = ("ReplayPlugin.storage_policy.buffer_groups", "ReplayPlugin.storage_policy.seen_classes")
"""State of Replay whose memory has groups of classes, not of tasks."""
TEACHER = {"LwF": "LwFPlugin.lwf.prev_model", "ICaRL": "ICaRLLossPlugin.old_model"}
"""The previous task's model. It equals the model at the start of this task, so it need not be saved."""


def learn(
    section: StrategySection,
    model: Model,
    recipe: Recipe,
    task: Task,
    data: Mapping[int, TaskData],
    sizes: Sequence[int],
    memory: Memory,
    ctx: Context,
    first: int = 0,
) -> Any:
    """Train ``model`` on ``task`` with a strategy; afterwards its parameters are frozen and their gradients are None.

    Args:
        section: The strategy and its hyper-parameters.
        model: Model to train; its head has one row per class seen.
        recipe: Epochs, batch size, optimiser, schedule, clipping, label smoothing.
        task: The current task.
        data: Tasks whose images may be read, by number: this one and, for a strategy that keeps images, the old ones.
        sizes: Number of new classes of each task so far, this one included.
        memory: State kept from earlier tasks; it is replaced by the state after this one.
        ctx: Device, generator, log.
        first: First class in the softmax: 0 for all classes seen, the task's first class for a local loss. ICaRL does
            not use it.

    Returns:
        The strategy after training.

    Raises:
        TrainingError: The loss is not finite, the precision is fp16, or AGEM's ``sample_size`` is below the number of
            tasks.
    """
    if ctx.accelerator.mixed_precision == "fp16":
        raise TrainingError("precision: fp16 needs scaled gradients, which Avalanche's loop does not have; use bf16")
    if isinstance(section, AGEMConfig) and section.sample_size <= task.index:
        raise TrainingError(
            f"stage {task.index}: AGEM's sample_size is {section.sample_size}, less than one image per task and step; "
            "give at least the number of tasks"
        )
    seed = int(torch.randint(2**62, (), generator=ctx.generator))
    codec = Codec(data, len(task.seen), ctx.device)
    with isolated(seed), _without_avalanche_warnings():  # Avalanche draws from the global random states
        strategy = _build(section, model, recipe, ctx, first)
        if task.index:
            _restore(strategy, section, codec.load(memory), task.index)
        if _herds(section):
            choose_by_herding(_policy(strategy, section), sorted(set(task.train.labels.tolist())), directions(strategy))
        strategy.train(_experience(task, sizes), eval_streams=[])
        kept = BY_CLASS if isinstance(section, ReplayConfig) and _herds(section) else KEPT[section.name]
        codec.save({path: _get(strategy, path) for path in kept}, memory)
    for p in strategy.model.parameters():
        p.grad = None
        p.requires_grad_(False)
    return strategy


def _build(section: StrategySection, model: Model, recipe: Recipe, ctx: Context, first: int) -> Any:
    parameters = list(model.requires_grad_().parameters())
    ctx.trainable_parameters = max(ctx.trainable_parameters, sum(p.numel() for p in parameters))
    arguments: dict[str, Any] = section.model_dump(exclude={"name", "selection"})
    if isinstance(section, ICaRLConfig):
        arguments |= {"feature_extractor": model.features, "classifier": model.head, "buffer_transform": None}
    else:
        arguments |= {"model": model, "criterion": _criterion(recipe, first)}
    strategy = getattr(supervised, section.name)(
        optimizer=build_optimizer([ParamGroup(parameters)], recipe),
        train_mb_size=recipe.train_batch_size,
        train_epochs=recipe.epochs,
        eval_mb_size=ctx.cache.batch_size,
        device=ctx.device,
        plugins=[_Recipe(recipe, ctx)],
        evaluator=EvaluationPlugin(),
        **arguments,
    )
    if isinstance(section, ReplayConfig) and _herds(section):
        _get(strategy, "ReplayPlugin").storage_policy = ClassBalancedBuffer(section.mem_size)
    return strategy


def _herds(section: StrategySection) -> bool:
    return isinstance(section, Chooses) and section.selection == "herding"


def _policy(strategy: Any, section: StrategySection) -> Any:
    """The memory of a strategy that has one policy for it."""
    return _get(strategy, ("ReplayPlugin" if isinstance(section, ReplayConfig) else "strategy") + ".storage_policy")


def _criterion(recipe: Recipe, first: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss in the form that Avalanche calls: (logits, labels) → mean loss."""
    loss = cross_entropy(lambda logits: logits, recipe, first)
    return lambda logits, labels: loss(logits, labels)[0]


def _restore(strategy: Any, section: StrategySection, state: Mapping[str, Any], tasks: int) -> None:
    """Give a new strategy the state that was kept after the earlier ``tasks``."""
    strategy.clock.train_exp_counter = tasks
    if section.name == "AGEM":  # update_memory also builds the loader over the memories
        for images in state["AGEMPlugin.buffers"]:
            _get(strategy, "AGEMPlugin").update_memory(images)
        return
    shapes = {name: p.shape for name, p in strategy.model.named_parameters()}
    for path, value in state.items():
        _set(strategy, path, _padded(value, shapes))
    if section.name in TEACHER:
        _set(strategy, TEACHER[section.name], copy.deepcopy(strategy.model).train())


def _experience(task: Task, sizes: Sequence[int]) -> Any:
    """Build an Avalanche experience of one task, without references to other tasks."""
    images = whole_task(task.index, task.train.source, task.train.labels)
    experience: Any = DatasetExperience(dataset=images, current_experience=task.index)
    experience.classes_in_this_experience = set(task.classes)
    experience.classes_seen_so_far = set(task.seen)
    # iCaRL, and no other strategy, reads these from its experience's benchmark; Avalanche no longer sets them there
    experience.benchmark = SimpleNamespace(n_classes_per_exp=list(sizes), classes_order=list(task.seen))
    return experience


class _Recipe(SupervisedPlugin):
    """Applies the rest of a :class:`Recipe` in Avalanche's loop: schedule, clipping, check of the loss, logging."""

    def __init__(self, recipe: Recipe, ctx: Context) -> None:
        super().__init__()
        self.recipe, self.ctx = recipe, ctx
        self.schedule: LambdaLR | None = None
        self.epochs: Iterator[int] = ctx.track(range(recipe.epochs), "training", recipe.epochs)

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        if self.schedule is None:  # only now the loader exists, and with it the number of steps
            self.schedule = LambdaLR(strategy.optimizer, rate_factor(self.recipe, len(strategy.dataloader)))
        next(self.epochs, None)
        self.loss, self.correct, self.count, self.started = 0.0, 0, 0, time.perf_counter()

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        stored = getattr(strategy, "batch_logits", None)
        if stored is not None and strategy.replay_loader is not None:
            # DER: classes that appeared after an image was stored have no stored logit, and get a loss of 0
            current = strategy.mb_output[: len(stored)].detach()
            strategy.batch_logits = torch.where(stored.isinf(), current, stored)

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        value, size = strategy.loss.item(), len(strategy.mb_y)
        if not math.isfinite(value):
            raise TrainingError(
                f"stage {self.ctx.stage}: the training loss is {value}; lower the learner's lr ({self.recipe.lr:g}), "
                "set its clip, or weaken the strategy's penalty"
            )
        if self.recipe.clip is not None:
            clip_grad_norm_(strategy.model.parameters(), self.recipe.clip)
        self.loss, self.count = self.loss + value * size, self.count + size
        self.correct += int((strategy.mb_output.argmax(1) == strategy.mb_y).sum())

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        assert self.schedule is not None  # made before the first step
        self.schedule.step()

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        assert self.schedule is not None
        self.ctx.log("loss", self.loss / self.count)
        self.ctx.log("accuracy", self.correct / self.count)
        self.ctx.log("learning_rate", float(self.schedule.get_last_lr()[0]))
        self.ctx.log("images_per_second", self.count / (time.perf_counter() - self.started))

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        next(self.epochs, None)
        if strategy.model is not None and hasattr(strategy._criterion, "old_model"):
            # iCaRL would load the new head into the old one, which has fewer rows; without it iCaRL makes a copy
            strategy._criterion.old_model = None


def _get(strategy: Any, path: str) -> Any:
    """Return ``Plugin.a.b``: attribute b of attribute a of the plugin of that class, or of the strategy itself."""
    owner, *names = path.split(".")
    value = strategy if owner == "strategy" else next(p for p in strategy.plugins if type(p).__name__ == owner)
    for name in names:
        value = getattr(value, name)
    return value


def _set(strategy: Any, path: str, value: Any) -> None:
    """Set what :func:`_get` returns. Dictionaries are refilled, not replaced: Avalanche's may be defaultdicts."""
    old = _get(strategy, path)
    if isinstance(old, dict) and isinstance(value, dict):
        old.clear()
        old.update(value)
        return
    owner, _, name = path.rpartition(".")
    setattr(_get(strategy, owner), name, value)


def _padded(value: Any, shapes: Mapping[str, torch.Size], name: str = "") -> Any:
    """Extend values that are kept per parameter by zeros for the head's new rows.

    Avalanche would do this itself, but by a kind of indexing whose meaning will change in torch, as torch warns.
    """
    if isinstance(value, dict):
        return {key: _padded(inner, shapes, str(key)) for key, inner in value.items()}
    if isinstance(value, ParamData) and name in shapes:
        data = value.data.new_zeros(shapes[name])
        data[: len(value.data)] = value.data
        return ParamData(value.name, init_tensor=data, device=data.device)
    return value


@contextmanager
def _without_avalanche_warnings() -> Iterator[None]:
    """Drop warnings about Avalanche's own code (it switches them on at every call), and let others through."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for one in caught:
        if not Path(one.filename).is_relative_to(Path(avalanche.__file__).parent):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
