"""``metrics.json``: everything a reader needs to trust a run, rebuilt from its stages' rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from cil import metrics
from cil.errors import RunError

ROUTER = ("router_accuracy", "oracle_router_accuracy")
"""What only the rows of learners that choose an adapter for an image have."""


def matrices(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(R, R_task, total) of the stages so far: float [T, T], float [T, T], int [T]."""
    stages = len(rows)
    correct, within = np.zeros((2, stages, stages), dtype=np.int64)
    for i, row in enumerate(rows):
        correct[i, : i + 1], within[i, : i + 1] = row["correct"], row["correct_within_task"]
    total = np.array(rows[-1]["total"])
    return metrics.accuracy_matrix(correct, total), metrics.accuracy_matrix(within, total), total


def curves(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Per-stage values by name, NaN where undefined; what TensorBoard and the figures draw."""
    r, r_task, total = matrices(rows)
    stages = range(len(rows))
    return {
        "accuracy/seen": metrics.seen_accuracy(r, total).tolist(),
        "accuracy/seen_task_mean": metrics.task_mean_accuracy(r).tolist(),
        "accuracy/seen_class_mean": [row["class_mean_accuracy"] for row in rows],
        "accuracy/seen_top5": [row["top5_accuracy"] for row in rows],
        "accuracy/new": metrics.new_accuracy(r).tolist(),
        "accuracy/old": metrics.old_accuracy(r, total).tolist(),
        "forgetting/mean": [metrics.forgetting(r, i) for i in stages],
        "forgetting/within_task": [metrics.forgetting(r_task, i) for i in stages],
        "bwt": [metrics.backward_transfer(r, i) for i in stages],
        "task_id_accuracy": [math.nan if row["task_id_accuracy"] is None else row["task_id_accuracy"] for row in rows],
        "within_task_accuracy": metrics.within_task_accuracy(r_task, total).tolist(),
        **{name: [row[name] for row in rows] for name in ROUTER if all(name in row for row in rows)},
    }


def kept_bytes(costs: dict[str, Any]) -> int:
    """What a learner keeps after a stage with these costs: trained parameters, statistics and exemplars."""
    return sum(costs[what] for what in ("parameter_bytes", "statistics_bytes", "exemplar_bytes"))


def assemble(header: dict[str, Any], rows: list[dict[str, Any]], stages: int) -> dict[str, Any]:
    """The content of ``metrics.json``: header, matrices, curves, summary; undefined values are null."""
    if not rows:
        return {**header, "complete": False, "stages": []}
    r, r_task, total = matrices(rows)
    summary = metrics.summary(r, r_task, total)
    drawn = curves(rows)
    summary |= {name: drawn[name][-1] for name in ("task_id_accuracy", *ROUTER) if name in drawn}
    costs = [row["costs"] for row in rows]
    summary |= {
        "trainable_parameters": max(c["trainable_parameters"] for c in costs),
        "kept_bytes": kept_bytes(costs[-1]),
        "passes_per_train_image": sum(c["train_passes"] for c in costs) / sum(c["train_images"] for c in costs),
        "passes_per_test_image": sum(c["test_passes"] for c in costs) / int(total.sum()),
        "seconds": sum(c["seconds_learn"] + c["seconds_test"] for c in costs),
    }
    return _nullable(
        {
            **header,
            "complete": len(rows) == stages,
            "summary": summary,
            "accuracy_matrix": r.tolist(),
            "accuracy_matrix_within_task": r_task.tolist(),
            "curves": drawn,
            "stages": rows,
        }
    )


def _nullable(value: Any) -> Any:
    """NaN is no JSON: undefined numbers become null."""
    if isinstance(value, dict):
        return {k: _nullable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_nullable(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def load(folder: Path) -> dict[str, Any]:
    """A run's ``metrics.json``.

    Raises:
        RunError: Missing or damaged.
    """
    file = folder / "metrics.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{folder}: no metrics.json there; give a folder that `cil run` wrote") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: damaged ({error}); restore it, or move the folder away to run again") from None


def find(paths: list[Path]) -> list[dict[str, Any]]:
    """All runs with at least one stage at or below ``paths``, each with its ``folder``.

    Raises:
        RunError: A path does not exist or holds no run.
    """
    runs = []
    for path in paths:
        if not path.exists():
            raise RunError(f"{path}: no such folder")
        files = sorted(path.rglob("metrics.json"))
        found = [{**load(file.parent), "folder": str(file.parent)} for file in files]
        if not any(run["stages"] for run in found):
            raise RunError(f"{path}: no run there has finished a stage yet")
        runs += [run for run in found if run["stages"]]
    return list({run["folder"]: run for run in runs}.values())
