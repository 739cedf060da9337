"""Decides which finished stages of a run folder a command can continue from.

A stage depends on the settings, the backbone's weights, the custom code, and the images of its own and of earlier
tasks. It does not depend on the images of later tasks, on where files are, or on the machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import Repr
from typing import Any

from pydantic import ValidationError

from cil import results
from cil.config import Config, code
from cil.errors import CilError, RunError
from cil.results import EarlierVersions, Header
from cil.runner.checkpoint import WEIGHTS, RunFolder
from cil.runner.plan import dump, plans
from cil.utils.nested import flatten

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 72


@dataclass(frozen=True)
class Change:
    """The first thing in which a run differs from the one that a folder holds.

    Attributes:
        stage: First stage that depends on it.
        what: Name of the thing, for messages.
        old: What the folder holds.
        new: What it is now.
    """

    stage: int
    what: str
    old: Any
    new: Any


@dataclass(frozen=True)
class Found:
    """What a run folder holds already.

    Attributes:
        header: Header of the run that it holds; None if no stage is finished.
        keep: Number of finished stages from which the run can continue.
        complete: Whether these are all stages of the run.
    """

    header: Mapping[str, Any] | None
    keep: int
    complete: bool = False


def look(folder: RunFolder, header: Header, *, redo: bool = False) -> Found:
    """What a run with ``header`` can continue from in ``folder``. A folder without a finished stage holds no run.

    Args:
        folder: The run's folder.
        header: The run that is wanted.
        redo: Whether stages that belong to another run, or that nothing can continue from, are computed again.

    Raises:
        RunError: Without ``redo``: a finished stage depends on something that has changed; the message names it. Or the
            folder holds stages but no ``metrics.json``.
    """
    there, stages = folder.finished(), len(header["tasks"])
    held = _held(folder, there, redo)
    if held is None:
        return Found(None, 0)
    finished, keep = there or len(held.get("stages", ())), _last_with_weights(folder, there)
    change = first_change(held, header)
    if change is not None and not there:
        change = replace(change, stage=0)  # no stage to continue from
    if change is None or change.stage >= finished:
        if finished == stages:
            return Found(held, there, complete=bool(held["complete"]))
        if keep < there and not redo:
            raise RunError(
                f"{folder.stage(there - 1) / WEIGHTS}: not there, so nothing can continue from this stage; run again "
                f"with --redo to compute the stages from {folder.stage(keep).name} on again"
            )
        return Found(held, keep)
    if not redo:
        first, last = folder.stage(change.stage).name, folder.stage(finished - 1).name
        stages_depend = f"{first} depends" if first == last else f"{first} to {last} depend"
        raise RunError(
            f"{folder.path}: holds a run with {change.what} = {short(change.old)}, now "
            f"{short(change.new)}; {stages_depend} on it: run again with --redo to compute that again, or give "
            "the new run another name= or label, or another --results"
        )
    return Found(held, _last_with_weights(folder, min(change.stage, there)))


def short(value: Any) -> str:
    """A value in a message; of a digest the first digits say enough."""
    return f"{value[:12]}…" if isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value) else _REPR.repr(value)


def _held(folder: RunFolder, there: int, redo: bool) -> Mapping[str, Any] | None:
    """The run in a folder with ``there`` finished stages; None if there is none, or with ``redo`` none readable.

    Numbers alone, without any stage, are a run only if they are complete: so runs are published.

    Raises:
        RunError: There are stages, and ``metrics.json`` is missing or damaged.
    """
    if there and not (folder.path / "metrics.json").exists() and not redo:
        raise RunError(
            f"{folder.path}: holds stages but no metrics.json to tell of which run; move it away, use another "
            "--results, or run again with --redo to compute all stages again"
        )
    try:
        held = results.read_header(folder.path)
    except RunError:
        if there and not redo:
            raise
        return None
    published = not any(folder.path.glob("stage-*")) and held.get("complete") and held.get("stages")
    return held if there or published else None


def _last_with_weights(folder: RunFolder, stages: int) -> int:
    """The largest number of stages, at most ``stages``, whose last one has its weights; 0 if none has."""
    while stages and not (folder.stage(stages - 1) / WEIGHTS).exists():
        stages -= 1
    return stages


def first_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> Change | None:
    """The first difference between two runs on which numbers depend; None if both are the same run.

    Args:
        old: Header of a stored run. One of an older version lacks digests of tasks and code, and is compared by those
            of whole splits and by settings alone.
        new: Header of the run that is wanted.
    """
    one, two = _settings(old), _settings(new)
    by_task = [header for header in (old, new) if "tasks" in header["data"]["train"]]
    if len(by_task) < 2:
        for split in ("train", "test"):
            one[f"{split} data (sha256)"], two[f"{split} data (sha256)"] = (
                header["data"][split]["sha256"] for header in (old, new)
            )
    if "code" in old and "code" in new:
        one |= {f"code of learners.0.{key} (sha256)": value for key, value in old["code"].items()}
        two |= {f"code of learners.0.{key} (sha256)": value for key, value in new["code"].items()}
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            return Change(0, key, one.get(key), two.get(key))
    if len(by_task) == 2:
        for stage in range(max(len(old["tasks"]), len(new["tasks"]))):
            mine, theirs = _task(old, stage), _task(new, stage)
            for key in mine:
                if mine[key] != theirs[key]:
                    return Change(stage, key, mine[key], theirs[key])
    return None


def _task(header: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """What a stage depends on beyond the stages before it; None for every part where there is no such task."""
    there = stage < len(header["tasks"])
    parts = {f"classes of task {stage}": [header["class_names"][c] for c in header["tasks"][stage]] if there else None}
    for split, name in (("train", "training"), ("test", "test")):
        parts[f"{name} images of task {stage} (sha256)"] = header["data"][split]["tasks"][stage] if there else None
    return parts


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration, with keys added since then set to their defaults (defaults never change an older run)."""
    try:
        [plan] = plans(Config.model_validate(config))
    except (CilError, ValidationError):  # its learner or a key no longer exists: return it unchanged
        return config
    return dump(plan.config)


def identity_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that identify a run, by dotted key: all but the machine, the name, the folders of files, the limit
    on pixels, and index files and the treatment of broken images, which show in the fingerprints of the data. Keys
    added after the configuration was stored have their defaults."""
    config = {k: v for k, v in _completed(config).items() if k not in ("hardware", "name")}
    no_matter = ("root", "class_names", "download", "on_error", "max_pixels")  # names are compared task by task
    config["data"] = {k: v for k, v in config["data"].items() if k not in no_matter}
    # the digests of the tasks' images say which ones index files have chosen
    config["stream"] = {k: v for k, v in config["stream"].items() if k != "shots_files"}
    sections = [config["backbone"]] if "backbone" in config else config["backbones"]
    bare = [{k: v for k, v in section.items() if k != "weights"} for section in sections]
    config |= {"backbone": bare[0]} if "backbone" in config else {"backbones": bare}
    config = code.with_paths(config, lambda path: Path(path).name)
    return {key: value for key, value in flatten(config, lists=True) if value != {}}


def _settings(header: Mapping[str, Any]) -> dict[str, Any]:
    settings = {**identity_settings(header["config"]), "backbone weights (sha256)": header["backbone"]["sha256"]}
    text, head = header.get("text"), header["backbone"].get("source_head")
    settings |= {} if text is None else {"text side (sha256)": text["sha256"]}
    return settings | ({} if head is None else {"classifier of the backbone (sha256)": head["sha256"]})


def continued(header: Header, held: Mapping[str, Any] | None, keep: int) -> Header:
    """The header of a run that continues after ``keep`` stages of the run with the header ``held``.

    Its versions are those of this process; if the kept stages were computed with others, ``earlier_versions`` has them.
    """
    if held is None or not keep:
        return header
    past = held.get("earlier_versions", [])
    last = next((part["versions"] for part in past if part["stages"] >= keep), held["versions"])
    earlier: list[EarlierVersions] = [part for part in past if part["stages"] < keep]
    if last != header["versions"]:
        earlier.append({"stages": keep, "versions": last})
    return {**header, "earlier_versions": earlier} if earlier else header


def version_changes(header: Header, keep: int) -> str:
    """What changed between the last of ``keep`` kept stages and this process, e.g. ``torch 2.8.0 → 2.9.0``."""
    earlier = header.get("earlier_versions", [])
    if not earlier or earlier[-1]["stages"] != keep:
        return ""
    old, new = earlier[-1]["versions"], header["versions"]
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name, 'none')[:12]} → {new.get(name, 'none')[:12]}" for name in names)
