"""Rows of a comparison: the runs of one setting over class orders and seeds, and their pairs with a baseline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cil.errors import RunError
from cil.report.protocols import Run
from cil.utils.nested import flatten

# keys of a configuration that are not settings of the learner; data, stream and backbone belong to the protocol
NOT_SETTINGS = ("name", "data", "stream", "backbone", "backbones", "orders", "seeds", "hardware")


def order_of(run: Run) -> str:
    """The class order in the form that ``--order`` accepts: a seed or a name; for a list, the name in its folder."""
    order = run["config"]["orders"][0]
    if isinstance(order, (int, str)):
        return str(order)
    return Path(run["folder"]).name.removeprefix("order").rsplit("-seed", 1)[0]


def seed_of(run: Run) -> int:
    """The training seed."""
    return run["config"]["seeds"][0]


def pair_of(run: Run) -> tuple[tuple[int, ...], int]:
    """(class order, training seed): two runs that share these can be paired, whatever the order is called."""
    return tuple(run["class_order"]), seed_of(run)


@dataclass(frozen=True)
class SettingRow:
    """One setting of one learner.

    Attributes:
        title: The learner's name; if several settings share it, followed by the values that differ.
        runs: The runs that the numbers come from, one per class order and seed: the finished runs or, without any, the
            ones with the most stages.
        left_out: The other runs of this setting, which are unfinished.
    """

    title: str
    runs: tuple[Run, ...]
    left_out: tuple[Run, ...] = ()

    @property
    def learner(self) -> str:
        """The learner's name or label."""
        return self.runs[0]["learner"]

    @property
    def finished(self) -> bool:
        """Whether the row may be ranked; the accuracy after five of ten stages is not an A_last."""
        return self.runs[0]["complete"]

    def values(self, key: str) -> list[float]:
        """A number of the summary for each run in which it is defined."""
        values = [run["summary"].get(key) for run in self.runs]
        return [float(value) for value in values if value is not None]

    def note(self) -> str:
        """Remarks for a fair comparison: stored images, unfinished runs, how hyper-parameters were chosen."""
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


def paired(row: SettingRow, baseline: SettingRow, key: str = "accuracy_last") -> list[float]:
    """Differences row − baseline on identical class orders and seeds; runs without a partner are ignored.

    The list is empty unless both rows are finished.
    """
    if not (row.finished and baseline.finished):
        return []
    partner = {pair_of(run): run["summary"].get(key) for run in baseline.runs}
    pairs = [(run["summary"].get(key), partner.get(pair_of(run))) for run in row.runs]
    return [a - b for a, b in pairs if a is not None and b is not None]


def rows(runs: Sequence[Run]) -> list[SettingRow]:
    """Runs of one protocol as rows, sorted by title.

    Raises:
        RunError: A folder holds two runs of one setting with the same class order and seed.
    """
    learners: dict[str, list[Run]] = {}
    for run in runs:
        learners.setdefault(run["learner"], []).append(run)
    result = []
    for name in sorted(learners):
        variants = list(_variants(learners[name]))
        for title, group in zip(_titles(name, variants), variants, strict=True):
            furthest = max(map(_progress, group))
            counted, rest = [[run for run in group if (_progress(run) == furthest) is top] for top in (True, False)]
            result.append(SettingRow(title, tuple(counted), tuple(rest)))
    return result


def _progress(run: Run) -> tuple[bool, int]:
    return run["complete"], len(run["stages"])


def flat_settings(run: Run) -> dict[str, str]:
    """The settings of a run as texts by dotted key: everything but the protocol, the class order and the seed."""
    config = run["config"]
    flat = {k: v for k, v in config["learners"][0].items() if k not in ("label", "orders", "seeds")}
    flat |= {k: v for k, v in config.items() if k not in (*NOT_SETTINGS, "learners")}
    return {key: json.dumps(value, sort_keys=True) for key, value in flatten(flat)}


def _variants(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Groups the runs of one learner by setting, and by folder if two of a setting share class order and seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(flat_settings(run), sort_keys=True), []).append(run)
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
                    "move one of them away"
                )
            yield local


def _titles(name: str, variants: Sequence[Sequence[Run]]) -> list[str]:
    """A title per variant: the learner's name, and if there are several, the settings that differ, or the folder."""
    if len(variants) == 1:
        return [name]
    every = [flat_settings(group[0]) for group in variants]
    keys = [key for key in dict.fromkeys(key for one in every for key in one) if len({o.get(key) for o in every}) > 1]
    texts = [", ".join(f"{key}={one.get(key, '–').strip(chr(34))}" for key in keys) for one in every]
    return [
        f"{name} ({', '.join(filter(None, (text, str(Path(group[0]['folder']).parent.parent))))})"
        if texts.count(text) > 1
        else f"{name} ({text})"
        for text, group in zip(texts, variants, strict=True)
    ]
