"""The web page: one HTML file that contains its data, style and script, and opens from disk without a network.

The ranked table is in the HTML itself; the script adds curves, cost against accuracy, and accuracy matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from cil import metrics, stream_values
from cil.errors import printable
from cil.report import figures
from cil.report.columns import COLUMNS, Column
from cil.report.comparison import Comparison
from cil.report.protocols import Run, format_differences
from cil.report.row import SettingRow, order_of, seed_of
from cil.report.terminal import cells

CURVES = {
    # key of the curves in metrics.json: name on the page
    "accuracy/seen": "accuracy over all classes seen, %",
    "accuracy/seen_task_mean": "accuracy, mean over tasks, %",
    "accuracy/seen_class_mean": "accuracy, mean over classes, %",
    "accuracy/seen_top5": "top-5 accuracy, %",
    "accuracy/new": "accuracy on the newest task, %",
    "accuracy/old": "accuracy on older tasks, %",
    "forgetting/mean": "forgetting, points",
    "forgetting/within_task": "forgetting with the task given, points",
    "accuracy/base": "accuracy on the first task's classes, %",
    "accuracy/novel": "accuracy on the classes of later tasks, %",
    "accuracy/harmonic": "harmonic mean of these two, %",
    "accuracy/many": "accuracy on classes with more than 100 training images, %",
    "accuracy/medium": "accuracy on classes with 20 to 100 training images, %",
    "accuracy/few": "accuracy on classes with fewer than 20 training images, %",
    "forgetting/base": "forgetting of the classes of the first task, points",
    "forgetting/novel": "forgetting of the classes of later tasks, points",
    "bwt": "backward transfer, points",
    "task_id_accuracy": "task-id accuracy, %",
    "within_task_accuracy": "accuracy with the task given, %",
}
OF_STREAM = {
    name.replace("_", "/"): name
    for name in (*stream_values.FEW_SHOTS, *stream_values.LONG_TAIL, *stream_values.BY_GROUP)
}
"""Curves that only some kinds of streams give a meaning, and their names in the summary."""
COSTS = {
    # key of the summary: (name on the page, factor from the summary's unit)
    "seconds": ("minutes of learning and testing", 1 / 60),
    "kept_bytes": ("MiB kept", 2**-20),
    "trainable_parameters": ("trained parameters", 1.0),
    "passes_per_train_image": ("passes per training image", 1.0),
    "passes_per_test_image": ("passes per test image", 1.0),
}
DASHES = {"-": "", "-.": "9 3 2 3", ":": "2 3", "--": "6 4"}
# figures.CYCLE for a screen: the same hues, darkened to a contrast of 3 : 1 with the light background, lightened to
# 4.5 : 1 for the dark one
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#c977a4", "#c08500", "#4999c6", "#882255", "#959532", "#40a090", "#332288")
DARK = ("#4aa8e0", "#ff8a3d", "#2fc796", "#e3a0c6", "#f0b429", "#8ccdf5", "#d3688f", "#c9c763", "#74d3c5", "#a095f2")
DARK_BOUNDS = {"finetune": "#a3a3a3", "joint": "#f2f2f2"}
MOST_TASKS = 60  # rows and columns of an accuracy matrix; more are too narrow to read and make the page large
MOST_AT_FIRST = 10  # lines shown at first; a reader cannot distinguish more


def page(compared: Sequence[Comparison], columns: Sequence[Column] = COLUMNS) -> str:
    """A self-contained HTML page with one section per protocol.

    Args:
        compared: The comparisons.
        columns: Columns of the tables.
    """
    environment = Environment(
        loader=PackageLoader("cil.report", "assets"), autoescape=True, trim_blocks=True, finalize=_shown
    )
    # keeps the order of the dictionaries, and saves a quarter of the bytes of long runs
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":")}
    return environment.get_template("page.html").render(
        sections=[_section(one, one.shown(columns)) for one in compared],
        data=[_data(one) for one in compared],
        style=_palette() + _asset("page.css"),
        script=_asset("charts.js") + _asset("scatter.js") + _asset("page.js"),
    )


def _shown(value: Any) -> Any:
    """A value for the page, where autoescaping leaves control characters and invisible marks as they are."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _asset(name: str) -> Markup:
    # a file of this package needs no escaping
    return Markup((files("cil.report") / "assets" / name).read_text(encoding="utf-8"))


def _palette() -> Markup:
    bounds = {name: colour for name, (colour, _) in figures.BOUNDS.items()}
    lines = [
        "".join(f"--line-{name}:{colour};" for name, colour in (*enumerate(cycle), *others.items()))
        for cycle, others in ((LIGHT, bounds), (DARK, DARK_BOUNDS))
    ]
    return Markup(f":root{{{lines[0]}}}\n@media (prefers-color-scheme: dark){{:root{{{lines[1]}}}}}\n")


def _section(compared: Comparison, columns: Sequence[Column]) -> dict[str, Any]:
    """The values that the template shows for one protocol."""
    head, *body = cells(compared, columns)
    values = [[column.mean(row, compared.baseline) for column in columns] for row in compared.rows]
    meanings = ["", "class orders and seeds", *(column.meaning for column in columns), ""]
    firsts = ["ascending", "descending", *("ascending" if c.ascending else "descending" for c in columns), ""]
    return {
        "number": compared.number,
        "title": compared.title,
        "differs": format_differences(compared.differs),
        "head": list(zip(head, meanings, firsts, strict=True)),
        "body": [
            (list(zip(cells_, ["", len(row.runs), *known, ""], strict=True)), row.finished)
            for cells_, known, row in zip(body, values, compared.rows, strict=True)
        ],
        "baseline": compared.baseline.title if compared.baseline and any(c.difference for c in columns) else "",
        "undiffered": compared.why_no_differences(),
        "runs": [_provenance(row, run) for row in compared.rows for run in (*row.runs, *row.left_out)],
        "backbone": compared.runs[0]["backbone"],
    }


def _provenance(row: SettingRow, run: Run) -> list[str]:
    versions = run["versions"]
    return [
        row.title,
        order_of(run),
        str(seed_of(run)),
        f"{len(run['stages'])} of {len(run['tasks'])}",
        "–" if (last := run["summary"]["accuracy_last"]) is None else f"{100 * last:.2f}",
        f"{versions['cil']} {_short(versions.get('commit', ''))}".strip(),
        f"torch {versions['torch']}, {run['machine']['device']}",
        run["folder"],
    ]


def _short(commit: str) -> str:
    """Ten digits of a commit, and the mark of a modified checkout."""
    digits, _, mark = commit.partition("-")
    return f"{digits[:10]}-{mark}" if mark else digits[:10]


def _data(compared: Comparison) -> dict[str, Any]:
    """The values that the script draws for one protocol, in per cent and points; undefined ones are null."""
    style = figures.styles([row.title for row in compared.rows])
    shown = [key for key in CURVES if key not in OF_STREAM or OF_STREAM[key] in compared.of_stream]
    keys = [key for key in shown if all(key in run["curves"] for run in compared.runs)]
    lines = []
    for i, row in enumerate(compared.rows):
        colour, line = style[row.title]
        bound = row.title in figures.BOUNDS
        bands = {key: figures.band(row.runs, key) for key in keys}
        accuracy = 100 * np.array(row.values("accuracy_last"))
        costs = {key: row.values(key) for key in COSTS}
        lines.append(
            {
                "title": printable(row.title),
                "colour": row.title if bound else str(figures.CYCLE.index(colour)),
                "dash": DASHES[line],
                "shown": len(compared.rows) <= MOST_AT_FIRST or i < MOST_AT_FIRST - 2 or bound,
                "finished": row.finished,
                "note": row.note(),
                "curves": {key: {"mean": _plain(mean), "std": _plain(std)} for key, (mean, std) in bands.items()},
                "accuracy": round(float(accuracy.mean()), 3) if len(accuracy) else None,
                "spread": round(float(accuracy.std(ddof=1)), 3) if len(accuracy) > 1 else None,
                "costs": {k: COSTS[k][1] * float(np.mean(v)) if v else None for k, v in costs.items()},
                "runs": [_matrices(run) for run in (*row.runs, *row.left_out)],
            }
        )
    return {
        "rows": lines,
        "curves": {key: CURVES[key] for key in keys},
        "costs": {key: name for key, (name, _) in COSTS.items()},
    }


def _matrices(run: Run) -> dict[str, Any]:
    """The accuracy matrices of a run; of long runs evenly spaced stages and tasks, with the last, whose numbers are
    ``at``."""
    kinds = {"seen": run["accuracy_matrix"], "within": run["accuracy_matrix_within_task"]}
    if set(stream_values.BY_GROUP) & set(stream_values.names(run["stages"][-1])):
        kinds["forgetting"] = metrics.forgetting_matrix(np.array(run["accuracy_matrix"], dtype=float))
    stages = len(run["stages"])
    at = list(range(stages - 1, -1, -math.ceil(stages / MOST_TASKS)))[::-1]
    rows = {
        kind: [_plain(100 * np.array(m[i], dtype=float)[at[: n + 1]]) for n, i in enumerate(at)]
        for kind, m in kinds.items()
    }
    shown = {"at": [i + 1 for i in at]} if len(at) < stages else {}
    return {"order": order_of(run), "seed": seed_of(run), **rows, **shown}


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 3) for value in values]
