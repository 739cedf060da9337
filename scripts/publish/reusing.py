"""The table of what holding a tuner to what it was gains, from the file of ``scripts.studies.reusing``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cil import report

PLAIN = "plain"


def table(argument: Path) -> str:
    """``FILE/STREAM``: per way and learner the chosen weight (of plain: the rate), A_last, and differences to plain.

    Means ± standard deviations over the class orders, the differences per order. Ways that lack an order are left out.
    """
    file, stream = argument.parent, argument.name
    found = json.loads(file.read_text(encoding="utf-8"))
    learners = [name for name in found["learners"] if ends(found, stream, name, PLAIN)]
    ways = dict.fromkeys(key.split(" ", 2)[2] for key in found["runs"] if key.startswith(f"{stream} "))
    heads = " | ".join(f"weight | {name}: A_last % | less plain | forgetting less plain" for name in learners)
    lines = [f"| way | {heads} |", "|" + "---|" * (1 + 4 * len(learners))]
    for way in ways:
        cells = [cell for name in learners for cell in cells_of(found, stream, name, way)]
        if any(cells):
            lines.append(f"| {way if way == PLAIN else f'`{way}`'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ends(found: dict[str, Any], stream: str, learner: str, way: str, key: str = "accuracy_last") -> dict[str, float]:
    """A value of the summary in percent by class order; empty unless all orders are there, and trained to the end."""
    runs = found["runs"].get(f"{stream} {learner} {way}", {})
    values = {order: 100 * run[key] for order, run in runs.items() if "failed" not in run}
    return {} if {str(order) for order in found["orders"]} - values.keys() else values


def cells_of(found: dict[str, Any], stream: str, learner: str, way: str) -> tuple[str, str, str, str]:
    """Weight (of the plain learner: rate), A_last and the two differences of one way of a learner."""
    mine = ends(found, stream, learner, way)
    if not mine:
        return "", "", "", ""
    accuracy = report.spread(np.array(list(mine.values())))
    weight = f"{found['choices'][f'{stream} {learner} {way}']['weight']:g}"
    if way == PLAIN:
        return f"rate {weight}", accuracy, "", ""
    less = []
    for key in ("accuracy_last", "forgetting"):
        values, plain = (ends(found, stream, learner, one, key) for one in (way, PLAIN))
        less.append(report.spread(np.array([value - plain[order] for order, value in values.items()]), "+.1f"))
    return weight, accuracy, *less
