"""Merging checkpoints on disk, one tensor at a time: what ``cil merge`` does.

The rule is the one used in memory; only its inputs are read lazily and its state lies in a file. Nothing appears under
its final name before it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cil.errors import BackboneError, ConfigError, RunError
from cil.files import flush
from cil.merging.base import Rule, Track
from cil.merging.files import INDEX, Checkpoint, TensorWriter, as_bytes
from cil.merging.layout import HEADS, Entry, check_names, layout
from cil.merging.statistics import Statistics
from cil.merging.store import Slots, State, slot_name
from cil.merging.table import OwnRule, RuleSection, build_rule, rule_config

FORMAT = "cil merge state 1"
COPIED = (".json", ".txt", ".model")
"""What of a base's folder is taken over beside the weights: configurations, vocabularies. Not its model card."""
_SCALARS: Slots = {"count": ((), torch.int64), "norm_sum": ((), torch.float64)}


def merge_files(
    rule: RuleSection | OwnRule | str | dict[str, Any],
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

    Memory is that of the largest tensor, a few times over, whatever the size of the models and their number; the state
    goes through files beside ``out`` (or beside ``state``), at most two of them at a time.

    Args:
        rule: A rule by name, or its configuration.
        base: The pre-trained checkpoint: safetensors file, index or folder.
        tasks: Checkpoints fine-tuned from it, in order.
        out: Where to write: one file if it ends in ``.safetensors``, else a folder, sharded as the base is, with the
            base's configuration files beside the weights. Tensors that are not merged are the base's.
        state: A file that holds the rule's state; gone on with if it is there, written in the end.
        stats: For rules that need statistics: a file of every task (:meth:`Statistics.save`), in the same order.
        exclude: Regular expressions of names that are not merged.
        track: Wraps the loops in progress bars.

    Returns:
        The rule, for its counts and norms; its slots are gone.

    Raises:
        ConfigError, BackboneError, DataError: Input that does not fit; nothing is written then.
        RunError: ``out`` exists, ``state`` belongs to another merge, or writing failed.
    """
    config = rule_config(rule)
    out, state = Path(out), None if state is None else Path(state)
    if out.exists():
        raise RunError(f"{out}: exists already; remove it or choose another name")
    if state is not None and state.suffix != ".safetensors":
        raise ConfigError(f"{state}: the state's name must end in .safetensors")
    if not tasks:
        raise ConfigError("merge: no task given; name at least one fine-tuned checkpoint")
    pretrained, found = Checkpoint(base), [Checkpoint(task) for task in tasks]
    merger, name = build_rule(config), config.cls if isinstance(config, OwnRule) else config.name
    if stats and not merger.needs:
        raise ConfigError(f"merge: {name} uses no statistics; leave --stats out")
    if merger.needs and len(stats) != len(tasks):
        raise ConfigError(
            f"merge: {name} needs statistics of every task (--stats once a task, in order): {len(tasks)} tasks, "
            f"{len(stats)} files; cil.merging.statistics computes them"
        )
    statistics: list[Statistics | None] = [Statistics.load(file) for file in stats]
    statistics = statistics or [None] * len(tasks)
    plan = layout(pretrained, exclude=exclude)
    for task in found:  # cheap, and a mistake in the tenth is better found before an hour's work on nine
        check_names(task, pretrained, plan)
    about = {"format": FORMAT, "rule": config.model_dump_json(), "exclude": json.dumps(list(exclude))}
    about["base"] = _digest(pretrained, [entry.name for entry in plan.entries], track)
    place = (state or out).parent / f".{(state or out).name}.state"
    half = out.parent / f".{out.name}.partial"
    with _reported(out), _scratch(place), _scratch(half), FileStore(place, merger, about) as store:
        merger.start(pretrained, exclude=exclude, store=store)
        if state is not None and state.exists():
            store.open(state)
        for task, known in zip(found, statistics, strict=True):
            merger.add(task, known, track)
        written = _write(merger, pretrained, half, out, track)
        written.rename(out)
        flush(out.parent)
        if state is not None:  # after the result: a state that is ahead of it would count a task twice when run again
            store.current.replace(state)
            flush(state.parent)
    return merger


class FileStore:
    """A rule's state in a safetensors file, replaced as a whole after every task.

    Args:
        folder: Scratch folder.
        rule: Whose state; its counts are saved with the slots.
        about: What the state belongs to, checked when a file is opened.
    """

    def __init__(self, folder: Path, rule: Rule, about: Mapping[str, str]) -> None:
        self._folder, self._rule, self._about = folder, rule, dict(about)
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
        """The file after the last task."""
        if self._opened is None:
            raise RunError("no task has been merged yet")
        return self._opened.path

    def open(self, file: Path) -> None:
        """Go on from a saved state.

        Raises:
            RunError: It belongs to another base, rule or exclusion, or is no such file.
        """
        try:
            opened = Checkpoint(file)
        except BackboneError as error:
            raise RunError(f"{error}; remove it to start anew") from None
        for key, expected in self._about.items():
            if opened.metadata.get(key) != expected:
                got = opened.metadata.get(key, "none")
                detail = "" if key == "base" else f" ({got} instead of {expected})"
                raise RunError(f"{file}: is the state of another merge: its {key} differs{detail}; use another --state")
        expected_slots = self._shapes()
        if {name: opened.describe(name) for name in opened} != expected_slots:
            raise RunError(f"{file}: does not hold this rule's state; remove it to start anew")
        self._opened = opened
        self._rule.count.copy_(opened["count"])
        self._rule.norm_sum.copy_(opened["norm_sum"])

    def get(self, entry: Entry) -> State:
        slots = self._rule.slots(entry)
        if self._opened is None:
            return {slot: torch.zeros(shape, dtype=dtype) for slot, (shape, dtype) in slots.items()}
        return {slot: self._opened[slot_name(entry, slot)] for slot in slots}

    def put(self, entry: Entry, state: State) -> None:
        if self._writer is None:
            self._writer = TensorWriter(self._file(), self._shapes(), self._about)
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

    def _shapes(self) -> Slots:
        slots = {slot_name(e, s): kept for e in self._rule.layout.entries for s, kept in self._rule.slots(e).items()}
        return {**slots, **_SCALARS}


def _write(merger: Rule, pretrained: Checkpoint, half: Path, out: Path, track: Track | None) -> Path:
    """Write the merged model into the scratch folder; what has to be renamed to ``out``."""
    metadata = {"format": "pt", "cil_rule": type(merger).__name__, "cil_tasks": str(int(merger.count))}
    items = merger.items(track=track)
    if out.suffix == ".safetensors":
        files, result = {half / "model.safetensors": list(pretrained)}, half / "model.safetensors"
    else:
        folder = half / "folder"
        folder.mkdir()
        files, result = {folder / file.name: names for file, names in pretrained.files.items()}, folder
        source = next(iter(pretrained.files)).parent
        for beside in source.iterdir() if pretrained.path.is_dir() or pretrained.path.name == INDEX else ():
            if beside.suffix in COPIED and beside.is_file():
                shutil.copyfile(beside, folder / beside.name)
    for file, names in files.items():  # items come in the order of the base's files
        with TensorWriter(file, {name: pretrained.describe(name) for name in names}, metadata) as writer:
            for _ in names:
                writer.write(*next(items))
    return result


def _digest(pretrained: Checkpoint, names: Sequence[str], track: Track | None) -> str:
    """sha256 over name, dtype, shape and bytes of the tensors that are merged."""
    digest = hashlib.sha256()
    items: Iterable[str] = track(names, "reading the base", len(names)) if track else names
    for name in items:
        shape, dtype = pretrained.describe(name)
        digest.update(f"{name} {dtype} {shape}\n".encode())
        digest.update(memoryview(as_bytes(pretrained[name])))
    return digest.hexdigest()


@contextmanager
def _scratch(folder: Path) -> Iterator[None]:
    """A folder of this name for the block alone; what a killed process left there goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _reported(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "the disk is full" if full else error.strerror or str(error)
        raise RunError(f"{out}: cannot write: {what}. Nothing was left behind; a state file is as it was") from None
