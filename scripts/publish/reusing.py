"""The table of what holding a tuner to what it was gains, from the file of ``scripts.studies.reusing``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cil import report

PLAIN = "plain"


def table(argument: Path) -> str:
    """``FILE/STREAM``: for each way and learner the chosen weight, A_last, and A_last less the plain learner's.

    Means ± standard deviations over the class orders, the differences per order. Ways that lack an order are left out.
    """
    file, stream = argument.parent, argument.name
    found = json.loads(file.read_text(encoding="utf-8"))
    learners = [name for name in found["learners"] if ends(found, stream, name, PLAIN)]
    ways = dict.fromkeys(key.split(" ", 2)[2] for key in found["runs"] if key.startswith(f"{stream} "))
    heads = " | ".join(f"weight | {name}: A_last % | less plain" for name in learners)
    lines = [f"| way | {heads} |", "|" + "---|" * (1 + 3 * len(learners))]
    for way in ways:
        cells = [cell for name in learners for cell in cells_of(found, stream, name, way)]
        if any(cells):
            lines.append(f"| {way if way == PLAIN else f'`{way}`'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ends(found: dict[str, Any], stream: str, learner: str, way: str) -> dict[str, float]:
    """A_last in percent by class order; empty unless all orders of the study are there."""
    runs = found["runs"].get(f"{stream} {learner} {way}", {})
    if {str(order) for order in found["orders"]} - runs.keys():
        return {}
    return {order: 100 * run["accuracy_last"] for order, run in runs.items()}


def cells_of(found: dict[str, Any], stream: str, learner: str, way: str) -> tuple[str, str, str]:
    """Weight, A_last and difference of one way of a learner."""
    mine, plain = ends(found, stream, learner, way), ends(found, stream, learner, PLAIN)
    if not mine:
        return "", "", ""
    accuracy = report.spread(np.array(list(mine.values())))
    if way == PLAIN:
        return "", accuracy, ""
    gains = np.array([value - plain[order] for order, value in mine.items()])
    weight = found["choices"][f"{stream} {learner} {way}"]["weight"]
    return f"{weight:g}", accuracy, report.spread(gains, "+.1f")
