"""Decides which runs may share a table, and describes the differences between those that may not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Run = dict[str, Any]


def facts(run: Run) -> dict[str, str]:
    """The facts that must agree for two runs to be ranked together, as texts by name.

    They are the data (fingerprints of the images), stream and task sizes, the backbone (fingerprint of its weights) and
    the test transform. They exclude everything about training, such as augmentation and precision.
    """
    known = {}
    for split, name in (("train", "training images"), ("test", "test images")):
        known[name] = f"{run['data'][split]['images']} ({run['data'][split]['sha256'][:8]})"
    known |= {f"stream.{key}": _text(value) for key, value in run["config"]["stream"].items()}
    # in which tasks a class returns depends on the class order; the keys of the stream say the rest
    known["task sizes"] = _text(len(run["tasks"]) if returns(run) else [len(task) for task in run["tasks"]])
    known["backbone"] = f"{run['backbone']['name']} ({run['backbone']['sha256'][:8]})"
    known |= {f"transform.{key}": _text(value) for key, value in run["transform"].items() if key != "augment"}
    known["tested on"] = run["tested_on"]
    return known


def returns(run: Run) -> bool:
    """Whether classes return in later tasks."""
    return run["config"]["stream"].get("type") in ("blurry", "repetition")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def protocol(run: Run) -> str:
    """The facts as one text, equal for runs that may be ranked together."""
    # the same weights under another name are the same backbone
    return json.dumps({**facts(run), "backbone": run["backbone"]["sha256"]}, sort_keys=True)


def describe_protocol(run: Run) -> str:
    """One line about a protocol: dataset, tasks, backbone."""
    sizes = [len(task) for task in run["tasks"]]
    tasks = f"{len(sizes)} tasks × {sizes[0]} classes" if len(set(sizes)) == 1 else f"tasks of {sizes} classes"
    if returns(run):
        tasks = f"{len(sizes)} tasks, {len(run['class_names'])} classes, which return"
    return f"{run['config']['name']}: {run['config']['data']['dataset']}, {tasks}, {run['backbone']['name']}"


def by_protocol(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of runs that may be ranked together."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(protocol(run), []).append(run)
    return list(groups.values())


def differences(groups: Sequence[Sequence[Run]]) -> list[dict[str, str]]:
    """For each group its facts, by name, of those in which the groups differ."""
    every = [facts(group[0]) for group in groups]
    keys = [key for key in dict.fromkeys(key for one in every for key in one) if len({o.get(key) for o in every}) > 1]
    return [{key: one.get(key, "–") for key in keys} for one in every]


def format_differences(differing: dict[str, str]) -> str:
    """Facts on one line, e.g. ``stream.increment = 10, task sizes = [10, 10]``."""
    return ", ".join(f"{key} = {value}" for key, value in differing.items())
