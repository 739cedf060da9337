"""The table of what learners cost on a ViT-B/16, from bench/steps.py."""

from __future__ import annotations

import json
from pathlib import Path


def table(file: Path) -> str:
    """Costs of the second task: its step, all of it, its passes, and memory."""
    found = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        "| learner | numbers trained | seconds of a step | seconds of the task | passes per image | peak MiB | "
        "MiB kept | of them per task |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(found["learners"].items()):
        task = row["tasks"][-1]
        step = "–" if task["seconds_step"] is None else f"{task['seconds_step']:.1f}"
        lines.append(
            f"| {name} | {task['trained']:,} | {step} | {task['seconds']:.1f} | {task['passes']:.0f} | "
            f"{task['peak_mib']:,.0f} | {task['kept_mib']:,.1f} | {row['grows_mib']:.1f} |"
        )
    return "\n".join(lines) + "\n"
