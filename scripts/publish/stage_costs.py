"""Draw the costs of every stage of finished runs, from their metrics.json; one colour per learner.

    python -m scripts.publish.stage_costs results/reference/split_tiny_imagenet100_records_50_tasks

writes ``stage_costs.png`` to the folder. There is one run per learner. Peak memory is that of a process, so each needs
its own process.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from cil import results
from cil.report.figures import new_figure, styles

Run = dict[str, Any]
MIB = 2**20
WINDOW = 5
"""Number of stages over which seconds in the table are averaged: those of a single stage are noisy."""
PANELS = {
    "learn": "seconds to learn a stage",
    "test": "seconds to test all classes seen",
    "passes": "passes per new image",
    "kept": "MiB kept",
    "peak": "peak memory so far, MiB",
}
CONDITIONS = {"condition_number_uncut": ("before the cut", "-"), "condition_number": ("kept", "--")}
"""Name in LoRanPAC's log → name in the figure, line style."""


def series(run: Run) -> dict[str, np.ndarray]:
    """Per stage, in the units of :data:`PANELS`."""
    costs = [stage["costs"] for stage in run["stages"]]
    return {
        "learn": np.array([cost["seconds_learn"] for cost in costs]),
        "test": np.array([cost["seconds_test"] for cost in costs]),
        "passes": passes(run),
        "kept": np.array([results.kept_bytes(cost) for cost in costs]) / MIB,
        "peak": np.array([cost["peak_memory_bytes"] for cost in costs]) / MIB,
    }


def passes(run: Run) -> np.ndarray:
    """Forward passes to predict an image not seen before, after each stage.

    The runner computes a test image once per view of the backbone and again only when the view changes, so the passes
    of later stages are fewer. In the first stage every image is new: the passes per view there, times the views after
    each stage.
    """
    views = np.array([np.size(stage["unchanged_since"]) for stage in run["stages"]])  # a number alone is one view
    first = run["stages"][0]
    return first["costs"]["test_passes"] / sum(first["total"]) / views[0] * views


def logged(run: Run, name: str) -> list[float]:
    """The last value that a learner logged under a name in every stage that has one."""
    found = [[value for key, value in stage["log"] if key == name] for stage in run["stages"]]
    return [values[-1] for values in found if values]


def table(folder: Path) -> str:
    """One row per learner: the costs of an early and of the last stages."""
    runs = {run["learner"]: run for run in results.find([folder])}
    first = min(10, min(len(run["stages"]) for run in runs.values()))
    last = min(len(run["stages"]) for run in runs.values())
    lines = [
        f"| learner | s to learn a stage: task {first}, task {last} | s to test it | passes per new image | "
        "MiB kept | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for learner, run in runs.items():
        found = series(run)
        cells = []
        for name, digits in (("learn", 1), ("test", 1), ("passes", 0), ("kept", 1), ("peak", 0)):
            window = WINDOW if name in ("learn", "test") else 1
            at = [found[name][max(0, stage - window) : stage].mean() for stage in (first, last)]
            cells.append(", ".join(f"{value:.{digits}f}" for value in at))
        lines.append(f"| {learner} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(folder: Path, path: Path) -> None:
    runs = {run["learner"]: run for run in results.find([folder])}
    look = styles(list(runs))
    figure = new_figure(13, 7)
    panels = figure.subplots(2, 3).ravel()
    for axes, (name, label) in zip(panels, PANELS.items(), strict=False):
        for learner, run in runs.items():
            values, (colour, line) = series(run)[name], look[learner]
            axes.plot(range(1, len(values) + 1), values, line, color=colour, label=learner, lw=1.1)
        axes.set(xlabel="task", ylabel=label, yscale="log")
    axes = panels[5]
    for learner, run in runs.items():
        for name, (title, line) in CONDITIONS.items():
            if values := logged(run, name):
                label = f"{learner}, {title}"
                axes.plot(range(1, len(values) + 1), values, line, color=look[learner][0], label=label, lw=1.1)
    axes.set(xlabel="task", ylabel="condition number σ₁²/σ²ₖ", yscale="log")
    if axes.lines:
        axes.legend(fontsize=8)
    else:
        axes.remove()
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, ncols=6, loc="outside lower center")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds the runs, at any depth")
    parser.add_argument("--out", type=Path, help="default: stage_costs.png in the folder")
    arguments = parser.parse_args()
    draw(arguments.folder, arguments.out or arguments.folder / "stage_costs.png")
    print(table(arguments.folder))


if __name__ == "__main__":
    main()
