"""Figures as pure functions of results; matplotlib without its global state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe cycle; the bounds of every comparison keep one look everywhere
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#44AA99", "#332288")
LINES = ("-", "-.", ":")  # the next round of colours
BOUNDS = {"finetune": ("#777777", "--"), "joint": ("#111111", "--")}


def styles(titles: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and line style of every learner, fixed by its place in the sorted names."""
    free = [t for t in sorted(titles) if t not in BOUNDS]
    rounds = {t: divmod(i, len(CYCLE)) for i, t in enumerate(free)}
    return {t: BOUNDS.get(t) or (CYCLE[rounds[t][1]], LINES[rounds[t][0] % len(LINES)]) for t in titles}


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def matrix(r: np.ndarray, title: str) -> Figure:
    """The accuracy matrix as a picture: a row a stage, a column a task, per cent in the cells where there is room."""
    stages = len(r)
    side = 2.2 + 0.42 * min(stages, 20)
    figure = new_figure(side + 0.8, side)
    axes = figure.add_subplot()
    image = axes.imshow(100 * r, vmin=0, vmax=100, cmap="cividis")
    axes.set(title=title, xlabel="task", ylabel="after stage")
    axes.set_xticks(range(stages), [str(i + 1) for i in range(stages)])
    axes.set_yticks(range(stages), [str(i + 1) for i in range(stages)])
    if stages <= 20:
        for i in range(stages):
            for j in range(i + 1):
                shade = "black" if r[i, j] > 0.6 else "white"
                axes.text(j, i, f"{100 * r[i, j]:.0f}", ha="center", va="center", color=shade, fontsize=7)
    figure.colorbar(image, ax=axes, label="accuracy, %", shrink=0.8)
    return figure


def comparison(groups: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """Accuracy and forgetting over stages, a line a learner: mean over its runs, band ± one standard deviation."""
    rows = -(-len(groups) // 6) if len(groups) > 8 else 0  # of a legend too long to stand inside
    figure = new_figure(10, 4.2 + 0.25 * rows)
    axes = figure.subplots(1, 2)
    style = styles(list(groups))
    panels = [("accuracy/seen", "accuracy over all classes seen, %"), ("forgetting/mean", "forgetting, points")]
    for ax, (key, label) in zip(axes, panels, strict=True):
        for name, runs in groups.items():
            shortest = min(len(run["curves"][key]) for run in runs)
            values = 100 * np.array([run["curves"][key][:shortest] for run in runs], dtype=float)
            mean, spread = values.mean(0), values.std(0)
            stages = np.arange(1, shortest + 1)
            colour, line = style[name]
            ax.plot(stages, mean, line, color=colour, marker="o", markersize=3, label=name)
            if len(runs) > 1:
                ax.fill_between(stages, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        ax.set(xlabel="stage", ylabel=label)
        ax.grid(alpha=0.25)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylim(0, 102)
    if rows:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, frameon=False, fontsize=8, ncols=6, loc="outside lower center")
    else:
        axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure
