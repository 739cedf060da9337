"""Figures as pure functions of results, drawn without matplotlib's global state.

matplotlib is imported when something is drawn: it takes longer to import than all else that a table needs.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cil import stream_values
from cil.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe cycle; the lower and upper bound look the same in every figure
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#44AA99", "#332288")
LINES = ("-", "-.", ":")  # one style for each use of the whole cycle
BOUNDS = {"finetune": ("#777777", "--"), "joint": ("#111111", "--")}


def styles(titles: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and line style of every learner, given by its position among the sorted titles."""
    free = [t for t in sorted(titles) if t not in BOUNDS]
    rounds = {t: divmod(i, len(CYCLE)) for i, t in enumerate(free)}
    return {t: BOUNDS.get(t) or (CYCLE[rounds[t][1]], LINES[rounds[t][0] % len(LINES)]) for t in titles}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def matrix(r: np.ndarray, title: str) -> Figure:
    """The accuracy matrix R [T, T] as an image: rows are stages, columns tasks; up to 20 stages with numbers, in %."""
    stages = len(r)
    side = 2.2 + 0.42 * min(stages, 20)
    figure = new_figure(side + 0.8, side)
    axes = figure.add_subplot()
    image = axes.imshow(100 * r, vmin=0, vmax=100, cmap="cividis")
    axes.set(title=title, xlabel="task", ylabel="after stage")
    marked = range(0, stages, math.ceil(stages / 20))  # hundreds of labels are illegible and take seconds to draw
    axes.set_xticks(marked, [str(i + 1) for i in marked])
    axes.set_yticks(marked, [str(i + 1) for i in marked])
    if stages <= 20:
        for i in range(stages):
            for j in range(i + 1):
                shade = "black" if r[i, j] > 0.6 else "white"
                axes.text(j, i, f"{100 * r[i, j]:.0f}", ha="center", va="center", color=shade, fontsize=7)
    figure.colorbar(image, ax=axes, label="accuracy, %", shrink=0.8)
    return figure


PANELS = (("accuracy/seen", "accuracy over all classes seen, %"), ("forgetting/mean", "forgetting, points"))
OF_STREAM = {
    # number of the summary that only some kinds of streams have: the panel that these have, too
    "accuracy_harmonic": ("accuracy/harmonic", "harmonic mean of base and novel, %"),
    "accuracy_few": ("accuracy/few", "accuracy, classes of few images, %"),
}
PAPER: Any = {
    # journals require embedded fonts (42: TrueType) rather than outlines; the sizes suit a page of 10-point text
    "pdf.fonttype": 42,
    "svg.hashsalt": "cil",
    "font.size": 8,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 2.2,
}
PAPER_WIDTH = 6.75  # inches: the text width of a two-column page


def band(runs: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation of a curve over runs, in per cent; each [stages of the shortest run].

    The deviation of a single run is NaN, and so are both values where the curve is undefined.
    """
    shortest = min(len(run["curves"][key]) for run in runs)
    values = 100 * np.array([run["curves"][key][:shortest] for run in runs], dtype=float)
    spread = values.std(0, ddof=1) if len(runs) > 1 else np.full(shortest, np.nan)
    return values.mean(0), spread


def panels(groups: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str]]:
    """Curve and label of each panel: accuracy and forgetting, and what the kind of the stream gives a meaning."""
    last = [row for runs in groups.values() for run in runs for row in run.get("stages", [])[-1:]]
    named = {name for row in last for name in stream_values.names(row)}
    return [*PANELS, *(panel for name, panel in OF_STREAM.items() if name in named)]


def _draw(axes: Sequence[Any], groups: dict[str, list[dict[str, Any]]]) -> None:
    """The panels over stages, one line per learner: the mean over its runs ± one standard deviation."""
    style = styles(list(groups))
    for ax, (key, label) in zip(axes, panels(groups), strict=True):
        for name, runs in groups.items():
            mean, spread = band(runs, key)
            stages = np.arange(1, len(mean) + 1)
            colour, line = style[name]
            ax.plot(stages, mean, line, color=colour, marker="o", label=_plain(name))
            if len(runs) > 1:
                ax.fill_between(stages, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        ax.set(xlabel="stage", ylabel=label)
        ax.grid(alpha=0.25)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylim(0, 102)


def _plain(text: str) -> str:
    """A name for matplotlib, which would set what is between two dollar signs as a formula, or fail to."""
    return printable(text).replace("$", r"\$")


def _columns(names: Iterable[str], width: float, size: float) -> int:
    """Columns of a legend that fit into ``width`` inches at a font size in points, with 0.6 em per letter and 4 em per
    line sample."""
    return max(1, int(width * 72 / (size * (4 + 0.6 * max(map(len, names))))))


def comparison(groups: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """Curves of accuracy and forgetting for the screen, with a title."""
    width = 5 * len(panels(groups))
    columns = min(6, _columns(groups, width, 8))
    rows = -(-len(groups) // columns) if len(groups) > 8 else 0  # rows of a legend that is too long for the axes
    figure = new_figure(width, 4.2 + 0.25 * rows)
    axes = figure.subplots(1, len(panels(groups)))
    from matplotlib import rc_context

    with rc_context({"lines.markersize": 3}):
        _draw(axes, groups)
    if rows:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, frameon=False, fontsize=8, ncols=columns, loc="outside lower center")
    else:
        axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(_plain(title), fontsize=11)
    return figure


def paper_figure(groups: dict[str, list[dict[str, Any]]]) -> Figure:
    """Curves of accuracy and forgetting in the width of a page's text, without a title; the legend is below."""
    from matplotlib import rc_context

    with rc_context(PAPER):
        columns = _columns(groups, PAPER_WIDTH, 7)
        figure = new_figure(PAPER_WIDTH, 2.5 + 0.15 * -(-len(groups) // columns))
        axes = figure.subplots(1, len(panels(groups)))
        _draw(axes, groups)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, names, frameon=False, fontsize=7, ncols=columns, handlelength=3, loc="outside lower center"
        )
    return figure


def paper(groups: dict[str, list[dict[str, Any]]], form: str) -> bytes:
    """The figure for a paper as ``pdf``, ``svg`` or ``png``; the same runs give the same bytes."""
    buffer = io.BytesIO()
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    figure = paper_figure(groups)
    from matplotlib import rc_context

    with rc_context(PAPER):
        figure.savefig(buffer, format=form, dpi=300, metadata=undated.get(form))
    return buffer.getvalue()
