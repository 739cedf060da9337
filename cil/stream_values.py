"""The numbers that only some kinds of streams have: few shots, long tails, and classes that return.

Rows of such stages say of which kind the stream is (:class:`cil.rows.OfStream`), so that these numbers follow from the
rows alone, as all others do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cil import metrics
from cil.rows import StageRow

FEW_SHOTS = ("accuracy_base", "accuracy_novel", "accuracy_harmonic", "performance_drop")
LONG_TAIL = tuple(f"accuracy_{name}" for name in metrics.FREQUENCIES)
ANYTIME = ("accuracy_anytime",)
BY_GROUP = ("forgetting_base", "forgetting_novel")


def names(row: StageRow) -> tuple[str, ...]:
    """The numbers of the summary that the stream of a row gives a meaning, beside those of every stream."""
    of = row.get("stream", {})
    few_shots, returning = of.get("few_shots"), of.get("returning")
    return (
        *(FEW_SHOTS if few_shots else ()),
        *(LONG_TAIL if "by_frequency" in of else ()),
        *(ANYTIME if returning or "online" in of else ()),
        *(BY_GROUP if few_shots or returning else ()),
    )


def stage_values(r: np.ndarray, row: StageRow, stage: int) -> dict[str, float]:
    """The further values of one stage by the names of the curves, NaN where undefined.

    Args:
        r: The accuracy matrix of this stage and any others, [T, T].
        row: The row of the stage.
        stage: Number of the stage, from 0.
    """
    of = row.get("stream", {})
    values: dict[str, float] = {}
    if "by_frequency" in of:
        counts = zip(metrics.FREQUENCIES, of["by_frequency"]["correct"], of["by_frequency"]["total"], strict=True)
        values |= {f"accuracy/{name}": correct / total if total else math.nan for name, correct, total in counts}
    if of.get("few_shots") or of.get("returning"):
        values["forgetting/base"] = metrics.base_forgetting(r, stage)
        values["forgetting/novel"] = metrics.novel_forgetting(r, stage)
    return values


def summary(accuracy: np.ndarray, last: dict[str, float], rows: Sequence[StageRow]) -> dict[str, float]:
    """The further numbers of the summary by name.

    Args:
        accuracy: Accuracy over all classes seen after each stage, float [T].
        last: The values of the last stage by the names of the curves.
        rows: The rows of all stages.
    """
    of = rows[-1].get("stream", {})
    found: dict[str, float] = {}
    if of.get("few_shots"):
        found["performance_drop"] = metrics.performance_drop(accuracy)
    if of.get("returning") or "online" in of:
        tests = [test for row, last_one in zip(rows, accuracy, strict=True) for test in _tests(row, last_one)]
        found["accuracy_anytime"] = metrics.anytime_accuracy(*map(np.array, zip(*tests, strict=True)))
    further = (*LONG_TAIL, *BY_GROUP)
    return found | {key: last[name] for key in further if (name := key.replace("_", "/")) in last}


def _tests(row: StageRow, at_end: float) -> list[tuple[float, int]]:
    """Accuracy of each test of a stage and number of training images since the one before."""
    between = row.get("stream", {}).get("online")
    images, accuracy = (between["images"], between["accuracy"]) if between else ([], [])
    return [*zip(accuracy, images, strict=True), (at_end, row["costs"]["train_images"] - sum(images))]


def fault(row: StageRow) -> str:
    """What in the further counts of a row contradicts its counts; empty if nothing does."""
    of = row.get("stream", {})
    if (tests := of.get("online")) and len(tests["images"]) != len(tests["accuracy"]):
        return "other numbers of accuracies than of tests between batches"
    if tests and sum(tests["images"]) > row["costs"]["train_images"]:
        return "more training images between tests than there are"
    if (counts := of.get("by_frequency")) is None:
        return ""
    for key in ("correct", "total"):
        if len(counts[key]) != len(metrics.FREQUENCIES) or sum(counts[key]) != sum(row[key]):
            return f"other numbers of {key} images by frequency than by task"
    return ""
