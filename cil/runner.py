"""The stage loop: learn, test, log, checkpoint; and the loop over learners, class orders and seeds around it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from cil import hardware, results
from cil.backbone import Backbone, load_backbone
from cil.checkpoint import RunFolder, as_tensors, state_bytes, to_json
from cil.config import Config
from cil.console import Display
from cil.data.images import ImageSet, LoadedSplit
from cil.data.transforms import Transforms
from cil.evaluation import counts, evaluate
from cil.features import FeatureCache
from cil.learner import Context, Learner
from cil.metrics import confusion_matrix
from cil.plan import Plan, plans
from cil.protocol import ClassIncremental, DomainIncremental, Order
from cil.provenance import check_same_run, make_header
from cil.randomness import isolated
from cil.stream import Stream
from cil.tracking import Tracker

Row = dict[str, Any]


def run_stages(
    learner: Learner,
    stream: Stream,
    *,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    batch_size: int = 128,
    folder: RunFolder | None = None,
    keep: str = "all",
    display: Display | None = None,
    log: Callable[[str, float], None] | None = None,
    finished: Callable[[list[Row]], None] | None = None,
    stop_after: int | None = None,
) -> list[Row]:
    """Take a learner through a stream, going on from the stages ``folder`` already holds.

    Args:
        learner: A fresh learner.
        stream: Its tasks; the test split is opened by the evaluator only.
        accelerator: Device and precision; by default float32 on the best device here.
        seed: Training seed; (seed, stage) decides everything random in a stage.
        batch_size: Images a forward pass outside training.
        folder: Where stages are written; None keeps nothing on disk.
        keep: Stages whose weights stay on disk, ``all`` or ``last``.
        display: Progress bars.
        log: Receives what the learner logs while it trains.
        finished: Called after every stage with the rows so far.
        stop_after: Stop once this many stages are there, as an interruption would.

    Returns:
        A row per finished stage: counts, costs, what was logged.
    """
    display = display or Display()
    accelerator = accelerator or hardware.accelerator("auto")
    learner.to(accelerator.device)
    learner.backbone.to(accelerator.device)
    cache = FeatureCache(accelerator, batch_size, display.track)
    rows = folder.rows() if folder is not None else []

    def context(stage: int, logged: list[tuple[str, float]] | None = None) -> Context:
        def report(name: str, value: float) -> None:
            if logged is not None:
                logged.append((name, value))
            if log is not None:
                log(name, value)

        return Context(accelerator, cache, seed=seed, stage=stage, log=report, track=display.track)

    past = stream.tasks[: len(rows)]
    if not learner.stores_images:
        for task in past:
            task.close()
    if past and folder is not None:
        folder.load_learner(learner, past, context)
    unchanged_since = rows[-1]["unchanged_since"] if rows else 0
    stages = len(stream) if stop_after is None else min(stop_after, len(stream))
    for task in display.track(
        stream.tasks[len(rows) : stages], f"{learner.name or type(learner).__name__}: stages", stages - len(rows)
    ):
        logged: list[tuple[str, float]] = []
        ctx = context(task.index, logged)
        version, passes, started = learner.feature_version, learner.backbone.passes, time.perf_counter()
        learner.begin(task, ctx)
        learner.train()
        learner.learn(task, ctx)
        learner.eval()
        trained = learner.backbone.passes - passes
        learned = time.perf_counter()
        if learner.feature_version != version:
            unchanged_since = task.index
        found = evaluate(learner, stream, task.index, cache, unchanged_since)
        if not learner.stores_images:
            task.close()
        costs = {
            "trainable_parameters": ctx.trainable_parameters,
            **state_bytes(learner),
            "train_images": len(task.train),
            "train_passes": trained,
            "test_passes": found.passes,
            "seconds_learn": learned - started,
            "seconds_test": time.perf_counter() - learned,
            "peak_memory_bytes": hardware.peak_memory_bytes(accelerator.device),
        }
        row = {**counts(found, stream, task.index), "unchanged_since": unchanged_since, "costs": costs, "log": logged}
        if folder is not None:
            arrays = as_tensors(
                index=found.index,
                task=found.task,
                label=found.label,
                predicted=found.predicted,
                within_task=found.within,
                top=found.top,
                confusion=confusion_matrix(found.label, found.predicted, len(task.seen)),
            )
            folder.save_stage(task.index, learner, row, arrays, keep)
        rows.append(row)
        if finished is not None:
            finished(rows)
    return rows


def run(config: Config, root: Path | str = "results", *, display: Display | None = None) -> list[Path]:
    """Run everything a configuration asks for, skipping what is finished and going on with what is not.

    Args:
        config: The benchmark.
        root: The results folder.
        display: Terminal output; none by default.

    Returns:
        The run folders, in order.

    Raises:
        CilError: Wrong input, or a folder that cannot be used; the message says what to do.
    """
    display = display or Display()
    todo = list(plans(config))
    accelerator = hardware.accelerator(config.hardware.device, config.precision)
    train, test = (LoadedSplit(config.data, split, config.hardware) for split in ("train", "test"))
    backbone = load_backbone(config.backbone, accelerator.device)
    transforms = Transforms(backbone.data_config, config.transform)
    images = train.images(transforms), test.images(transforms)
    streams = [make_stream(plan.config, *images) for plan in todo]  # a class order that does not fit is found here
    folders = []
    with display:
        for plan, stream in zip(todo, streams, strict=True):
            folder = RunFolder(Path(root) / plan.place)
            header = make_header(plan, stream, backbone, transforms, train, test, accelerator)
            with folder.locked(), folder.reported(only_full=True):
                _run_one(plan, folder, stream, backbone, header, accelerator, display)
            folders.append(folder.path)
    return folders


def _run_one(
    plan: Plan,
    folder: RunFolder,
    stream: Stream,
    backbone: Backbone,
    header: Row,
    accelerator: Accelerator,
    display: Display,
) -> None:
    check_same_run(folder, header)
    title = f"{plan.entry.title} {folder.path.name}"
    stages = len(stream)
    if (folder.path / "metrics.json").exists() and results.load(folder.path)["complete"]:
        display.say(f"{title}  finished already: {folder.path}")
        return
    folder.write("config.yaml", yaml.safe_dump(header["config"], sort_keys=False, allow_unicode=True))

    def write_metrics(rows: list[Row]) -> None:
        folder.write("metrics.json", to_json(results.assemble(header, rows, stages)))

    def finished(rows: list[Row]) -> None:
        tracker.stage(rows)
        write_metrics(rows)
        display.stage(title, rows, stages)

    earlier = folder.rows()
    write_metrics(earlier)  # from here on the folder says which run it holds
    with isolated(0):  # a learner that forgot its generator is still repeatable here; the checks find it out
        learner = plan.cls(plan.parameters, backbone)
    tracker = Tracker(folder.path, header)
    try:
        tracker.replay(earlier)
        rows = run_stages(
            learner,
            stream,
            accelerator=accelerator,
            seed=plan.seed,
            batch_size=plan.config.batch_size,
            folder=folder,
            keep=plan.config.hardware.checkpoints,
            display=display,
            log=tracker.scalar,
            finished=finished,
        )
        tracker.finish(results.assemble(header, rows, stages)["summary"])
    finally:
        tracker.close()


def make_stream(config: Config, train: ImageSet, test: ImageSet) -> Stream:
    """The stream a single run's configuration describes."""
    wanted = config.stream
    order: Order = config.orders[0]
    if wanted.type == "domain_incremental":
        tasks: ClassIncremental | DomainIncremental = DomainIncremental(order)
    else:
        tasks = ClassIncremental(order, wanted.base, wanted.increment, wanted.sizes)
    return Stream(train, test, tasks, validation=wanted.validation, test_on=wanted.test_on)
