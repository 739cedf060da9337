"""Merges checkpoints on disk, one tensor at a time; this is ``cil merge``.

The rules are the same as in memory, but their inputs are read lazily and their state is kept in a file. No file gets
its final name before it is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cil.errors import BackboneError, ConfigError, RunError
from cil.merging.adapters import AdapterUpdates, is_adapter
from cil.merging.base import Rule, Track
from cil.merging.configs import CustomRule, RuleSection, build_rule, rule_config
from cil.merging.files import INDEX, Checkpoint, TensorWriter, as_bytes
from cil.merging.layout import HEADS, Entry, Layout, base_names, check_names, layout
from cil.merging.statistics import Statistics
from cil.merging.store import State, StateSpec, slot_name
from cil.utils.files import flush, reporting
from cil.utils.paths import expand

log = logging.getLogger(__name__)
FORMAT = "cil merge state 1"
COPIED = (".json", ".txt", ".model")
"""Suffixes of files that are copied from the base's folder: configurations and vocabularies, not its model card."""
_SCALARS: StateSpec = {"count": ((), torch.int64), "norm_sum": ((), torch.float64)}


def merge_files(
    rule: RuleSection | CustomRule | str | dict[str, Any],
    base: str | Path,
    tasks: Sequence[str | Path],
    out: str | Path,
    *,
    state: str | Path | None = None,
    stats: Sequence[str | Path] = (),
    exclude: Sequence[str] = HEADS,
    track: Track | None = None,
) -> Rule:
    """Merge checkpoints into one.

    Memory is a few times that of the largest tensor, whatever the size and the number of the models. The state is kept
    in temporary files next to ``out`` (or next to ``state``), at most two at a time.

    Args:
        rule: A rule's name, or its configuration.
        base: The pre-trained checkpoint: safetensors file, index or folder.
        tasks: Checkpoints fine-tuned from it, in order; also folders with LoRA adapters of PEFT, as they are.
        out: Path of the result: one file if it ends in ``.safetensors``, else a folder, sharded as the base is, with
            the base's configuration files. Tensors that are not merged are the base's.
        state: File of the rule's state. If it exists, merging continues from it; it is replaced before ``out`` appears.
            It records a digest of every task merged, so a repeated call does not merge its tasks twice: the first
            ``tasks`` are left out, with a warning, if they are the last ones of the state.
        stats: Files of statistics (:meth:`Statistics.save`), one per task in the same order, if the rule needs them.
        exclude: Regular expressions of names that are not merged.
        track: Function that wraps loops in progress bars.

    Returns:
        The rule, for its counts and norms; the state of its tensors is gone.

    Raises:
        ConfigError, BackboneError, DataError: An input does not fit; nothing is written then.
        RunError: ``out`` exists, ``state`` belongs to another merge, or writing failed.
    """
    config = rule_config(rule)
    out, state = expand(out), None if state is None else expand(state)
    if out.exists():
        raise RunError(f"{out}: exists already; remove it or choose another name")
    if state is not None and state.suffix != ".safetensors":
        raise ConfigError(f"{state}: the state's name must end in .safetensors")
    if not tasks:
        raise ConfigError("merge: no task given; name at least one fine-tuned checkpoint")
    pretrained = Checkpoint(expand(base))
    plan = layout(pretrained, exclude=exclude)
    finetuned = [_opened(expand(task), pretrained, plan) for task in tasks]
    merger, name = build_rule(config), config.cls if isinstance(config, CustomRule) else config.name
    if stats and not merger.needs:
        raise ConfigError(f"merge: {name} uses no statistics; leave --stats out")
    if merger.needs and len(stats) != len(tasks):
        raise ConfigError(
            f"merge: {name} needs statistics of every task (--stats once per task, in order): {len(tasks)} tasks, "
            f"{len(stats)} files; cil.merging.statistics computes them"
        )
    statistics: list[Statistics | None] = [Statistics.load(expand(file)) for file in stats]
    statistics = statistics or [None] * len(tasks)
    for task in finetuned:  # this is cheap, and a mistake in the last task must not appear after an hour's work
        if isinstance(task, Checkpoint):
            check_names(task, pretrained, plan)
    about = {"format": FORMAT, "rule": config.model_dump_json(), "exclude": json.dumps(list(exclude))}
    names = [entry.name for entry in plan.entries]
    about["base"] = _digest(pretrained, names, track, "reading the base")
    scratch = (state or out).parent / f".{(state or out).name}.state"
    partial = out.parent / f".{out.name}.partial"
    advice = "Partial files were removed; a state file is unchanged"
    with reporting(out, advice), _scratch(scratch), _scratch(partial), FileStore(scratch, merger, about) as store:
        merger.start(pretrained, exclude=exclude, store=store)
        digests = [""] * len(tasks)
        if state is not None:
            for i, task in enumerate(finetuned):
                held = (plan.held(entry, task) for entry in plan.entries)  # a tied tensor has two names
                own = [name for name in held if name is not None]  # an adapter has only the weights that it changes
                digests[i] = _digest(task, own, track, f"reading {task.path.name}")
            if state.exists():
                store.open(state)
        known = _repeated(store.tasks, digests)
        for task in finetuned[:known]:
            log.warning("%s: already the last task of %s, so it is not merged again", task.path, state)
        for task, digest, task_statistics in list(zip(finetuned, digests, statistics, strict=True))[known:]:
            store.tasks.append(digest)
            add = merger.add if isinstance(task, Checkpoint) else merger.add_update
            add(task, task_statistics, track)
        written = _write(merger, pretrained, partial, out, track)
        if state is not None:  # before the result: if that is there, its tasks are in the state, also after a crash
            store.current.replace(state)
            flush(state.parent)
        written.rename(out)
        flush(out.parent)
    return merger


def _opened(path: Path, pretrained: Checkpoint, plan: Layout) -> Checkpoint | AdapterUpdates:
    """A task, under the base's names."""
    if is_adapter(path):
        return AdapterUpdates(path, plan)
    checkpoint = Checkpoint(path)
    checkpoint.rename(base_names(checkpoint, pretrained, plan))
    return checkpoint


def _repeated(merged: Sequence[str], tasks: Sequence[str]) -> int:
    """How many of the first ``tasks`` are the last ones of ``merged``: what an earlier call had got through."""
    return max(n for n in range(min(len(merged), len(tasks)) + 1) if list(merged[len(merged) - n :]) == list(tasks[:n]))


class FileStore:
    """Keeps a rule's state in a safetensors file, which is replaced as a whole after every task.

    Args:
        folder: Scratch folder.
        rule: The rule whose state is kept; its counts are saved with the slots.
        about: Metadata of the merge that the state belongs to, checked when a file is opened.

    Attributes:
        tasks: Digests of the tasks merged so far, in order; append one before its task is merged.
    """

    def __init__(self, folder: Path, rule: Rule, about: Mapping[str, str]) -> None:
        self._folder, self._rule, self._about = folder, rule, dict(about)
        self.tasks: list[str] = []
        self._opened: Checkpoint | None = None
        self._writer: TensorWriter | None = None
        self._written = 0

    def __enter__(self) -> FileStore:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    @property
    def current(self) -> Path:
        """The file of the state after the last task.

        Raises:
            RunError: No task has been merged yet.
        """
        if self._opened is None:
            raise RunError("no task has been merged yet")
        return self._opened.path

    def open(self, file: Path) -> None:
        """Continue from a saved state.

        Raises:
            RunError: The file belongs to another base, rule or exclusion, or is not a state.
        """
        try:
            opened = Checkpoint(file)
        except BackboneError as error:
            raise RunError(f"{error}; remove it to start from scratch") from None
        for key, expected in self._about.items():
            if opened.metadata.get(key) != expected:
                got = opened.metadata.get(key, "none")
                detail = "" if key == "base" else f" ({got} instead of {expected})"
                raise RunError(f"{file}: is the state of another merge: its {key} differs{detail}; use another --state")
        slots = {name: opened.shape_and_dtype(name) for name in opened}
        self._rule.adopt(slots)
        if slots != self._shapes():
            raise RunError(f"{file}: does not contain this rule's state; remove it to start from scratch")
        self._opened = opened
        self.tasks = opened.metadata.get("tasks", "").split()  # a state of an older version records none
        self._rule.count.copy_(opened["count"])
        self._rule.norm_sum.copy_(opened["norm_sum"])

    def get(self, entry: Entry) -> State:
        slots = self._rule.state_spec(entry)
        if self._opened is None:
            return {slot: torch.zeros(shape, dtype=dtype) for slot, (shape, dtype) in slots.items()}
        # a rule that grows knows the slots of the task that is being added, which are not in the file yet
        names = {slot: name for slot in slots if (name := slot_name(entry, slot)) in self._opened}
        return {slot: self._opened[name] for slot, name in names.items()}

    def put(self, entry: Entry, state: State) -> None:
        if self._writer is None:
            self._writer = TensorWriter(self._file(), self._shapes(), {**self._about, "tasks": " ".join(self.tasks)})
        for slot, value in state.items():
            self._writer.write(slot_name(entry, slot), value)

    def commit(self) -> None:
        if self._writer is None:
            return
        with self._writer as writer:
            for name in _SCALARS:
                writer.write(name, self._rule.get_buffer(name))
        self._writer = None
        old, self._opened = self._opened, Checkpoint(self._file())
        self._written += 1
        if old is not None and old.path.parent == self._folder:
            old.path.unlink()

    def _file(self) -> Path:
        return self._folder / f"{self._written}.safetensors"

    def _shapes(self) -> StateSpec:
        slots = {
            slot_name(e, s): kept for e in self._rule.layout.entries for s, kept in self._rule.state_spec(e).items()
        }
        return {**slots, **_SCALARS}


def _write(merger: Rule, pretrained: Checkpoint, scratch: Path, out: Path, track: Track | None) -> Path:
    """Write the merged model into the scratch folder; return the path to be renamed to ``out``."""
    metadata = {"format": "pt", "cil_rule": type(merger).__name__, "cil_tasks": str(int(merger.count))}
    items = merger.items(track=track)
    if out.suffix == ".safetensors":
        files, result = {scratch / "model.safetensors": list(pretrained)}, scratch / "model.safetensors"
    else:
        folder = scratch / "folder"
        folder.mkdir()
        files, result = {folder / file.name: names for file, names in pretrained.files.items()}, folder
        source = next(iter(pretrained.files)).parent
        for extra in source.iterdir() if pretrained.path.is_dir() or pretrained.path.name == INDEX else ():
            if extra.suffix in COPIED and extra.is_file():
                shutil.copyfile(extra, folder / extra.name)
    for file, names in files.items():  # items come in the order of the base's files
        with TensorWriter(file, {name: pretrained.shape_and_dtype(name) for name in names}, metadata) as writer:
            for _ in names:
                writer.write(*next(items))
    return result


def _digest(checkpoint: Checkpoint | AdapterUpdates, names: Sequence[str], track: Track | None, title: str) -> str:
    """Compute a sha256 over name, dtype, shape and bytes of the tensors that are merged."""
    digest = hashlib.sha256()
    items: Iterable[str] = track(names, title, len(names)) if track else names
    for name in items:
        shape, dtype = checkpoint.shape_and_dtype(name)
        digest.update(f"{name} {dtype} {shape}\n".encode())
        digest.update(memoryview(as_bytes(checkpoint[name])))
    return digest.hexdigest()


@contextmanager
def _scratch(folder: Path) -> Iterator[None]:
    """Create a folder for the duration of the block; remains of a killed process are removed first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
