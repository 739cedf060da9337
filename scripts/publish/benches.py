"""Tables of what the benches of scripts/bench measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from scripts.publish.markdown import table


def throughput(file: Path) -> str:
    """Our throughput as a share of the bare one, median and range over the pairs."""
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for size, parts in found["sizes"].items():
        measured = {k: v for part in ("evaluation", "training", "attention") for k, v in parts.get(part, {}).items()}
        for what, sides in measured.items():
            shares = "; ".join(
                f"{side} {m['share']:.2f} ({m['lowest']:.2f} to {m['highest']:.2f})"
                for side, m in sides.items()
                if side != "bare"
            )
            rows.append([size, what, f"{sides['bare']['images_per_second']:.1f}", shares])
    return table(["backbone", "what", "bare, images/s", "ours, share of bare"], rows)


def growth(file: Path) -> str:
    """Costs of the run with the most tasks, and the ratio of last to first stages for every number of tasks."""
    found = json.loads(file.read_text(encoding="utf-8"))
    head = [
        "classifier",
        "ms per class to learn and solve: first fifth of the stages, last",
        "last over first, by tasks",
        "ms to predict an image: first, last stage",
        "MiB kept at the end",
        "peak MiB",
    ]
    rows = []
    for name, runs in found["heads"].items():
        stages = runs[max(runs, key=int)]
        fifth = len(stages) // 5
        each = [1000 * (row["learn"] + row["solve"]) / stages[0]["classes"] for row in stages[1:]]
        first, last = np.median(each[:fifth]), np.median(each[-fifth:])
        flat = ", ".join(f"{tasks}: {f['learn_and_solve']:.1f}" for tasks, f in found["last_over_first"][name].items())
        predict = [1000 * row["predict_per_image"] for row in (stages[0], stages[-1])]
        peak = max(row["peak_mib"] for row in stages)
        costs = [f"{first:.1f}, {last:.1f}", flat, f"{predict[0]:.2f}, {predict[1]:.2f}"]
        rows.append([name, *costs, f"{stages[-1]['kept_mib']:.0f}", f"{peak:.0f}"])
    return table(head, rows)


def one_step(file: Path) -> str:
    """Costs of the second task: its step, all of it, its passes, and memory."""
    found = json.loads(file.read_text(encoding="utf-8"))
    head = ["learner", "numbers trained", "seconds of a step", "seconds of the task", "passes per image", "peak MiB"]
    rows = []
    for name, row in sorted(found["learners"].items()):
        task = row["tasks"][-1]
        step = "–" if task["seconds_step"] is None else f"{task['seconds_step']:.1f}"
        costs = [f"{task['trained']:,}", step, f"{task['seconds']:.1f}", f"{task['passes']:.0f}"]
        memory = [f"{task['peak_mib']:,.0f}", f"{task['kept_mib']:,.1f}", f"{row['grows_mib']:.1f}"]
        rows.append([name, *costs, *memory])
    return table([*head, "MiB kept", "of them per task"], rows)


def wide(file: Path) -> str:
    """Per width, processor seconds to learn and to solve, bytes kept, and peak; of what was not run, its estimates."""
    found = json.loads(file.read_text(encoding="utf-8"))
    head = ["classifier", "width F", "seconds to learn 1,000", "to solve", "MiB kept", "peak MiB: estimate", "measured"]
    rows = []
    for name, widths in found["heads"].items():
        for width, row in widths.items():
            if "refused" in row:
                cells = ["refused", "", "", "", ""]
            elif "learn" in row:
                seconds = [f"{row[key]:.1f}" for key in ("learn", "solve")]
                cells = [*seconds, *(f"{row[key]:,.0f}" for key in ("kept_mib", "estimate_mib", "peak_mib"))]
            else:
                cells = ["not run", "", f"{row['estimate_kept_mib']:,.0f}", f"{row['estimate_mib']:,.0f}", ""]
            rows.append([name, f"{int(width):,}", *cells])
    return table(head, rows)


def heads(file: Path) -> str:
    """One row per head and number of classes; each cell is the other checkout's value, then this one's."""
    found = json.loads(file.read_text(encoding="utf-8"))
    head = ["head", "classes", "s to learn a fifth", "s to align or solve", "ms per image", "s to write"]
    rows = []
    for name, sizes in found["heads"].items():
        for classes, sides in sizes.items():
            both = [sides[side] for side in ("against", "ours") if side in sides]
            cells = [
                ", ".join(f"{one['seconds']['learn']:.1f}" for one in both),
                ", ".join(f"{one['seconds'].get('align', one['seconds']['solve']):.1f}" for one in both),
                ", ".join(f"{1000 * one['seconds']['predict_per_image']:.2f}" for one in both),
                ", ".join(f"{one['seconds']['write']:.1f}" for one in both),
                ", ".join(f"{one['checkpoint_mib']:,.0f}" for one in both),
                ", ".join(f"{one['peak_mib']:,.0f}" for one in both),
                _share(both),
            ]
            rows.append([name, f"{int(classes):,}", *cells])
    return table([*head, "checkpoint MiB", "peak MiB", "peak, share of before"], rows)


def _share(both: list[dict[str, Any]]) -> str:
    """The last peak as a share of the first one, where there are two."""
    return f"{both[-1]['peak_mib'] / both[0]['peak_mib']:.2f}" if len(both) == 2 else "–"


def startup(file: Path) -> str:
    """Processor seconds of each case: of the other checkout, of this one, and the ratio with both ends of the pairs."""
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for case, sides in found["cases"].items():
        ratio = f"{sides['ratio']:.2f} ({sides['lowest']:.2f} to {sides['highest']:.2f})" if "ratio" in sides else "–"
        before = f"{sides['against']['cpu_seconds']:.2f}" if "against" in sides else "–"
        rows.append([case, before, f"{sides['ours']['cpu_seconds']:.2f}", ratio])
    return table(["what", "s before", "s now", "now over before"], rows)


def pilot(file: Path) -> str:
    """Processor seconds of each learner's run, in parts."""
    found = json.loads(file.read_text(encoding="utf-8"))
    parts = ("learning", "testing", "rest", "total")
    rows = [[name, *(f"{run[part]:.1f}" for part in parts)] for name, run in found["learners"].items()]
    return table(["learner", "s learning", "s testing", "s for the rest", "s in total"], rows)
