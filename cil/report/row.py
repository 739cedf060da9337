"""Rows of a comparison: the runs of one setting over class orders and seeds, and how they pair with a baseline's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cil.errors import RunError
from cil.report.protocols import Run

# keys of a configuration that say where, on what and how often, not what was run; data and backbone are the protocol's
NOT_SETTINGS = ("name", "data", "stream", "backbone", "orders", "seeds", "hardware")


def order_of(run: Run) -> str:
    """The class order as one gives it to ``--order``: a seed or a name; a list of classes as its folder names it."""
    order = run["config"]["orders"][0]
    if isinstance(order, (int, str)):
        return str(order)
    return Path(run["folder"]).name.removeprefix("order").rsplit("-seed", 1)[0]


def seed_of(run: Run) -> int:
    return run["config"]["seeds"][0]


def pair_of(run: Run) -> tuple[tuple[int, ...], int]:
    """What two runs must share to be paired: the class order itself, whatever it is called, and the training seed."""
    return tuple(run["class_order"]), seed_of(run)


@dataclass(frozen=True)
class Row:
    """One setting of one learner.

    Attributes:
        title: The learner's name; where several settings share it, with what tells them apart.
        runs: What the numbers are of, one a class order and seed: the finished runs or, where there are none, those
            that came furthest.
        left_out: The other runs of this setting, not finished.
    """

    title: str
    runs: tuple[Run, ...]
    left_out: tuple[Run, ...] = ()

    @property
    def learner(self) -> str:
        return self.runs[0]["learner"]

    @property
    def finished(self) -> bool:
        """Whether the row may be ranked; accuracy after five of ten stages is no A_last."""
        return self.runs[0]["complete"]

    def values(self, key: str) -> list[float]:
        """A number of the summary over the runs, where it is defined."""
        found = [run["summary"].get(key) for run in self.runs]
        return [float(value) for value in found if value is not None]

    def note(self) -> str:
        """What a reader must know before comparing: kept images, runs that are not finished, how it was tuned."""
        first = self.runs[0]
        notes = ["keeps old images"] if first["stores_images"] else []
        if not self.finished:
            notes.append(f"not ranked: stage {len(first['stages'])} of {len(first['tasks'])}")
        if self.left_out:
            notes.append(f"{len(self.left_out)} unfinished left out")
        if any(row["costs"].get("features_from_store") for run in self.runs for row in run["stages"]):
            notes.append("features read from disk")
        notes += sorted({f"tuned: {run['chosen_by']}" for run in self.runs if run["chosen_by"] != "default"})
        return ", ".join(notes)


def paired(row: Row, baseline: Row, key: str = "accuracy_last") -> list[float]:
    """Differences row − baseline on identical class orders and seeds; runs without a partner take no part.

    Empty unless both are finished.
    """
    if not (row.finished and baseline.finished):
        return []
    partner = {pair_of(run): run["summary"].get(key) for run in baseline.runs}
    both = [(run["summary"].get(key), partner.get(pair_of(run))) for run in row.runs]
    return [a - b for a, b in both if a is not None and b is not None]


def rows(runs: Sequence[Run]) -> list[Row]:
    """Runs of one protocol as rows, in order of their titles.

    Raises:
        RunError: A setting was run twice with one class order and seed, and the folders do not tell the two apart.
    """
    learners: dict[str, list[Run]] = {}
    for run in runs:
        learners.setdefault(run["learner"], []).append(run)
    found = []
    for name in sorted(learners):
        variants = list(_variants(learners[name]))
        for title, group in zip(_titles(name, variants), variants, strict=True):
            furthest = max(map(_progress, group))
            kept, rest = [[run for run in group if (_progress(run) == furthest) is top] for top in (True, False)]
            found.append(Row(title, tuple(kept), tuple(rest)))
    return found


def _progress(run: Run) -> tuple[bool, int]:
    return run["complete"], len(run["stages"])


def settings(run: Run) -> dict[str, str]:
    """A learner's settings and what else decides a run beside protocol, class order and seed, flat, as text."""
    config = run["config"]
    flat = {k: v for k, v in config["learners"][0].items() if k not in ("label", "orders", "seeds")}
    flat |= {k: v for k, v in config.items() if k not in (*NOT_SETTINGS, "learners")}
    return {key: json.dumps(value, sort_keys=True) for key, value in _leaves(flat)}


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _variants(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Runs of one learner by their settings; where two share class order and seed, by their folders as well."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(settings(run), sort_keys=True), []).append(run)
    for group in groups.values():
        if len({pair_of(run) for run in group}) == len(group):
            yield group
            continue
        places: dict[Path, list[Run]] = {}
        for run in group:
            places.setdefault(Path(run["folder"]).parent, []).append(run)
        for place, local in places.items():
            if len({pair_of(run) for run in local}) < len(local):
                raise RunError(
                    f"{place}: holds the same run of {local[0]['learner']} twice (settings, class order, seed); "
                    "move one of the two away"
                )
            yield local


def _titles(name: str, variants: Sequence[Sequence[Run]]) -> list[str]:
    """The learner's name, followed where needed by the settings that differ, or by the folder where none does."""
    if len(variants) == 1:
        return [name]
    every = [settings(group[0]) for group in variants]
    keys = [key for key in dict.fromkeys(key for one in every for key in one) if len({o.get(key) for o in every}) > 1]
    told = [", ".join(f"{key}={one.get(key, '–').strip(chr(34))}" for key in keys) for one in every]
    return [
        f"{name} ({', '.join(filter(None, (text, str(Path(group[0]['folder']).parent.parent))))})"
        if told.count(text) > 1
        else f"{name} ({text})"
        for text, group in zip(told, variants, strict=True)
    ]
