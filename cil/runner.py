"""The stage loop: learn, test, log, checkpoint; and the loop over learners, class orders and seeds around it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from cil import hardware, results
from cil.backbone import Backbone, load_backbone
from cil.checkpoint import RunFolder, as_tensors, state_bytes
from cil.config import Config, LearnerEntry
from cil.console import Display
from cil.data.images import ImageSet, LoadedSplit
from cil.data.transforms import Transforms
from cil.errors import RunError
from cil.evaluation import counts, evaluate
from cil.features import FeatureCache
from cil.learner import Context, Learner, LearnerConfig
from cil.learners import registry
from cil.metrics import confusion_matrix
from cil.randomness import isolated
from cil.stream import ClassIncremental, DomainIncremental, Order, Stream, past_tasks
from cil.tracking import Tracker

Row = dict[str, Any]


def run_stages(
    learner: Learner,
    stream: Stream,
    *,
    accelerator: Accelerator,
    seed: int = 0,
    batch_size: int = 128,
    folder: RunFolder | None = None,
    tracker: Tracker | None = None,
    display: Display | None = None,
    title: str = "",
    keep: str = "all",
    stop_after: int | None = None,
) -> list[Row]:
    """Take a learner through a stream, going on from the stages ``folder`` already holds.

    Args:
        learner: A fresh learner.
        stream: Its tasks; the test split is opened by the evaluator only.
        accelerator: Device and precision.
        seed: Training seed; (seed, stage) decides everything random in a stage.
        batch_size: Images a forward pass outside training.
        folder: Where stages are written; None keeps nothing on disk.
        tracker: TensorBoard.
        display: Terminal.
        title: Name of the run on the terminal.
        keep: Stages whose weights stay on disk, ``all`` or ``last``.
        stop_after: Stop once this many stages are there, as an interruption would.

    Returns:
        A row per finished stage: counts, costs, what was logged.
    """
    display = display or Display()
    learner.to(accelerator.device)
    cache = FeatureCache(accelerator, batch_size, display.track)
    rows = folder.rows() if folder is not None else []

    def context(stage: int, log: list[tuple[str, float]] | None = None) -> Context:
        def report(name: str, value: float) -> None:
            if log is not None:
                log.append((name, value))
                if tracker is not None:
                    tracker.scalar(name, value)

        return Context(accelerator, cache, seed=seed, stage=stage, log=report, track=display.track)

    for task in stream.tasks[: len(rows)]:
        if not learner.stores_images:
            task.close()
        learner.begin(task, context(task.index))
    if rows and folder is not None:
        folder.load_learner(learner, len(rows) - 1)
    if tracker is not None:
        tracker.replay(rows)
    unchanged_since = rows[-1]["unchanged_since"] if rows else 0
    stages = len(stream) if stop_after is None else min(stop_after, len(stream))
    for task in display.track(stream.tasks[len(rows) : stages], title or "stages", stages - len(rows)):
        log: list[tuple[str, float]] = []
        ctx = context(task.index, log)
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
        row = {**counts(found, stream, task.index), "unchanged_since": unchanged_since, "costs": costs, "log": log}
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
        if tracker is not None:
            tracker.stage(rows)
        display.stage(title, rows, len(stream))
    return rows


@dataclass(frozen=True)
class Plan:
    """One run of a benchmark: a learner, a class order, a seed, and the configuration narrowed to them."""

    config: Config
    cls: type[Learner]
    parameters: LearnerConfig

    @property
    def entry(self) -> LearnerEntry:
        return self.config.learners[0]

    @property
    def order(self) -> Order:
        return self.config.orders[0]

    @property
    def seed(self) -> int:
        return self.config.seeds[0]

    @property
    def place(self) -> Path:
        """Folder below the results folder: ``<name>/<learner>/order<k>-seed<s>``."""
        order = self.order
        if not isinstance(order, (int, str)):
            order = "list" + hashlib.sha256(json.dumps(list(order)).encode()).hexdigest()[:8]
        return Path(self.config.name) / self.entry.title / f"order{order}-seed{self.seed}"


def plans(config: Config) -> Iterator[Plan]:
    """Every run a configuration asks for; all hyper-parameters are validated before the first one starts.

    Raises:
        PluginError: A learner cannot be found.
        ConfigError: A hyper-parameter is wrong.
    """
    configured = [(entry, *registry.configure(entry)) for entry in config.learners]
    for entry, cls, parameters in configured:
        identity = {"class": entry.cls} if entry.cls else {"name": entry.name}
        resolved = LearnerEntry.model_validate({**identity, "label": entry.label, **parameters.model_dump(mode="json")})
        for order in entry.orders or config.orders:
            for seed in entry.seeds or config.seeds:
                yield Plan(config.model_copy(update={"learners": [resolved], "orders": [order], "seeds": [seed]}), cls, parameters)


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
    folders = []
    with display:
        for plan in todo:
            folder = RunFolder(Path(root) / plan.place)
            stream = make_stream(plan.config, *images)
            header = make_header(plan, stream, backbone, transforms, train, test, accelerator)
            with folder.locked():
                _run_one(plan, folder, stream, backbone, header, accelerator, display)
            folders.append(folder.path)
    return folders


def _run_one(
    plan: Plan, folder: RunFolder, stream: Stream, backbone: Backbone, header: Row, accelerator: Accelerator, display: Display
) -> None:
    check_same_run(folder, header)
    title = f"{plan.entry.title} {folder.path.name}"
    stages = len(stream)
    if (folder.path / "metrics.json").exists() and results.load(folder.path)["complete"]:
        display.say(f"{title}  finished already: {folder.path}")
        return
    folder.write("config.yaml", yaml.safe_dump(header["config"], sort_keys=False, allow_unicode=True))
    folder.write("metrics.json", _json(results.assemble(header, folder.rows(), stages)))
    with isolated(0):  # a learner that forgot its generator is still repeatable here; the checks find it out
        learner = plan.cls(plan.parameters, backbone)
    tracker = Tracker(folder.path, header)
    try:
        rows = run_stages(
            learner,
            stream,
            accelerator=accelerator,
            seed=plan.seed,
            batch_size=plan.config.batch_size,
            folder=folder,
            tracker=tracker,
            display=display,
            title=title,
            keep=plan.config.hardware.checkpoints,
        )
        tracker.finish(results.assemble(header, rows, stages)["summary"])
    finally:
        folder.write("metrics.json", _json(results.assemble(header, folder.rows(), stages)))
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


def make_header(
    plan: Plan,
    stream: Stream,
    backbone: Backbone,
    transforms: Transforms,
    train: LoadedSplit,
    test: LoadedSplit,
    accelerator: Accelerator,
) -> Row:
    """Provenance: everything about a run that is known before it starts."""
    return {
        "learner": plan.entry.title,
        "paper": plan.cls.paper,
        "stores_images": plan.cls.stores_images,
        "trains_backbone": plan.cls.trains_backbone,
        "chosen_by": plan.config.chosen_by,
        "tested_on": plan.config.stream.test_on,
        "config": dump(plan.config),
        "class_names": list(stream.class_names),
        "class_order": list(stream.order),
        "tasks": [list(task.classes) for task in stream.tasks],
        "backbone": {"name": backbone.name, "sha256": backbone.fingerprint, "feature_dim": backbone.feature_dim},
        "transform": transforms.card,
        "data": {
            split: {"sha256": loaded.source.fingerprint, "images": len(loaded.source), "skipped": loaded.skipped}
            for split, loaded in (("train", train), ("test", test))
        },
        "versions": results.versions(),
        "machine": hardware.facts(accelerator.device),
    }


def dump(config: Config) -> dict[str, Any]:
    """A configuration as plain values that validate to the same configuration again."""
    plain = config.model_dump(mode="json", by_alias=True)
    fields = {f.alias or name for name, f in LearnerEntry.model_fields.items()}
    plain["learners"] = [
        {k: v for k, v in entry.items() if v is not None or k not in fields} for entry in plain["learners"]
    ]
    return plain


def check_same_run(folder: RunFolder, header: Row) -> None:
    """Refuse a folder that holds another run.

    Raises:
        RunError: Naming the first key that differs.
    """
    if not (folder.path / "metrics.json").exists():
        if folder.finished():
            raise RunError(f"{folder.path}: holds stages but no metrics.json to tell of which run; move it away or use another --results")
        return
    old, new = _identity(results.load(folder.path)), _identity(header)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise RunError(
                f"{folder.path}: holds a run with {key} = {old.get(key)!r}, now {new.get(key)!r}; "
                "give the new one another name= or label, or another --results"
            )


def _identity(header: Row) -> dict[str, Any]:
    """What makes two runs the same: everything but the machine, the name, and where the data lies."""
    config = {k: v for k, v in header["config"].items() if k not in ("hardware", "name")}
    config["data"] = {k: v for k, v in config["data"].items() if k not in ("root", "download")}
    config["backbone"] = {k: v for k, v in config["backbone"].items() if k != "weights"}
    flat = dict(_flatten(config))
    flat["backbone weights (sha256)"] = header["backbone"]["sha256"]
    for split in ("train", "test"):
        flat[f"{split} data (sha256)"] = header["data"][split]["sha256"]
    return flat


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, inner in enumerate(value):
            yield from _flatten(inner, f"{prefix}.{i}")
    else:
        yield prefix, value


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def restore(folder: Path, accelerator: Accelerator) -> tuple[Learner, Transforms, Sequence[str]]:
    """The learner of a run as it was after its last finished stage, its transforms, and its class names.

    Raises:
        RunError: Not a run folder, no finished stage, or other backbone weights than the run used.
    """
    header = results.load(folder)
    run_folder = RunFolder(folder)
    finished = run_folder.finished()
    if not finished:
        raise RunError(f"{folder}: no stage is finished (or stage folders were not kept); run it first")
    config = Config.model_validate(header["config"])
    cls, parameters = registry.configure(config.learners[0])
    backbone = load_backbone(config.backbone, accelerator.device)
    if backbone.fingerprint != header["backbone"]["sha256"]:
        raise RunError(f"{folder}: the run used backbone weights {header['backbone']['sha256'][:12]}…, now they are {backbone.fingerprint[:12]}…")
    with isolated(0):
        learner = cls(parameters, backbone).to(accelerator.device)
    cache = FeatureCache(accelerator, config.batch_size)
    tasks = past_tasks(header["tasks"][:finished], header["class_names"])
    for task in tasks:
        learner.begin(task, Context(accelerator, cache, seed=config.seeds[0], stage=task.index))
    run_folder.load_learner(learner, finished - 1)
    learner.eval()
    return learner, Transforms(backbone.data_config, config.transform), tasks[-1].names
