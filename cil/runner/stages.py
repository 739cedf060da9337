"""The loop over stages: resume, then learn each task, test all classes seen so far, and write the stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from cil.config.cleaning import NoiseFilter, Pseudo
from cil.errors import TrainingError
from cil.features import FeatureCache
from cil.learner import Context, Learner, check_trained
from cil.results import Costs, StageRow
from cil.runner.checkpoint import RunFolder, as_tensors, split_state, state_bytes
from cil.runner.cleaning import filtered, pseudo_labelled, require_sums
from cil.runner.confidence import FILE as CONFIDENCE
from cil.runner.confidence import Confidence
from cil.runner.display import Display
from cil.runner.evaluation import Predictions, count_correct, evaluate
from cil.runner.online import Tests, learn_batches
from cil.runner.supported import require_supported
from cil.store import FeatureStore
from cil.stream import Stream, Task
from cil.utils import hardware
from cil.utils.gradients import watched_gradients


class Observer:
    """Watches a run: shows progress bars, and nothing else unless a subclass overrides it.

    Args:
        display: The terminal; nothing is shown by default.
    """

    def __init__(self, display: Display | None = None) -> None:
        self.display = display or Display()

    def track(self, items: Iterable[Any], description: str, length: int) -> Iterator[Any]:
        """Iterate over ``items`` with a progress bar."""
        return self.display.track(items, description, length)

    def log(self, name: str, value: float) -> None:
        """Receive a number that the learner logs while it trains."""

    def stage(self, rows: Sequence[StageRow]) -> None:
        """Receive the rows of all finished stages, after each stage."""


@dataclass
class Session:
    """A learner on its way through a stream, and what all its stages share.

    Attributes:
        learner: The learner, on the device of the run.
        stream: The tasks; the evaluator alone opens the test split.
        cache: Features of the run, with its device, precision and processes.
        seed: Training seed; (seed, stage) decides everything random in a stage.
        observer: Receives progress, logged numbers and finished stages.
        unchanged_since: Version of each view of the learner → the stage since which it has had this version.
        before_test: Called when a task has been learned, before the learner is tested.
        confidence: Calibrates the learner after every stage; None if that is not asked for.
        apart: Features of test images on which ``confidence`` is measured, and which no cost of the method counts; None
            if it is not measured.
        noise_filter: Filter of the training images of each task; None for none.
        pseudo: Labels for its unlabelled images; None for none.
    """

    learner: Learner
    stream: Stream
    cache: FeatureCache
    seed: int = 0
    observer: Observer = field(default_factory=Observer)
    unchanged_since: dict[Hashable, int] = field(default_factory=dict)
    before_test: Callable[[], None] = lambda: None
    confidence: Confidence | None = None
    apart: FeatureCache | None = None
    noise_filter: NoiseFilter | None = None
    pseudo: Pseudo | None = None

    def context(self, stage: int, logged: list[tuple[str, float]] | None = None) -> Context:
        """The context of a stage; numbers that the learner logs are appended to ``logged``."""

        def log(name: str, value: float) -> None:
            if logged is not None:
                logged.append((name, value))
            self.observer.log(name, value)

        return Context(
            self.cache.accelerator, self.cache, seed=self.seed, stage=stage, log=log, track=self.observer.track
        )


def run_stages(
    learner: Learner,
    stream: Stream,
    *,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    batch_size: int = 128,
    folder: RunFolder | None = None,
    store: FeatureStore | None = None,
    observer: Observer | None = None,
    stop_after: int | None = None,
    confidence: bool = False,
    noise_filter: NoiseFilter | None = None,
    pseudo: Pseudo | None = None,
) -> list[StageRow]:
    """Take a learner through a stream, resuming after the stages that ``folder`` already holds.

    Args:
        learner: A fresh learner.
        stream: The tasks.
        accelerator: Device and precision; float32 on the best device of this machine by default.
        seed: Training seed; (seed, stage) decides everything random in a stage.
        batch_size: Images per forward pass outside training.
        folder: Where stages are written and resumed from; None keeps nothing on disk.
        store: Feature store to read from and write to; none by default.
        observer: Receives progress, logged numbers and finished stages.
        stop_after: Stop once this many stages are finished, as an interruption would.
        confidence: Whether the learner is calibrated on held-out images after every stage, and tested on images of
            later tasks; the stream needs ``validation``.
        noise_filter: Filter of training images whose labels look wrong; None for none.
        pseudo: Labels for the unlabelled images of each task; None for none.

    Returns:
        One row per finished stage.

    Raises:
        StreamError: The learner is not defined on this kind of stream.
        RunError: The folder's state is damaged or belongs to another learner, or the disk is full.
        TrainingError: Training failed, or trained nothing of a tensor that it should train.
    """
    require_supported(type(learner), stream, learner.config, noise_filter)
    accelerator = accelerator or hardware.accelerator("auto")
    observer = observer or Observer()
    learner.to(accelerator.device)
    learner.backbone.to(accelerator.device)
    session = Session(learner, stream, FeatureCache(accelerator, batch_size, observer.track, store), seed, observer)
    if pseudo is not None:
        require_sums(learner)
    session.noise_filter, session.pseudo = noise_filter, pseudo
    if confidence:
        session.confidence = Confidence(learner.backbone.feature_dim)
        session.apart = FeatureCache(accelerator, batch_size, observer.track, store)
    rows = resume(session, folder)
    remaining = stream.tasks[len(rows) : stop_after]
    for task in observer.track(remaining, f"{learner.name or type(learner).__name__}: stages", len(remaining)):
        row, predictions = run_stage(session, task)
        if folder is not None and accelerator.is_main_process:
            more = {} if session.confidence is None else {CONFIDENCE: split_state(session.confidence.state_dict())[0]}
            folder.save_stage(task.index, learner, row, prediction_tensors(predictions), more)
        rows.append(row)
        observer.stage(rows)
    return rows


def resume(session: Session, folder: RunFolder | None) -> list[StageRow]:
    """Give the learner the state it had after the last stage in ``folder``.

    The images of the finished tasks are closed first, unless the learner declares ``stores_images``: a resumed learner
    sees no more than one that was never interrupted.

    Returns:
        The rows of the finished stages; none where there is no folder or no finished stage.

    Raises:
        RunError: The last stage's weights are missing, damaged or of another learner.
    """
    rows = folder.rows() if folder is not None else []
    learner, past = session.learner, session.stream.tasks[: len(rows)]
    if folder is None or not past:
        return rows
    if not learner.stores_images:
        for task in past:
            task.close()
    folder.load_learner(learner, past, session.context)
    learner.eval()  # as after a stage: there may be none left to learn
    if session.confidence is not None:
        folder.load_module(session.confidence, len(past) - 1, CONFIDENCE)
    session.unchanged_since = dict(zip(learner.views(), rows[-1]["unchanged_since"], strict=True))
    return rows


def run_stage(session: Session, task: Task) -> tuple[StageRow, Predictions]:
    """One stage: learn ``task``, close its images, and test all classes seen so far.

    Returns:
        The stage's row of ``metrics.json``, and the predictions for every test image of the tasks so far.

    Raises:
        TrainingError: The learner's parameters are not finite, or in the first stage a tensor that an optimiser was
            given never had a gradient.
    """
    learner, cache = session.learner, session.cache
    accelerator, logged = cache.accelerator, list[tuple[str, float]]()
    ctx = session.context(task.index, logged)
    passes, read, started = learner.backbone.passes + cache.passes_saved, cache.read, time.perf_counter()
    shown = task if session.noise_filter is None else filtered(task, learner, ctx, session.noise_filter)
    if session.pseudo is not None:
        shown = pseudo_labelled(shown, learner, ctx, session.pseudo)
    tests, online = Tests(), session.stream.online
    if online is None:
        learn_task(learner, shown, ctx)
    else:
        tests = learn_batches(learner, session.stream, shown, online, ctx, session.unchanged_since)
    train_passes = learner.backbone.passes + cache.passes_saved - passes - tests.passes
    read = cache.read - read  # of tests, too
    learned = time.perf_counter()
    since = session.unchanged_since
    session.unchanged_since = {version: since.get(version, task.index) for version in learner.views()}
    session.before_test()
    predictions = evaluate(learner, session.stream, task.index, cache, session.unchanged_since)
    seconds_test = time.perf_counter() - learned
    confidence = session.confidence
    if confidence is not None:
        confidence.learn(learner, task, cache, max(session.unchanged_since.values()))
    if not learner.stores_images:
        task.close()
        shown.close()
    costs: Costs = {
        "trainable_parameters": ctx.trainable_parameters,
        **state_bytes(learner),
        "train_images": len(task.train),
        "train_passes": hardware.total(accelerator, train_passes),
        "test_passes": hardware.total(accelerator, predictions.passes + tests.passes),
        "features_from_store": hardware.total(accelerator, read + predictions.read),
        "seconds_learn": learned - started - tests.seconds,
        "seconds_test": seconds_test + tests.seconds,
        "peak_memory_bytes": hardware.peak_memory_bytes(accelerator.device),
    }
    row: StageRow = {
        **count_correct(predictions, session.stream, task.index),
        "unchanged_since": list(session.unchanged_since.values()),
        "costs": costs,
        "log": logged,
        "histograms": ctx.histograms,
    }
    if online is not None:
        row["stream"] = {**row.get("stream", {}), "online": {"images": tests.images, "accuracy": tests.accuracy}}
    if confidence is not None and session.apart is not None:
        row["confidence"] = confidence.measure(learner, session.stream, task.index, session.apart)
    return row, predictions


def learn_task(learner: Learner, task: Task, ctx: Context) -> None:
    """Begin ``task`` and learn it; the learner is in evaluation mode afterwards.

    Raises:
        TrainingError: The learner's parameters are not finite, or in the first stage a tensor that an optimiser was
            given never had a gradient.
    """
    learner.begin(task, ctx)
    learner.train()
    if task.index == 0:
        _learn_first(learner, task, ctx)
    else:
        learner.learn(task, ctx)
    learner.eval()
    check_trained(ctx)


def _learn_first(learner: Learner, task: Task, ctx: Context) -> None:
    """Learn the first task, and refuse to continue if a part of what is trained is not trained at all.

    Later tasks are not watched: there an optimiser may be given the rows of old classes, which have no gradient.

    Raises:
        TrainingError: An optimiser was given a tensor that never had a gradient.
    """
    with watched_gradients() as gradients:
        learner.learn(task, ctx)
    if never := gradients.never(learner):
        shown = ", ".join(never[:3]) + (f" and {len(never) - 3} more" if len(never) > 3 else "")
        raise TrainingError(
            f"{learner.name or type(learner).__name__}, stage {task.index}: no step of an optimiser had a gradient of "
            f"{shown}; the backbone or the loss does not use what it should train: choose another tuner or other "
            "targets, or do not give it to the optimiser"
        )


def prediction_tensors(predictions: Predictions) -> dict[str, Tensor]:
    """Predictions as a stage's folder stores them."""
    return as_tensors(
        index=predictions.index,
        task=predictions.task,
        label=predictions.label,
        predicted=predictions.predicted,
        within_task=predictions.within,
        top=predictions.top,
    )
