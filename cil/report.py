"""Comparing runs: a table on the terminal, a figure, and a page that opens from disk without a server."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from cil import figures, results

Run = dict[str, Any]

COLUMNS: tuple[tuple[str, str, float, str], ...] = (
    # key of the summary, heading, factor, format; on a narrow terminal the first NARROW are shown
    ("accuracy_last", "A_last %", 100, ".1f"),
    ("accuracy_average", "A_avg %", 100, ".1f"),
    ("forgetting", "forgetting", 100, ".1f"),
    ("seconds", "seconds", 1, ".0f"),
    ("trainable_parameters", "trained", 1, ",.0f"),
    ("forgetting_within_task", "…task given", 100, ".1f"),
    ("learning_accuracy", "learned %", 100, ".1f"),
    ("kept_bytes", "kept MiB", 2**-20, ".2f"),
    ("passes_per_train_image", "passes", 1, ".1f"),
)
NARROW = 4


def protocol(run: Run) -> str:
    """What must agree for two runs to stand in one table: data, task sizes, backbone, transforms, tested split."""
    config = run["config"]
    facts = {
        "data": {split: run["data"][split]["sha256"] for split in ("train", "test")},
        "stream": config["stream"],
        "sizes": [len(task) for task in run["tasks"]],
        "backbone": run["backbone"]["sha256"],
        "transform": {k: v for k, v in run["transform"].items() if k != "augment"},
        "tested_on": run["tested_on"],
    }
    return json.dumps(facts, sort_keys=True)


def describe(run: Run) -> str:
    """One line about a protocol: dataset, tasks, backbone."""
    sizes = [len(task) for task in run["tasks"]]
    tasks = f"{len(sizes)} tasks × {sizes[0]} classes" if len(set(sizes)) == 1 else f"tasks of {sizes} classes"
    return f"{run['config']['name']}: {run['config']['data']['dataset']}, {tasks}, {run['backbone']['name']}"


def by_protocol(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that may be compared with one another, in groups; rows of different streams or backbones never mix."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(protocol(run), []).append(run)
    return list(groups.values())


def by_learner(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of one protocol by learner, best mean final accuracy first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["learner"], []).append(run)
    ranked = sorted(groups, key=lambda name: -np.mean([run["summary"]["accuracy_last"] for run in groups[name]]))
    return {name: groups[name] for name in ranked}


def cells(runs: Sequence[Run]) -> list[str]:
    """One learner's row: mean ± standard deviation over its class orders and seeds."""
    row = []
    for key, _, factor, form in COLUMNS:
        values = [run["summary"][key] for run in runs if run["summary"][key] is not None]
        if not values:
            row.append("–")
            continue
        text = format(factor * float(np.mean(values)), form)
        spread = key not in ("trainable_parameters", "passes_per_train_image") and len(values) > 1
        row.append(f"{text} ± {factor * float(np.std(values, ddof=1)):{form}}" if spread else text)
    return row


def marks(runs: Sequence[Run]) -> str:
    """What a reader must know before comparing the row: kept images, unfinished runs, how it was tuned."""
    notes = ["keeps old images"] if runs[0]["stores_images"] else []
    unfinished = sum(not run["complete"] for run in runs)
    notes += [f"{unfinished} unfinished"] if unfinished else []
    notes += sorted({f"tuned: {run['chosen_by']}" for run in runs if run["chosen_by"] != "default"})
    return ", ".join(notes)


def table(runs: Sequence[Run], width: int = 80) -> Table:
    """The ranked table of one protocol for a terminal of ``width`` columns."""
    count = len(COLUMNS) if width >= 140 else NARROW
    shown = Table(title=describe(runs[0]), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("learner", no_wrap=True)
    shown.add_column("runs", justify="right", no_wrap=True)
    for _, heading, _, _ in COLUMNS[:count]:
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("note")
    for name, group in by_learner(runs).items():
        shown.add_row(name, str(len(group)), *cells(group)[:count], marks(group))
    return shown


def write_png(runs: Sequence[Run], path: Path) -> None:
    """Accuracy and forgetting curves of one protocol."""
    figures.comparison(by_learner(runs), describe(runs[0])).savefig(path, dpi=150)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fdfdfd; --line: #d5d5d5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #16181c; --line: #3a3d44; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem; display: inline-block; max-width: 100%; }
figure svg { max-width: 100%; height: auto; }
small { opacity: .8; }
"""


def page(groups: Sequence[Sequence[Run]]) -> str:
    """A self-contained HTML page: table, curves and every learner's last accuracy matrix, a section a protocol."""
    parts = ["<h1>Class-incremental learning: comparison</h1>"]
    for runs in groups:
        parts.append(f"<h2>{html.escape(describe(runs[0]))}</h2>")
        learners = by_learner(runs)
        head = "".join(f"<th>{html.escape(h)}</th>" for h in ("learner", "runs", *[c[1] for c in COLUMNS], "note"))
        rows = []
        for name, group in learners.items():
            row = (name, str(len(group)), *cells(group), marks(group))
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
        parts.append(f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>')
        parts.append(f"<figure>{_svg(figures.comparison(learners, ''))}</figure>")
        for name, group in learners.items():
            r = np.array(group[0]["accuracy_matrix"], dtype=float)
            parts.append(f"<figure>{_svg(figures.matrix(r, name))}</figure>")
        backbone = runs[0]["backbone"]
        parts.append(
            "<p><small>Accuracy per image over all classes seen, no task id. Forgetting: best earlier accuracy − now, "
            "mean over earlier tasks. Mean ± standard deviation over class orders and seeds. "
            f"Backbone {html.escape(backbone['name'])}, sha256 {backbone['sha256'][:16]}…. "
            f"The matrices are of {html.escape(Path(group[0]['folder']).name)}.</small></p>"
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>cil: comparison</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def compare(paths: Sequence[Path], out: Path | None = None, width: int = 80) -> tuple[list[Table], list[Path]]:
    """Tables of all runs below ``paths``, and the files written: a PNG a protocol and one page.

    Args:
        paths: Run folders or folders that hold some.
        out: Where to write ``compare.png`` and ``compare.html``; the first path by default.
        width: Columns of the terminal the tables are for.

    Raises:
        RunError: Nothing to compare, or a damaged result.
    """
    groups = by_protocol(results.find(list(paths)))
    out = out or paths[0]
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for i, runs in enumerate(groups):
        written.append(out / (f"compare-{i + 1}.png" if len(groups) > 1 else "compare.png"))
        write_png(runs, written[-1])
    written.append(out / "compare.html")
    written[-1].write_text(page(groups), encoding="utf-8")
    return [table(runs, width) for runs in groups], written
