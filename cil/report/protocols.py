"""Which runs may stand in one table, and what tells those apart that may not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Run = dict[str, Any]


def facts(run: Run) -> dict[str, str]:
    """What must agree for two runs to be ranked together, each fact as text a reader can compare.

    Data (fingerprints of what was read), stream and task sizes, backbone (fingerprint of its weights), transforms at
    test time. How a learner trains, augmentation and precision included, is its own affair.
    """
    found = {}
    for split, name in (("train", "training images"), ("test", "test images")):
        found[name] = f"{run['data'][split]['images']} ({run['data'][split]['sha256'][:8]})"
    found |= {f"stream.{key}": _text(value) for key, value in run["config"]["stream"].items()}
    found["task sizes"] = _text([len(task) for task in run["tasks"]])
    found["backbone"] = f"{run['backbone']['name']} ({run['backbone']['sha256'][:8]})"
    found |= {f"transform.{key}": _text(value) for key, value in run["transform"].items() if key != "augment"}
    found["tested on"] = run["tested_on"]
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def protocol(run: Run) -> str:
    """The facts as one key."""
    # a backbone is its weights: the same ones under another name are the same
    return json.dumps({**facts(run), "backbone": run["backbone"]["sha256"]}, sort_keys=True)


def describe(run: Run) -> str:
    """One line about a protocol: dataset, tasks, backbone."""
    sizes = [len(task) for task in run["tasks"]]
    tasks = f"{len(sizes)} tasks × {sizes[0]} classes" if len(set(sizes)) == 1 else f"tasks of {sizes} classes"
    return f"{run['config']['name']}: {run['config']['data']['dataset']}, {tasks}, {run['backbone']['name']}"


def by_protocol(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that may be compared with one another, in groups; rows of different streams or backbones never mix."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(protocol(run), []).append(run)
    return list(groups.values())


def differences(groups: Sequence[Sequence[Run]]) -> list[dict[str, str]]:
    """For each group the facts in which not all of them agree, by name."""
    every = [facts(group[0]) for group in groups]
    keys = [key for key in dict.fromkeys(key for one in every for key in one) if len({o.get(key) for o in every}) > 1]
    return [{key: one.get(key, "–") for key in keys} for one in every]


def told(differing: dict[str, str]) -> str:
    """Facts on one line, e.g. ``stream.increment = 10, task sizes = [10, 10]``."""
    return ", ".join(f"{key} = {value}" for key, value in differing.items())
