"""Runs made by hand for tests of comparisons: counts per stage and task in, ``metrics.json`` out, nothing trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cil import results
from cil.stream.protocol import class_order

TASKS, CLASSES, IMAGES = 3, 2, 100
COSTS = {
    "trainable_parameters": 0,
    "parameter_bytes": 0,
    "statistics_bytes": 2**20,
    "exemplar_bytes": 0,
    "train_images": 40,
    "train_passes": 40,
    "test_passes": 200,
    "seconds_learn": 30.0,
    "seconds_test": 30.0,
    "peak_memory_bytes": 1,
}


def header(learner: str, order: Any = 1, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """What a run says of itself; ``changes`` go over it, ``parameters`` into the learner's section."""
    entry = {"name": learner, "label": None, **changes.pop("parameters", {})}
    stream = {"type": "class_incremental", "initial_classes": 0, "increment": CLASSES, **changes.pop("stream", {})}
    names = [str(c) for c in range(TASKS * CLASSES)]
    found = {
        "learner": learner,
        "paper": "none",
        "stores_images": False,
        "trains_backbone": False,
        "chosen_by": "default",
        "tested_on": "test",
        "config": {
            "name": "bench",
            "data": {"dataset": "digits"},
            "stream": stream,
            "backbone": {"name": "vit"},
            "transform": {"resize": None},
            "learners": [entry],
            "orders": [order],
            "seeds": [seed],
            "inference_batch_size": 128,
            "precision": "fp32",
            "chosen_by": "default",
            "hardware": {"device": "cpu"},
        },
        "class_names": names,
        "class_order": class_order(names, order),
        "tasks": np.arange(TASKS * CLASSES).reshape(TASKS, -1).tolist(),
        "backbone": {"name": "vit", "sha256": "ab" * 32, "feature_dim": 8},
        "transform": {"input_size": 8, "augment": {}},
        "data": {split: {"sha256": "cd" * 32, "images": 120, "skipped": []} for split in ("train", "test")},
        "versions": {"cil": "0", "torch": "2", "commit": "ef" * 20},
        "machine": {"device": "cpu"},
    }
    return found | changes


def rows(correct: list[list[int]], seconds: float = 60.0, parameters: int = 0) -> list[dict[str, Any]]:
    """Stages from the images classified correctly, of IMAGES a task; with the task given, five more."""
    return [
        {
            "correct": row,
            "correct_within_task": [min(IMAGES, n + 5) for n in row],
            "total": [IMAGES] * len(row),
            "top5_accuracy": 1.0,
            "class_mean_accuracy": sum(row) / IMAGES / len(row),
            "task_id_accuracy": 0.9 if len(row) > 1 else None,
            "costs": {
                **COSTS,
                "seconds_learn": seconds / 2,
                "seconds_test": seconds / 2,
                "trainable_parameters": parameters,
            },
            "unchanged_since": [0],
            "log": [],
            "histograms": {},
        }
        for row in correct
    ]


def falling(last: int, stages: int = TASKS) -> list[list[int]]:
    """Counts of a run that classifies ``last`` images of every old task and 90 of the newest."""
    return [[last] * i + [90] for i in range(stages)]


def write(
    root: Path,
    learner: str,
    correct: list[list[int]],
    order: Any = 1,
    seed: int = 0,
    costs: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A run's folder below ``root``, as `cil run` lays it out; what it holds is returned."""
    run = results.assemble(header(learner, order, seed, **changes), rows(correct, **(costs or {})), TASKS)
    folder = root / "bench" / learner / f"order{order if isinstance(order, (int, str)) else 'list0'}-seed{seed}"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(run), encoding="utf-8")
    return run
