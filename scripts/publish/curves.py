"""The figure at the top of the README: accuracy and forgetting over stages, one curve per learner."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context

from cil import report, results
from cil.errors import RunError
from cil.report.figures import BOUNDS, CYCLE, PANELS, band, new_figure
from cil.report.row import order_of, seed_of

LEADERS = 3
"""Number of curves with a colour and a name: the best learners that keep no old images."""
ABLATIONS = ("*_no_*", "*_online", "*_offline")
"""Labels of settings without an essential part of the method; they are only in the tables."""


@dataclass(frozen=True)
class Curve:
    """A learner's runs over the class orders that all curves share.

    Attributes:
        learner: Registered name, or the strategy of an Avalanche learner.
        label: Label of the setting that is drawn.
        runs: One run per class order.
    """

    learner: str
    label: str
    runs: tuple[dict[str, Any], ...]

    @property
    def last(self) -> float:
        """Mean A_last."""
        return float(np.mean([run["summary"]["accuracy_last"] for run in self.runs]))


def learner_of(run: dict[str, Any]) -> str:
    """The name under which runs are one learner: Avalanche strategies count as different learners."""
    entry = run["config"]["learners"][0]
    return str(entry.get("strategy", {}).get("name") or entry.get("name") or run["learner"])


def curves(folders: Sequence[Path]) -> list[Curve]:
    """One curve per learner, best A_last first; of several settings of a learner the one with the best A_last.

    Only class orders that every learner has finished count, so that all curves are means over the same streams.

    Raises:
        RunError: There are runs of several protocols, or no class order that all share.
    """
    runs = [run for run in results.find(list(folders)) if run["complete"] and seed_of(run) == 0]
    runs = [run for run in runs if not any(fnmatchcase(run["learner"], pattern) for pattern in ABLATIONS)]
    groups = report.by_protocol(runs)
    if len(groups) != 1:
        raise RunError(f"{', '.join(map(str, folders))}: finished runs of {len(groups)} protocols; a figure shows one")
    settings: dict[str, list[list[dict[str, Any]]]] = {}
    for row in report.rows(runs):
        settings.setdefault(learner_of(row.runs[0]), []).append(list(row.runs))
    has = [{order_of(run) for rows in settings[name] for run in rows} for name in settings]
    shared = set.intersection(*has)
    found = []
    for name, rows in settings.items():
        whole = [[run for run in row if order_of(run) in shared] for row in rows]
        whole = [row for row in whole if {order_of(run) for run in row} == shared]
        if not whole or not shared:
            raise RunError(f"{name}: no setting has the class orders that all learners share ({sorted(shared)})")
        found.append(max((Curve(name, row[0]["learner"], tuple(row)) for row in whole), key=lambda c: c.last))
    return sorted(found, key=lambda curve: (-curve.last, curve.learner))


def spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions near the wanted ones, in the same order, at least ``gap`` apart; groups stay centred.

    >>> spread_out([1.0, 1.0, 9.0], 2.0)
    [0.0, 2.0, 9.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[tuple[float, list[int]]] = []  # (centre, members)
    for i in order:
        block = (wanted[i], [i])
        while blocks and block[0] - blocks[-1][0] < gap * (len(block[1]) + len(blocks[-1][1])) / 2:
            centre, members = blocks.pop()
            joined = [*members, *block[1]]
            total = centre * len(members) + block[0] * len(block[1])
            block = (total / len(joined), joined)
        blocks.append(block)
    placed = [0.0] * len(wanted)
    for centre, members in blocks:
        for k, i in enumerate(members):
            placed[i] = centre + gap * (k - (len(members) - 1) / 2)
    return placed


def draw(found: Sequence[Curve]) -> bytes:
    """The figure as PNG; the same bytes for the same runs and the same matplotlib."""
    leaders = [c.learner for c in found if not c.runs[0]["stores_images"] and c.learner not in BOUNDS][:LEADERS]
    named = [*leaders, *([] if "ncm" in leaders else ["ncm"])]
    style = {name: (CYCLE[i], "-") for i, name in enumerate(named)} | BOUNDS
    first = found[0].runs[0]
    orders = ", ".join(sorted({order_of(run) for run in found[0].runs}))
    several = f"mean of class orders {orders}" if len(found[0].runs) > 1 else f"class order {orders}"
    with rc_context({"font.size": 9}):
        figure = new_figure(10, 4.4)
        for ax, (key, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
            ends = []
            for curve in sorted(found, key=lambda c: c.learner in style):  # the named ones on top
                values = band(curve.runs, key)[0]
                stages = np.arange(1, len(values) + 1)
                if curve.learner not in style:
                    ax.plot(stages, values, color="#bbbbbb", linewidth=0.8)
                    continue
                colour, line = style[curve.learner]
                ax.plot(stages, values, line, color=colour, linewidth=1.9, marker="o", markersize=3)
                ends.append((float(values[-1]), curve.label, colour))
            low, high = ax.get_ylim()
            heights = spread_out([end for end, _, _ in ends], 0.05 * (high - low))
            for (end, text, colour), height in zip(ends, heights, strict=True):
                ax.annotate(
                    text,
                    (stages[-1], end),
                    (stages[-1] + 0.03 * len(stages), height),
                    color=colour,
                    va="center",
                    annotation_clip=False,
                )
            ax.set(xlabel="stage", ylabel=label)
            ax.set_xticks(stages)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        tasks = f"{len(first['tasks'])} tasks × {len(first['tasks'][0])} classes"
        figure.suptitle(f"{tasks}, {len(found)} learners, {several}", fontsize=10)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
