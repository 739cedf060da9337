"""The header of a growing model before and after each event, as pure functions. Imports no torch.

An event (a lesson, or a change of one class) happens when the new header replaces the old one. :mod:`cil.history`
explains the two, and reads them for commands that know nothing of this package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from cil import results
from cil.config.names import alike
from cil.errors import DataError, RunError, nearest, shortened
from cil.history import VERSION, predicted
from cil.rows import Change, Lesson
from cil.utils.stored import read_json

Header = dict[str, Any]


def now() -> str:
    """The time as events record it: ISO 8601 with the time zone, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def read(folder: Path) -> Header:
    """The header of a growing model.

    Raises:
        RunError: The folder holds no model, a run of `cil run`, a model of a later version, or a damaged one.
    """
    if not (folder / "metrics.json").exists():
        raise RunError(f"{folder}: no model there; `cil learn {folder} --images FOLDER` makes one")
    version = read_json(folder / "metrics.json", advice=results.RESTORE).get("growing")
    if version is None:
        raise RunError(f"{folder}: is a run of `cil run`, and no model of `cil learn`; give another folder")
    if isinstance(version, int) and version > VERSION:  # before types are checked, which may be others there
        raise RunError(
            f"{folder}: was made by a later version of cil (format {version}, this one reads {VERSION}); update cil"
        )
    header = results.read_header(folder)
    if len(header["lessons"]) != len(header["tasks"]):
        raise RunError(
            f"{folder / 'metrics.json'}: damaged: {len(header['lessons'])} lessons of {len(header['tasks'])} tasks; "
            f"{results.RESTORE}"
        )
    return header


def label_of(header: Header, name: str, folder: Path) -> int:
    """The label of a class that the model predicts.

    Raises:
        RunError: There is none of this name.
    """
    names = {header["class_names"][label]: label for label in predicted(header)}
    if name not in names:
        hint = nearest(name, names) or "; `cil show` lists the classes"
        raise RunError(f"{folder}: predicts no class {shortened(name)}{hint}")
    return names[name]


def labels_for(header: Header | None, names: Sequence[str], source: str) -> dict[str, int]:
    """A label for each class of a lesson: that of a known class, or the next free one, in the order of ``names``.

    Raises:
        DataError: Two names differ only in case or in the form of accents.
    """
    known = list(header["class_names"]) if header is not None else []
    labels = {name: label for label, name in enumerate(known)}
    folded = {alike(name): name for name in known}
    for name in names:
        other = folded.setdefault(alike(name), name)
        if other != name:
            where = "the model's class" if other in known else "another class there,"
            raise DataError(
                f"{source}: class {shortened(name)} differs from {where} {shortened(other)} only in case or in the "
                "form of accents; rename one of them"
            )
        labels.setdefault(name, len(labels))
    return {name: labels[name] for name in names}


def with_lesson(header: Header, lesson: Lesson, task: Sequence[int], names: Sequence[str]) -> Header:
    """The header after a lesson.

    Args:
        header: The header before it.
        lesson: What is recorded of it.
        task: Labels of the lesson's classes, ascending.
        names: Names of all classes seen, by label.
    """
    return _counted(
        {**header, "class_names": list(names)}, [*header["tasks"], list(task)], [*header["lessons"], lesson]
    )


def change(kind: Literal["forgotten", "hidden", "renamed"], header: Header, label: int) -> Change:
    """What is recorded of a change of a class that happens now, and leaves the learner's state as it is."""
    name, stages = header["class_names"][label], len(header["tasks"])
    return {"when": now(), "kind": kind, "label": label, "stages": stages, "name": name, "folder": "", "files": {}}


def with_change(header: Header, change: Change) -> Header:
    """The header after a change of a class, which is not its renaming."""
    return {**header, "changes": [*header["changes"], change]}


def renamed(header: Header, label: int, name: str, folder: Path) -> Header:
    """The header after a class got another name.

    Raises:
        RunError: Another class has this name, or one that differs only in case or in the form of accents; or it is
            empty.
    """
    names, old = list(header["class_names"]), header["class_names"][label]
    others = {alike(other): other for i, other in enumerate(names) if i != label}
    if not name.strip() or alike(name) in others:
        reason = f"the model has the class {shortened(others[alike(name)])}" if name.strip() else "a name has letters"
        raise RunError(
            f"{folder}: {shortened(old)} cannot be renamed to {shortened(name)}: {reason}; give another name"
        )
    names[label] = name
    return {**with_change(header, change("renamed", header, label)), "class_names": names}


def undone(header: Header, folder: Path) -> tuple[Header, Change | Lesson]:
    """The header before the last event, and that event.

    Raises:
        RunError: There is no event.
    """
    stages, changes = len(header["tasks"]), header["changes"]
    if changes and changes[-1]["stages"] == stages:
        last, names = changes[-1], list(header["class_names"])
        if last["kind"] == "renamed":
            names[last["label"]] = last["name"]
        return {**header, "changes": changes[:-1], "class_names": names}, last
    if not stages:
        raise RunError(f"{folder}: has learned nothing that could be undone")
    tasks = header["tasks"][:-1]
    seen = max((label + 1 for task in tasks for label in task), default=0)
    before = _counted({**header, "class_names": header["class_names"][:seen]}, tasks, header["lessons"][:-1])
    past = header.get("earlier_versions", [])
    before["versions"] = next((part["versions"] for part in past if part["stages"] >= stages - 1), header["versions"])
    if earlier := [part for part in past if part["stages"] < stages - 1]:
        before["earlier_versions"] = earlier
    else:
        before.pop("earlier_versions", None)
    return before, header["lessons"][-1]


def data_of(lessons: Sequence[Lesson]) -> dict[str, Any]:
    """What the header of a run says about its data, from a model's lessons."""
    train = [(lesson["train"], lesson["train_sha256"]) for lesson in lessons]
    held_out = [(lesson["held_out"], lesson["held_out_sha256"]) for lesson in lessons]
    skipped = [name for lesson in lessons for name in lesson["unreadable"]]
    return {"train": {**_split(train), "skipped": skipped}, "test": {**_split(held_out), "skipped": []}}


def _split(lessons: Sequence[tuple[dict[str, int], str]]) -> dict[str, Any]:
    digests = [digest for _, digest in lessons]
    return {
        "sha256": hashlib.sha256(" ".join(digests).encode()).hexdigest(),
        "images": sum(count for counts, _ in lessons for count in counts.values()),
        "tasks": [digest[:32] for digest in digests],
    }


def _counted(header: Header, tasks: list[list[int]], lessons: list[Lesson]) -> Header:
    order = list(range(len(header["class_names"])))
    return {**header, "class_order": order, "tasks": tasks, "data": data_of(lessons), "lessons": lessons}


def listed_folders(header: Mapping[str, Any]) -> set[str]:
    """Names of the folders of stages and changes that a model consists of."""
    stages = {results.stage_folder(Path(), stage).name for stage in range(len(header["tasks"]))}
    return stages | {change["folder"] for change in header["changes"] if change["folder"]}
