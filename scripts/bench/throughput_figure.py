"""The figure of throughput.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cil.report.figures import CYCLE, new_figure

GOALS = {"evaluation": 0.95, "training": 0.90}
"""Shares of the bare throughput that we aim at; dotted lines in the figure."""


def draw(result: dict[str, Any], path: Path) -> None:
    """Shares of the bare throughput, one panel per backbone."""
    sizes = result["sizes"]
    figure = new_figure(4.2 * len(sizes), 4.6)
    for axes, (size, found) in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes.items(), strict=True):
        bars = [
            (what, side, measured[side])
            for part in ("evaluation", "training", "attention")
            for what, measured in found.get(part, {}).items()
            for side in measured
            if side != "bare"
        ]
        sides = ("steady", "decoding", "explicit", "plain", "augmented")
        colours = dict(zip(sides, CYCLE[:3] + CYCLE[:2], strict=True))
        for y, (_, side, measured) in enumerate(bars):
            spread = [[measured["share"] - measured["lowest"]], [measured["highest"] - measured["share"]]]
            axes.barh(-y, measured["share"], color=colours[side], xerr=spread, error_kw={"lw": 0.8})
        axes.set_yticks([-y for y in range(len(bars))], [f"{what}, {side}" for what, side, _ in bars], fontsize=6)
        axes.axvline(1, color="black", lw=0.8)
        for goal in GOALS.values():
            axes.axvline(goal, color="grey", lw=0.8, ls=":")
        axes.set(title=f"{size}, {found['images']} images", xlabel="throughput, share of bare", xlim=(0, None))
    figure.savefig(path, dpi=120)
