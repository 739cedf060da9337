"""The stage loop: learn, test, log, checkpoint; and the loop over learners, class orders and seeds around it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from cil import hardware, results
from cil.backbone import Backbone, load_backbone
from cil.checkpoint import RunFolder, as_tensors, state_bytes, to_json
from cil.config import Config
from cil.console import Display
from cil.data.images import ImageSet, LoadedSplit
from cil.data.transforms import Transforms
from cil.errors import BackboneError, StreamError
from cil.evaluation import counts, evaluate
from cil.features import FeatureCache
from cil.learner import Context, Learner
from cil.metrics import confusion_matrix
from cil.plan import Plan, plans
from cil.protocol import ClassIncremental, DomainIncremental, Order
from cil.provenance import check_same_run, make_header
from cil.randomness import isolated
from cil.store import FeatureStore, open_store
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
    store: FeatureStore | None = None,
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
        store: Features that lie on disk, and those that shall; none by default.

    Returns:
        A row per finished stage: counts, costs, what was logged.
    """
    display = display or Display()
    accelerator = accelerator or hardware.accelerator("auto")
    learner.to(accelerator.device)
    learner.backbone.to(accelerator.device)
    cache = FeatureCache(accelerator, batch_size, display.track, store)
    rows = folder.rows() if folder is not None else []

    def context(stage: int, logged: list[tuple[str, float]] | None = None) -> Context:
        def report(name: str, value: float) -> None:
            if logged is not None:
                logged.append((name, value))
            if log is not None:
                log(name, value)

        return Context(accelerator, cache, seed=seed, stage=stage, log=report, track=display.track)

    require_fit(type(learner), stream)
    past = stream.tasks[: len(rows)]
    if not learner.stores_images:
        for task in past:
            task.close()
    if past and folder is not None:
        folder.load_learner(learner, past, context)
    since = dict(zip(learner.views(), rows[-1]["unchanged_since"], strict=True)) if rows else {}
    stages = len(stream) if stop_after is None else min(stop_after, len(stream))
    for task in display.track(
        stream.tasks[len(rows) : stages], f"{learner.name or type(learner).__name__}: stages", stages - len(rows)
    ):
        logged: list[tuple[str, float]] = []
        ctx = context(task.index, logged)
        passes, read, started = learner.backbone.passes + cache.spared, cache.read, time.perf_counter()
        learner.begin(task, ctx)
        learner.train()
        learner.learn(task, ctx)
        learner.eval()
        trained, read = learner.backbone.passes + cache.spared - passes, cache.read - read
        learned = time.perf_counter()
        since = {version: since.get(version, task.index) for version in learner.views()}
        found = evaluate(learner, stream, task.index, cache, since)
        if not learner.stores_images:
            task.close()
        costs = {
            "trainable_parameters": ctx.trainable_parameters,
            **state_bytes(learner),
            "train_images": len(task.train),
            "train_passes": hardware.total(accelerator, trained),
            "test_passes": hardware.total(accelerator, found.passes),
            "features_from_store": hardware.total(accelerator, read + found.read),
            "seconds_learn": learned - started,
            "seconds_test": time.perf_counter() - learned,
            "peak_memory_bytes": hardware.peak_memory_bytes(accelerator.device),
        }
        row = {
            **counts(found, stream, task.index),
            "unchanged_since": list(since.values()),
            "costs": costs,
            "log": logged,
            "histograms": ctx.histograms,
        }
        if folder is not None and accelerator.is_main_process:
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


def require_fit(cls: type[Learner], stream: Stream) -> None:
    """Refuse a learner that is not defined on this kind of stream.

    Raises:
        StreamError: The learner needs new classes in every task, and a task shows old ones again.
    """
    if cls.needs_new_classes and sum(len(task.classes) for task in stream.tasks) > len(stream.class_names):
        raise StreamError(
            f"{cls.name or cls.__name__} is defined for tasks of new classes only, and this stream shows classes "
            "again; use stream.type=class_incremental, or another learner (ncm, ranpac, …)"
        )


class Inputs:
    """Data, backbone and feature store of a benchmark, loaded; what runs on them share."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.store = open_store(config.hardware)
        self.train, self.test = (
            LoadedSplit(config.data, split, config.hardware, self.store) for split in ("train", "test")
        )
        self.backbone = load_backbone(config.backbone, device)
        self.transforms = Transforms(self.backbone.data_config, config.transform)
        self.images = self.train.images(self.transforms), self.test.images(self.transforms)


def run(
    config: Config,
    root: Path | str = "results",
    *,
    display: Display | None = None,
    load: Callable[[Config, torch.device], Inputs] = Inputs,
) -> list[Path]:
    """Run everything a configuration asks for, skipping what is finished and going on with what is not.

    Under ``accelerate launch`` every process runs this, trains on its share of each batch, and ends with the same
    learner; the first one alone writes and prints.

    Args:
        config: The benchmark.
        root: The results folder.
        display: Terminal output; none by default.
        load: Gives data and backbone; who runs many benchmarks on the same ones may hand out what is loaded already.

    Returns:
        The run folders, in order.

    Raises:
        CilError: Wrong input, or a folder that cannot be used; the message says what to do.
    """
    todo = list(plans(config))
    accelerator = hardware.accelerator(config.hardware.device, config.precision)
    display = display if display is not None and accelerator.is_main_process else Display()
    inputs = load(config, accelerator.device)
    backbone = inputs.backbone
    streams = [make_stream(plan.config, *inputs.images) for plan in todo]
    _try_all(todo, streams, backbone)
    folders = []
    with display:
        for plan, stream in zip(todo, streams, strict=True):
            folder = RunFolder(Path(root) / plan.place)
            header = make_header(plan, stream, backbone, inputs.transforms, inputs.train, inputs.test, accelerator)
            held = folder.locked() if accelerator.is_main_process else nullcontext()
            with held, folder.reported(only_full=True):
                _run_one(plan, folder, stream, backbone, header, accelerator, display, inputs.store)
            folders.append(folder.path)
    return folders


def _try_all(todo: list[Plan], streams: list[Stream], backbone: Backbone) -> None:
    """Build every learner once, so that one that does not fit the backbone is found before the first one trains."""
    tried = set()
    for plan, stream in zip(todo, streams, strict=True):
        require_fit(plan.cls, stream)
        if plan.entry.title in tried:  # other orders and seeds of the same
            continue
        tried.add(plan.entry.title)
        try:
            build(plan, backbone)
        except BackboneError as error:
            raise BackboneError(f"learner {plan.entry.title}: {error}") from None


def build(plan: Plan, backbone: Backbone) -> Learner:
    """A plan's learner, fresh."""
    with isolated(0):  # a learner that forgot its generator is still repeatable here; the checks find it out
        return plan.cls(plan.parameters, backbone)


def _run_one(
    plan: Plan,
    folder: RunFolder,
    stream: Stream,
    backbone: Backbone,
    header: Row,
    accelerator: Accelerator,
    display: Display,
    store: FeatureStore | None,
) -> None:
    accelerator.wait_for_everyone()  # until the main process holds the folder and has cleaned it
    check_same_run(folder, header)
    title = f"{plan.entry.title} {folder.path.name}"
    stages = len(stream)
    if (folder.path / "metrics.json").exists() and results.load(folder.path)["complete"]:
        display.say(f"{title}  finished already: {folder.path}")
        return
    earlier = folder.rows()
    accelerator.wait_for_everyone()  # until every process has read what the main one is about to write
    writer = _Writer(folder, header, stages, title, display) if accelerator.is_main_process else None
    try:
        if writer is not None:
            writer.start(earlier)
        rows = run_stages(
            build(plan, backbone),
            stream,
            accelerator=accelerator,
            seed=plan.seed,
            batch_size=plan.config.batch_size,
            folder=folder,
            keep=plan.config.hardware.checkpoints,
            display=display,
            log=writer.tracker.scalar if writer is not None else None,
            finished=writer.stage if writer is not None else None,
            store=store,
        )
        if writer is not None:
            writer.tracker.finish(results.assemble(header, rows, stages)["summary"])
    finally:
        if writer is not None:
            writer.tracker.close()


class _Writer:
    """What the main process does beside computing: metrics.json, TensorBoard, the terminal."""

    def __init__(self, folder: RunFolder, header: Row, stages: int, title: str, display: Display) -> None:
        self.folder, self.header, self.stages, self.title, self.display = folder, header, stages, title, display
        folder.write("config.yaml", yaml.safe_dump(header["config"], sort_keys=False, allow_unicode=True))
        self.tracker = Tracker(folder.path, header)

    def start(self, earlier: list[Row]) -> None:
        self._metrics(earlier)  # from here on the folder says which run it holds
        self.tracker.replay(earlier)

    def stage(self, rows: list[Row]) -> None:
        self.tracker.stage(rows)
        self._metrics(rows)
        self.display.stage(self.title, rows, self.stages)

    def _metrics(self, rows: list[Row]) -> None:
        self.folder.write("metrics.json", to_json(results.assemble(self.header, rows, self.stages)))


def make_stream(config: Config, train: ImageSet, test: ImageSet) -> Stream:
    """The stream a single run's configuration describes."""
    wanted = config.stream
    order: Order = config.orders[0]
    if wanted.type == "domain_incremental":
        tasks: ClassIncremental | DomainIncremental = DomainIncremental(order)
    else:
        tasks = ClassIncremental(order, wanted.base, wanted.increment, wanted.sizes)
    return Stream(train, test, tasks, validation=wanted.validation, test_on=wanted.test_on)
