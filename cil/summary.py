"""Matrices, curves and the summary of a run, from the rows of its stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cil import metrics, stream_values
from cil.rows import ConfidenceRow, Costs, StageRow

ROUTER = ("router_accuracy", "oracle_router_accuracy")
"""Keys that only the rows of learners have which choose an adapter for each image."""
DERIVED = ("accuracy_matrix", "accuracy_matrix_within_task", "curves")
"""Top-level keys of ``metrics.json`` that follow from the rows; published runs leave them out."""


def matrices(rows: Sequence[StageRow]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(R, R_task, total) of the stages so far: float [T, T], float [T, T], int [T, T]; R is NaN where total is 0."""
    stages = len(rows)
    correct, within, total = np.zeros((3, stages, stages), dtype=np.int64)
    for i, row in enumerate(rows):
        correct[i, : i + 1], within[i, : i + 1] = row["correct"], row["correct_within_task"]
        total[i, : i + 1] = row["total"]
    return metrics.accuracy_matrix(correct, total), metrics.accuracy_matrix(within, total), total


def stage_values(r: np.ndarray, r_task: np.ndarray, total: np.ndarray, row: StageRow, stage: int) -> dict[str, float]:
    """The values of one stage by the names of the curves, NaN where undefined.

    Args:
        r: The accuracy matrix of this stage and any others, [T, T].
        r_task: The same with the task given.
        total: Test images of each stage and task, [T, T].
        row: The row of the stage.
        stage: Number of the stage, from 0.
    """
    return {
        "accuracy/seen": metrics.seen_accuracy_at(r, total, stage),
        "accuracy/seen_task_mean": metrics.task_mean_accuracy_at(r, stage),
        "accuracy/seen_class_mean": _number(row["class_mean_accuracy"]),
        "accuracy/seen_top5": _number(row["top5_accuracy"]),
        "accuracy/new": float(r[stage, stage]),
        "accuracy/old": metrics.old_accuracy_at(r, total, stage),
        "accuracy/base": metrics.base_accuracy_at(r, stage),
        "accuracy/novel": metrics.novel_accuracy_at(r, total, stage),
        "accuracy/harmonic": metrics.harmonic_accuracy_at(r, total, stage),
        "forgetting/mean": metrics.forgetting(r, stage),
        "forgetting/within_task": metrics.forgetting(r_task, stage),
        "bwt": metrics.backward_transfer(r, stage),
        "task_id_accuracy": _number(row["task_id_accuracy"]),
        "within_task_accuracy": metrics.seen_accuracy_at(r_task, total, stage),
        **{name: float(row[name]) for name in ROUTER if name in row},  # type: ignore[literal-required]
        **stream_values.stage_values(r, row, stage),
        **(_confidence_values(row["confidence"]) if "confidence" in row else {}),
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _confidence_values(row: ConfidenceRow) -> dict[str, float]:
    """The values of one stage of a run with ``confidence: true``, NaN where undefined."""
    values: dict[str, float | None] = {
        "calibration/temperature": row["temperature"],
        "calibration/error": row["calibration_error"],
        "calibration/error_uncalibrated": row["calibration_error_uncalibrated"],
        **{f"unknown/auroc_{score}": value for score, value in row["unknown_auroc"].items()},
        **{f"unknown/fpr95_{score}": value for score, value in row["unknown_fpr95"].items()},
    }
    return {name: _number(value) for name, value in values.items()}


def _confidence_summary(rows: Sequence[StageRow]) -> dict[str, float]:
    """The summary of a run with ``confidence: true``: calibration after the last stage, scores as means over stages."""
    values = [_confidence_values(row["confidence"]) for row in rows if "confidence" in row]
    if "confidence" not in rows[-1]:
        return {}
    summary = {}
    for name, last in values[-1].items():
        kind, what = name.split("/")
        if kind == "calibration":
            summary[f"calibration_{what}"] = last
        else:
            known = [one[name] for one in values if not math.isnan(one[name])]
            summary[f"unknown_{what}"] = float(np.mean(known)) if known else math.nan
    return summary


def curves(rows: Sequence[StageRow]) -> dict[str, list[float]]:
    """Per-stage values by name, NaN where undefined; what TensorBoard and the figures draw."""
    r, r_task, total = matrices(rows)
    values = [stage_values(r, r_task, total, row, i) for i, row in enumerate(rows)]
    return {name: [one[name] for one in values] for name in values[0] if all(name in one for one in values)}


def derived(rows: Sequence[StageRow]) -> dict[str, Any]:
    """The values of :data:`DERIVED` for the stages so far; undefined values are null."""
    r, r_task, _ = matrices(rows)
    return nullable(dict(zip(DERIVED, (r.tolist(), r_task.tolist(), curves(rows)), strict=True)))


def kept_bytes(costs: Costs) -> int:
    """What a learner keeps after a stage with these costs: trained parameters, statistics and exemplars."""
    return costs["parameter_bytes"] + costs["statistics_bytes"] + costs["exemplar_bytes"]


def summarise(rows: Sequence[StageRow]) -> dict[str, Any]:
    """The summary of the stages so far; undefined values are null."""
    r, r_task, total = matrices(rows)
    summary = metrics.summary(r, r_task, total)
    last = stage_values(r, r_task, total, rows[-1], len(rows) - 1)
    summary |= {name: last[name] for name in ("task_id_accuracy", *ROUTER) if name in last}
    summary |= _confidence_summary(rows)
    summary |= {f"accuracy_{name}": last[f"accuracy/{name}"] for name in ("base", "novel", "harmonic")}
    summary |= stream_values.summary(metrics.seen_accuracy(r, total), last, rows)
    costs = [row["costs"] for row in rows]
    summary |= {
        "trainable_parameters": max(c["trainable_parameters"] for c in costs),
        "kept_bytes": kept_bytes(costs[-1]),
        "passes_per_train_image": sum(c["train_passes"] for c in costs) / sum(c["train_images"] for c in costs),
        "passes_per_test_image": sum(c["test_passes"] for c in costs) / max(1, int(total.max(0).sum())),
        "seconds": sum(c["seconds_learn"] + c["seconds_test"] for c in costs),
    }
    return nullable(summary)


def nullable(value: Any) -> Any:
    """NaN is no JSON: undefined numbers become null."""
    if isinstance(value, dict):
        return {k: nullable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [nullable(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
