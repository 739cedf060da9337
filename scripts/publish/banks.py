"""The table of rules, banks and routers on the same trained tasks, from studies/banks.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from cil import report
from scripts.publish import markdown


def table(folder: Path) -> str:
    """Mean ± standard deviation over the class orders of a folder, best first; for routers also those of an oracle."""
    orders = [json.loads(file.read_text(encoding="utf-8"))["found"] for file in sorted(folder.glob("*-order*.json"))]
    rows = {name: [found[name] for found in orders] for name in orders[0]}
    head = [f"{len(orders)} class orders", "A_last %", "task found %", "A_last % if all were", "MB kept"]

    def cell(name: str, key: str) -> str:
        return report.spread(np.array([row[key] for row in rows[name]])) if key in rows[name][0] else ""

    def line(name: str) -> list[str]:
        first = rows[name][0]
        shares = [cell(name, key) for key in ("a_last", "router", "oracle")]
        return [name, *shares, f"{first['mb']:.1f}", f"{first['passes']:.0f}"]

    best_first = sorted(rows, key=lambda name: -np.mean([row["a_last"] for row in rows[name]]))
    return markdown.table([*head, "passes per image"], map(line, best_first))
