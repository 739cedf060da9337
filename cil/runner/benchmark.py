"""A benchmark: the loop over learners, class orders and seeds, with one run folder for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator

from cil import results
from cil.backbone import Backbone, load_backbones, source_head, text_side
from cil.config import Config
from cil.config.parsing import to_yaml
from cil.data.classes import NoSplitError
from cil.data.images import ImageSet, LoadedSplit
from cil.data.index_lists import read_sessions
from cil.data.packed import make_transforms
from cil.errors import BackboneError, ConfigError, TrainingError
from cil.learners import registry
from cil.results import Header, Stage, StageRow
from cil.runner.checkpoint import RunFolder, to_json
from cil.runner.cleaning import require_sums
from cil.runner.display import Display
from cil.runner.identity import continued, look, version_changes
from cil.runner.plan import Plan, plans
from cil.runner.precision import settled
from cil.runner.provenance import make_header
from cil.runner.stages import Observer, run_stages
from cil.runner.supported import require_supported
from cil.runner.tensorboard import Tracker
from cil.store import open_store
from cil.stream import (
    Blurry,
    ClassDomainIncremental,
    ClassIncremental,
    DomainIncremental,
    Online,
    Order,
    Repetition,
    Sampling,
    Stream,
    Tasks,
)
from cil.utils import hardware
from cil.utils.paths import expand


class Inputs:
    """Data, backbone and feature store of a benchmark, loaded once for all of its runs."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.store = open_store(config.hardware)
        self.train = LoadedSplit(config.data, "train", config.hardware, self.store)
        self.test = self._test(config)
        self.backbone = load_backbones(config, device)
        self.transforms = make_transforms(self.backbone.data_config, config.transform)
        test = None if self.test is None else self.test.images(self.transforms)
        self.images = self.train.images(self.transforms), test

    def _test(self, config: Config) -> LoadedSplit | None:
        """The test split; a benchmark that tests on validation images needs none, unless it names one."""
        try:
            return LoadedSplit(config.data, "test", config.hardware, self.store)
        except NoSplitError:
            if config.stream.test_on == "test" or config.data.test is not None:
                raise
            return None


def run(
    config: Config,
    root: Path | str = "results",
    *,
    display: Display | None = None,
    load: Callable[[Config, torch.device], Inputs] = Inputs,
    redo: bool = False,
) -> list[Path]:
    """Make all runs of a configuration: finished ones are skipped, and interrupted ones are resumed.

    Under ``accelerate launch`` every process runs this, trains on its share of each batch, and ends with the same
    learner; the first one alone writes and prints.

    Args:
        config: The benchmark.
        root: The results folder; ``~`` and environment variables are expanded, as everywhere.
        display: Terminal output; none by default.
        load: Loads data and backbone. Callers that run many benchmarks can pass one that caches.
        redo: Whether finished stages that depend on something that has changed since (settings, data, code), or from
            which nothing can continue, are deleted and computed again; by default they are an error.

    Returns:
        The run folders, in order.

    Raises:
        CilError: Wrong input, or a folder that cannot be used; the message says what to do.
    """
    root, todo = expand(root), list(plans(config))
    timed = config.precision == "auto"
    accelerator = hardware.accelerator(config.hardware.device, "fp32" if timed else config.precision)
    display = display if display is not None and accelerator.is_main_process else Display()
    inputs = load(config, accelerator.device)
    backbone = inputs.backbone
    if timed:
        todo, line = settled(todo, root, backbone, accelerator)
        display.say(line)
    streams = [make_stream(plan.config, *inputs.images) for plan in todo]
    _try_all(todo, streams, backbone)
    folders = []
    with display:
        for line in [line for split in (inputs.train, inputs.test) if split for line in split.lines()]:
            display.say(line)
        for plan, stream in zip(todo, streams, strict=True):
            if timed:  # runs whose folders record different ones keep theirs
                accelerator = hardware.accelerator(config.hardware.device, plan.config.precision)
            folder = RunFolder(root / plan.place, keep=config.hardware.checkpoints)
            header = make_header(plan, stream, backbone, inputs.transforms, inputs.train, inputs.test, accelerator)
            held = folder.locked() if accelerator.is_main_process else nullcontext()
            with held, folder.reported(only_full=True):
                _run_one(plan, folder, stream, inputs, header, accelerator, display, redo)
            folders.append(folder.path)
    return folders


def _try_all(todo: list[Plan], streams: list[Stream], backbone: Backbone) -> None:
    """Build every learner once: one that does not fit backbone or memory is found before the first image is read."""
    tried = set()
    for plan, stream in zip(todo, streams, strict=True):
        require_supported(plan.cls, stream, plan.parameters, plan.config.noise_filter)
        if plan.entry.title in tried:  # other orders and seeds of the same
            continue
        tried.add(plan.entry.title)
        try:
            if plan.cls.uses_texts(plan.parameters):
                text_side(backbone)
            if plan.cls.uses_source_head(plan.parameters):
                source_head(backbone)
            learner = registry.instantiate(plan.cls, plan.parameters, backbone)
            if plan.config.pseudo is not None:
                require_sums(learner)
            learner.require_memory(len(stream.class_names), backbone.device)
        except (BackboneError, ConfigError) as error:
            raise type(error)(f"learner {plan.entry.title}: {error}") from None


def _run_one(
    plan: Plan,
    folder: RunFolder,
    stream: Stream,
    inputs: Inputs,
    header: Header,
    accelerator: Accelerator,
    display: Display,
    redo: bool,
) -> None:
    accelerator.wait_for_everyone()  # until the main process holds the folder and has cleaned it
    title = f"{plan.entry.title} {folder.path.name}"
    stages = len(stream)
    found = look(folder, header, redo=redo)
    if found.complete:
        display.say(f"{title}  finished already: {folder.path}")
        return
    header = continued(header, found.header, found.keep)
    if changes := version_changes(header, found.keep):
        display.say(f"{title}  continues after stage {found.keep} of other versions: {changes}")
    accelerator.wait_for_everyone()  # until every process has seen what the main one is about to remove
    if accelerator.is_main_process:
        for stage in folder.keep_first(found.keep):
            display.say(f"{title}  stage {stage + 1}/{stages} is computed again")
    accelerator.wait_for_everyone()
    earlier = folder.stages() if found.keep else []
    accelerator.wait_for_everyone()  # until every process has read what the main one is about to write
    recorder = _Recorder(folder, header, stages, title, display) if accelerator.is_main_process else None
    with recorder or nullcontext():
        if recorder is not None:
            recorder.start(earlier)
        try:
            rows = run_stages(
                registry.instantiate(plan.cls, plan.parameters, inputs.backbone),
                stream,
                accelerator=accelerator,
                seed=plan.seed,
                batch_size=plan.config.inference_batch_size,
                folder=folder,
                store=inputs.store,
                confidence=plan.config.confidence,
                noise_filter=plan.config.noise_filter,
                pseudo=plan.config.pseudo,
                observer=recorder or Observer(display),
            )
        except TrainingError as error:
            if not folder.finished():
                raise
            kept = "Finished stages are kept; they depend on the settings too, so give --redo when you change one"
            raise TrainingError(f"{error}. {kept}") from None
        if recorder is not None:
            recorder.finish(rows)


class _Recorder(Observer):
    """Records a run in the main process: metrics.json, TensorBoard and the terminal."""

    def __init__(self, folder: RunFolder, header: Header, stages: int, title: str, display: Display) -> None:
        super().__init__(display)
        self.folder, self.header, self.stages, self.title = folder, header, stages, title
        self.checksums: list[str] = []
        folder.write("config.yaml", to_yaml(header["config"]))
        self.tracker = Tracker(folder.path, header)

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.tracker.close()

    def start(self, earlier: Sequence[Stage]) -> None:
        """Write the finished stages first, so that the folder says which run it holds."""
        rows = [stage.row for stage in earlier]
        self.checksums = [stage.checksum for stage in earlier]
        self._write_metrics(rows)
        self.tracker.replay(rows)

    def log(self, name: str, value: float) -> None:
        self.tracker.scalar(name, value)

    def stage(self, rows: Sequence[StageRow]) -> None:
        self.tracker.stage(rows)
        self.checksums.append(results.read_stage(self.folder.path, len(rows) - 1).checksum)
        self._write_metrics(rows)
        self.display.stage(self.title, rows, self.stages)

    def finish(self, rows: Sequence[StageRow]) -> None:
        """Add the final metrics to TensorBoard, beside the hyper-parameters."""
        self.tracker.finish(results.summarise(rows))

    def _write_metrics(self, rows: Sequence[StageRow]) -> None:
        self.folder.write("metrics.json", to_json(results.run_file(self.header, rows, self.checksums, self.stages)))


def make_stream(config: Config, train: ImageSet, test: ImageSet | None) -> Stream:
    """The stream a single run's configuration describes."""
    wanted = config.stream
    order: Order = config.orders[0]
    new = ClassIncremental(order, wanted.initial_classes, wanted.increment, wanted.sizes)
    tasks: Tasks = new
    if wanted.type == "domain_incremental":
        tasks = DomainIncremental(order)
    elif wanted.type == "class_domain_incremental":
        tasks = ClassDomainIncremental(new, wanted.pairs, wanted.seed)
    elif wanted.type == "blurry":
        number = wanted.tasks or 0  # the configuration has refused none
        tasks = Blurry(order, number, wanted.disjoint, wanted.blurry, wanted.stochastic, wanted.seed)
    elif wanted.type == "repetition":
        tasks = Repetition(new, wanted.repetition, wanted.seed)
    sampling = Sampling(
        shots=wanted.shots,
        sessions=None if wanted.shots_files is None else read_sessions(wanted.shots_files, train.source),
        imbalance=None if wanted.imbalance is None else (wanted.imbalance.ratio, wanted.imbalance.order),
        noise=None if wanted.noise is None else (wanted.noise.rate, wanted.noise.kind),
        labelled=wanted.labelled,
        unlabelled_from=wanted.unlabelled_from,
        seed=wanted.seed,
    )
    online = None if wanted.online is None else Online(wanted.online.batch, wanted.online.evaluate_every, wanted.seed)
    return Stream(
        train, test, tasks, validation=wanted.validation, test_on=wanted.test_on, sampling=sampling, online=online
    )
