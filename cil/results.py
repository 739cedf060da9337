"""The results of a run as its folder stores them, written and read; :mod:`cil.summary` computes what follows from them.

:func:`read_run` reads runs in all forms (:mod:`cil.rows`) and verifies checksums, types and ranges of what it reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cil import metrics, stream_values
from cil.config.renamed import current_keys
from cil.errors import RunError
from cil.rows import (
    HEADER,
    RUN_FILE,
    STAGE_FILE,
    ConfidenceRow,
    Costs,
    Counts,
    EarlierVersions,
    Header,
    Joined,
    StageRow,
    StateBytes,
)
from cil.summary import DERIVED, curves, derived, kept_bytes, matrices, nullable, stage_values, summarise
from cil.utils.stored import check_file, content_digest, read_json, sealed

if TYPE_CHECKING:
    from scipy.sparse import coo_array

__all__ = [
    "AGAIN",
    "DERIVED",
    "RESTORE",
    "ConfidenceRow",
    "Costs",
    "Counts",
    "EarlierVersions",
    "Header",
    "Joined",
    "Stage",
    "StageRow",
    "StateBytes",
    "assemble",
    "completed",
    "confusion",
    "curves",
    "derived",
    "find",
    "kept_bytes",
    "matrices",
    "read_header",
    "read_predictions",
    "read_run",
    "read_stage",
    "run_file",
    "run_folders",
    "stage_folder",
    "stage_values",
    "summarise",
]
RESTORE = "restore it, or move the folder of the run away to run again"
AGAIN = "restore it, or delete the folder of that stage and run the same command again"


def completed(run: dict[str, Any]) -> dict[str, Any]:
    """A run with matrices and curves: its own, or rebuilt from the rows where it was published without them."""
    return {**run, **derived(run["stages"])} if "summary" in run and "curves" not in run else run


def assemble(header: Header, rows: Sequence[StageRow], stages: int) -> dict[str, Any]:
    """A run as :func:`read_run` returns it: header, summary, matrices, curves, rows; undefined values are null."""
    if not rows:
        return {**header, "complete": False, "stages": []}
    complete = len(rows) == stages
    return nullable({**header, "complete": complete, "summary": summarise(rows), **derived(rows), "stages": list(rows)})


def run_file(header: Header, rows: Sequence[StageRow], checksums: Sequence[str], stages: int) -> dict[str, Any]:
    """The content of ``metrics.json`` after the stages so far.

    Args:
        header: What is known before the run.
        rows: The rows of the finished stages.
        checksums: The checksums of their ``stage.json``.
        stages: Number of stages of the whole run.
    """
    content: dict[str, Any] = {**header, "complete": bool(rows) and len(rows) == stages}
    if rows:
        content["summary"] = summarise(rows)
    return sealed({**content, "stage_checksums": list(checksums)})


def stage_folder(folder: Path, stage: int) -> Path:
    """The folder of a stage, counted from 0, in a run folder."""
    return folder / f"stage-{stage:02d}"


class Stage(NamedTuple):
    """A stage as it is stored: its row, the checksums of its files by name, and the checksum of both."""

    row: StageRow
    files: dict[str, str]
    checksum: str


def read_header(folder: Path) -> dict[str, Any]:
    """A run's ``metrics.json`` alone: header, ``complete`` and summary, but not the rows of a run's stage folders.

    Raises:
        RunError: Missing or damaged.
    """
    file = folder / "metrics.json"
    try:
        run = read_json(file, RUN_FILE, HEADER, advice=RESTORE)
    except FileNotFoundError:
        raise RunError(f"{folder}: no metrics.json there; give a folder that `cil run` wrote") from None
    return {**run, "config": current_keys(run["config"])}


def read_stage(folder: Path, stage: int, recorded: Sequence[str] = ()) -> Stage:
    """What a stage stores besides tensors.

    Args:
        folder: The run folder.
        stage: Number of the stage, from 0.
        recorded: ``stage_checksums`` of the run's ``metrics.json``; a stage after these is not compared with it.

    Raises:
        RunError: Missing, damaged, or not the stage that ``metrics.json`` belongs to.
    """
    file = stage_folder(folder, stage) / "stage.json"
    try:
        content = read_json(file, STAGE_FILE, advice=AGAIN)
    except FileNotFoundError:
        raise RunError(f"{file}: not there, although {folder} has finished that stage; {AGAIN}") from None
    checksum = content_digest(content)
    if stage < len(recorded) and recorded[stage] != checksum:
        raise RunError(f"{file}: is not the one that {folder / 'metrics.json'} was written with; {RESTORE}")
    files = content.pop("files", {})
    return Stage(content, files, checksum)  # type: ignore[arg-type]


def read_run(folder: Path) -> dict[str, Any]:
    """A run with header, ``complete``, summary, matrices, curves and ``stages``, in whichever form it is stored.

    Raises:
        RunError: A file is missing or damaged, or numbers contradict each other.
    """
    run = read_header(folder)
    recorded = run.pop("stage_checksums", None)
    if recorded is not None:
        run["stages"] = [read_stage(folder, i, recorded).row for i in range(len(recorded))]
    if reason := _contradiction(run, run.setdefault("stages", [])):
        raise RunError(f"{folder / 'metrics.json'}: damaged: {reason}; {RESTORE}")
    rows = run.pop("stages")
    return {**completed({**run, "stages": rows}), "stages": rows}


def _contradiction(run: dict[str, Any], rows: Sequence[StageRow]) -> str:
    """What in a run contradicts its rows; empty if nothing does."""
    for i, row in enumerate(rows):
        counts = row["correct"], row["correct_within_task"], row["total"]
        if {len(count) for count in counts} != {i + 1}:
            return f"the counts of stage {i} are not those of {i + 1} tasks"
        if not run.get("lessons") and row["total"] != rows[-1]["total"][: i + 1]:
            return f"stage {i} has other numbers of test images than the last one"
        if any(right > images for one in counts[:2] for right, images in zip(one, row["total"], strict=True)):
            return f"stage {i} has more correct images than images"
        if fault := stream_values.fault(row):
            return f"stage {i} has {fault}"
    if len(rows) > len(run["tasks"]) or (run["complete"] and not rows):
        return f"{len(rows)} stages of {len(run['tasks'])} tasks"
    if not rows:
        return ""
    if "summary" not in run:
        return "there is no summary"
    known = {"summary": summarise(rows)}
    if any(key in run for key in DERIVED):
        known |= derived(rows)
    for key, values in known.items():
        if not _agree(run.get(key, values), values):
            return f"{key} of {run['learner']} does not follow from the rows of its stages"
    return ""


def _agree(stored: Any, known: Any) -> bool:
    """Whether stored numbers are the known ones up to rounding; older versions stored fewer names."""
    if isinstance(known, dict):
        return isinstance(stored, dict) and all(_agree(stored[key], known[key]) for key in known if key in stored)
    try:
        values = np.array(stored, dtype=float), np.array(known, dtype=float)
    except (TypeError, ValueError):
        return False
    return values[0].shape == values[1].shape and np.allclose(*values, rtol=1e-9, atol=2e-9, equal_nan=True)


def read_predictions(folder: Path, stage: int) -> dict[str, np.ndarray]:
    """The predictions of a stage for every test image of the tasks so far, by name.

    Raises:
        RunError: Missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file, files = stage_folder(folder, stage) / "predictions.safetensors", read_stage(folder, stage).files
    try:
        check_file(file, files.get(file.name), advice=AGAIN)
        return load_file(file)
    except FileNotFoundError:
        raise RunError(f"{file}: not there; {AGAIN}") from None
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file}: damaged ({' '.join(str(error).split())}); {AGAIN}") from None


def confusion(folder: Path, stage: int) -> coo_array:
    """The number of test images by true label (rows) and predicted label (columns) after a stage, sparse int64 [C, C].

    Raises:
        RunError: A file is missing or damaged.
    """
    tasks = read_header(folder)["tasks"][: stage + 1]
    found = read_predictions(folder, stage)
    seen = {label for task in tasks for label in task}
    return metrics.confusion_counts(found["label"], found["predicted"], len(seen))


def find(paths: list[Path]) -> list[dict[str, Any]]:
    """All runs with at least one stage at or below ``paths``, each with its ``folder``.

    Raises:
        RunError: A path does not exist or holds no run, or a run there is damaged or has lost its ``metrics.json``.
    """
    runs = []
    for path in paths:
        if not path.exists():
            raise RunError(f"{path}: no such folder")
        found = [{**read_run(folder), "folder": str(folder)} for folder in sorted(run_folders(path))]
        if not any(run["stages"] for run in found):
            raise RunError(f"{path}: no run there has finished a stage yet")
        runs += [run for run in found if run["stages"]]
    return list({run["folder"]: run for run in runs}.values())


def run_folders(path: Path) -> Iterator[Path]:
    """The folders at or below ``path`` with a ``metrics.json``; links to folders are not followed.

    Raises:
        RunError: A folder holds stages but no ``metrics.json``.
    """
    for place, folders, names in os.walk(path):
        folder = Path(place)
        if "metrics.json" in (*names, *folders):
            yield folder
        elif "stage-00" in folders and (stage_folder(folder, 0) / "stage.json").exists():
            raise RunError(f"{folder}: holds the stages of a run but no metrics.json; {RESTORE}")
        folders[:] = [name for name in folders if not name.startswith("stage-")]
