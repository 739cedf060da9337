"""``metrics.json``: everything a reader needs to trust a run, rebuilt from its stages' rows.

Published runs leave out what follows from the rows (:data:`DERIVED`); :func:`load` fills it in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from cil import metrics
from cil.config.renamed import current_keys
from cil.errors import RunError

ROUTER = ("router_accuracy", "oracle_router_accuracy")
"""Keys that only the rows of learners have which choose an adapter for each image."""
DERIVED = ("accuracy_matrix", "accuracy_matrix_within_task", "curves")
"""Top-level keys of ``metrics.json`` that follow from the rows; published runs leave them out."""


class StateBytes(TypedDict):
    """What a learner keeps between tasks, in bytes."""

    parameter_bytes: int  # parameters, trained or not, without the backbone
    statistics_bytes: int  # buffers, such as class means and covariances
    exemplar_bytes: int  # images of old tasks


class Costs(StateBytes):
    """What one stage cost, and what the learner keeps after it."""

    trainable_parameters: int  # the most that were trained at a time
    train_images: int  # images of the task
    train_passes: int  # images sent through the backbone to learn the task, epochs included
    test_passes: int  # images sent through the backbone to test the stage
    features_from_store: int  # of all these, images whose features were read from the feature store
    seconds_learn: float
    seconds_test: float
    peak_memory_bytes: int  # of the process, or of the device if it has memory of its own


class _Counts(TypedDict):
    correct: list[int]  # by task j ≤ i: test images that are right among all classes seen
    correct_within_task: list[int]  # by task j ≤ i: test images that are right among the task's own classes
    total: list[int]  # by task j ≤ i: test images
    top5_accuracy: float  # a fraction, as all accuracies are
    class_mean_accuracy: float  # mean over classes of the accuracy on the class's test images
    task_id_accuracy: float | None  # the predicted class is one of the image's task; None if tasks share classes


class Counts(_Counts, total=False):
    """What the predictions after stage i say, per task and overall."""

    router_accuracy: float  # the learner takes an image for one of its task; RoutedLearner alone
    oracle_router_accuracy: float  # the accuracy if it always did; RoutedLearner alone


class StageRow(Counts):
    """One stage of a run: ``stages[i]`` of ``metrics.json``."""

    unchanged_since: list[int]  # for each view of the learner, the stage since which it has not changed
    costs: Costs
    log: list[tuple[str, float]]  # (name, value) of everything the learner logged, in order
    histograms: dict[str, list[float]]  # by name, how often each numbered thing (a prompt, a task) was used


class Header(TypedDict):
    """What is known about a run before it starts: the configuration, and every fact that its numbers depend on."""

    learner: str  # its title: the label, the registered name or the class's name
    paper: str
    stores_images: bool  # whether it keeps old images, as replay methods and upper bounds do
    trains_backbone: bool
    chosen_by: str  # how its hyper-parameters were chosen
    tested_on: str  # test, or validation for images held out of the training split
    config: dict[str, Any]  # the resolved configuration of this run alone; `cil run` accepts it
    class_names: list[str]  # in order of appearance
    class_order: list[int]  # position in the data set's own order, for each class in order of appearance
    tasks: list[list[int]]  # labels of each task, in order of appearance
    backbone: dict[str, Any]  # name, sha256 of the weights, feature_dim
    transform: dict[str, Any]
    data: dict[str, Any]  # for each split: sha256, images, skipped and, if read from disk, folders
    versions: dict[str, str]  # of the packages, and the commit of a checkout
    machine: dict[str, Any]


def matrices(rows: Sequence[StageRow]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(R, R_task, total) of the stages so far: float [T, T], float [T, T], int [T]."""
    stages = len(rows)
    correct, within = np.zeros((2, stages, stages), dtype=np.int64)
    for i, row in enumerate(rows):
        correct[i, : i + 1], within[i, : i + 1] = row["correct"], row["correct_within_task"]
    total = np.array(rows[-1]["total"])
    return metrics.accuracy_matrix(correct, total), metrics.accuracy_matrix(within, total), total


def curves(rows: Sequence[StageRow]) -> dict[str, list[float]]:
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
        **{name: [float(row[name]) for row in rows] for name in ROUTER if all(name in row for row in rows)},  # type: ignore[literal-required]
    }


def derived(rows: Sequence[StageRow]) -> dict[str, Any]:
    """The values of :data:`DERIVED` for the stages so far; undefined values are null."""
    r, r_task, _ = matrices(rows)
    return _nullable(dict(zip(DERIVED, (r.tolist(), r_task.tolist(), curves(rows)), strict=True)))


def completed(run: dict[str, Any]) -> dict[str, Any]:
    """A run with matrices and curves: its own, or rebuilt from the rows where it was published without them."""
    return {**run, **derived(run["stages"])} if "summary" in run and "curves" not in run else run


def kept_bytes(costs: Costs) -> int:
    """What a learner keeps after a stage with these costs: trained parameters, statistics and exemplars."""
    return costs["parameter_bytes"] + costs["statistics_bytes"] + costs["exemplar_bytes"]


def assemble(header: Header, rows: Sequence[StageRow], stages: int) -> dict[str, Any]:
    """The content of ``metrics.json``: header, matrices, curves, summary; undefined values are null."""
    if not rows:
        return {**header, "complete": False, "stages": []}
    r, r_task, total = matrices(rows)
    summary = metrics.summary(r, r_task, total)
    from_rows = derived(rows)
    by_stage = from_rows["curves"]
    summary |= {name: by_stage[name][-1] for name in ("task_id_accuracy", *ROUTER) if name in by_stage}
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
            **from_rows,
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


def read_run(folder: Path) -> dict[str, Any]:
    """A run's ``metrics.json``, as ``cil run`` writes it or as it is published.

    Raises:
        RunError: Missing or damaged.
    """
    file = folder / "metrics.json"
    try:
        run = completed(json.loads(file.read_text(encoding="utf-8")))
        return {**run, "config": current_keys(run["config"])} if "config" in run else run
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
        found = [{**read_run(file.parent), "folder": str(file.parent)} for file in files]
        if not any(run["stages"] for run in found):
            raise RunError(f"{path}: no run there has finished a stage yet")
        runs += [run for run in found if run["stages"]]
    return list({run["folder"]: run for run in runs}.values())
