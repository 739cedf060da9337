"""What `cil show` prints of a growing model, from its ``metrics.json`` and its last stage. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cil import history, results
from cil.growing import events
from cil.rows import Lesson


def facts(folder: Path) -> dict[str, Any]:
    """A growing model as plain values.

    Args:
        folder: The model's folder.

    Returns:
        Learner, backbone, classes (name, images trained on and held out, lessons), classes that are no longer
        predicted, lessons (with the accuracy on what each holds out, then and now, and the calibration error on all
        that was held out until then), changes, accuracy and bytes.

    Raises:
        RunError: The folder holds no model, one of another version, or a damaged one.
    """
    header = events.read(folder)
    stages = len(header["tasks"])
    checksums = header.get("stage_checksums", ())
    rows = [results.read_stage(folder, stage, checksums).row for stage in range(stages)]
    names, lessons = header["class_names"], header["lessons"]
    classes: dict[str, dict[str, Any]] = {name: {"train": 0, "held_out": 0, "lessons": []} for name in names}
    for number, lesson in enumerate(lessons, 1):
        for part in ("train", "held_out"):
            for label, count in lesson[part].items():
                classes[names[int(label)]][part] += count
        for label in lesson["train"]:
            classes[names[int(label)]]["lessons"].append(number)
    gone = {names[label]: kind for kind in ("forgotten", "hidden") for label in history.absent(header, kind)}
    last = rows[-1] if rows else None
    now = [change for change in header["changes"] if change["stages"] == stages and "total" in change]
    counts = now[-1] if now else last
    correct, total = (counts["correct"], counts["total"]) if counts is not None else ([], [])
    return {
        "folder": str(folder),
        "learner": header["config"]["learners"][0],
        "backbone": header["backbone"],
        "classes": {name: known for name, known in classes.items() if name not in gone},
        "not_predicted": gone,
        "lessons": [
            {
                **_lesson(lesson, header["tasks"][i], names),
                "accuracy_then": _share(rows[i]["correct"][i], rows[i]["total"][i]),
                "accuracy_now": _share(correct[i], total[i]),
                "calibration_error": rows[i]["confidence"]["calibration_error"] if "confidence" in rows[i] else None,
            }
            for i, lesson in enumerate(lessons)
        ],
        "changes": [{**change, "class": names[change["label"]]} for change in header["changes"]],
        "accuracy": _share(sum(correct), sum(total)),
        "forgetting": header.get("summary", {}).get("forgetting"),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def _lesson(lesson: Lesson, task: list[int], names: list[str]) -> dict[str, Any]:
    return {
        "when": lesson["when"],
        "source": lesson["source"],
        "classes": [names[label] for label in task],
        "train": sum(lesson["train"].values()),
        "held_out": sum(lesson["held_out"].values()),
        "unreadable": len(lesson["unreadable"]),
        "known": lesson["known"],
        "sha256": lesson["train_sha256"],
    }


def _share(correct: int, total: int) -> float | None:
    """An accuracy; None if nothing was tested."""
    return correct / total if total else None
