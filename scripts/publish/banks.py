"""The table of rules, banks and routers on the same trained tasks, from studies/banks.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from cil import report


def table(folder: Path) -> str:
    """Mean ± standard deviation over the class orders of a folder, best first; for routers also those of an oracle."""
    orders = [json.loads(file.read_text(encoding="utf-8"))["found"] for file in sorted(folder.glob("*-order*.json"))]
    rows = {name: [found[name] for found in orders] for name in orders[0]}
    lines = [
        f"| {len(orders)} class orders | A_last % | task found % | A_last % if all were | MB kept | passes per image |",
        "|---|---|---|---|---|---|",
    ]

    def cell(name: str, key: str) -> str:
        return report.spread(np.array([row[key] for row in rows[name]])) if key in rows[name][0] else ""

    for name in sorted(rows, key=lambda name: -np.mean([row["a_last"] for row in rows[name]])):
        shares = " | ".join(cell(name, key) for key in ("a_last", "router", "oracle"))
        first = rows[name][0]
        lines.append(f"| {name} | {shares} | {first['mb']:.1f} | {first['passes']:.0f} |")
    return "\n".join(lines) + "\n"
