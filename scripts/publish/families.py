"""The table of what works with each family of timm, from the file of ``scripts.studies.families``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS: dict[str, tuple[str, ...]] = {
    "features": ("features",),
    "`full`": ("full",),
    "`partial`": ("partial",),
    "`bitfit`": ("bitfit",),
    "`layernorm`": ("layernorm",),
    "`lora`, default": ("lora",),
    "`lora`, layers named": ("lora, targets named",),
    "`dora`": ("dora",),
    "`ia3`": ("ia3",),
    "`oft`": ("oft",),
    "`osf`": ("osf",),
    "tokens": ("adapter", "vpt_shallow", "vpt_deep", "prefix"),
    "`ssf`": ("ssf",),
    "`lora_kv`": ("lora_kv",),
    "export": ("run", "safetensors", "torch.export"),
}
"""Column → the cells of the file that it sums up."""
MARKS = {"untried": "", "works": "✓", "refused": "–", "fails": "✗"}


def table(file: Path) -> str:
    """One row for families with the same outcomes, those where most works first; below, what was not tried."""
    found = json.loads(file.read_text(encoding="utf-8"))
    alike: dict[tuple[str, ...], list[str]] = {}
    for row in found["families"]:
        alike.setdefault(tuple(outcome(row["cells"], keys) for keys in COLUMNS.values()), []).append(title(row))
    lines = [f"| family: smallest model | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 1)]
    for marks in sorted(alike, key=lambda marks: (-marks.count("✓"), alike[marks][0])):
        lines.append(f"| {', '.join(alike[marks])} | {' | '.join(marks)} |")
    lines += [f"| {module}: not tried |{'  |' * len(COLUMNS)}" for module in found["untried"]]
    return "\n".join(lines) + "\n"


def outcome(cells: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """The mark of several cells, that of the worst one; where there are no features, nothing else is there either."""
    none = "untried" if cells["features"]["outcome"] == "works" else cells["features"]["outcome"]
    return MARKS[max((cells[key]["outcome"] if key in cells else none for key in keys), key=list(MARKS).index)]


def title(row: Mapping[str, Any]) -> str:
    reason = f": {row['untried']}" if "untried" in row else ""
    return f"{row.get('class', row['module'])} (`{row['architecture']}`{reason})"
