"""Tables as files: CSV with one unrounded row per run, and the ranked table as Markdown or LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cil.errors import RunError, printable
from cil.report.columns import COLUMNS, Column
from cil.report.comparison import Comparison
from cil.report.protocols import Run
from cil.report.row import SettingRow, order_of, seed_of
from cil.report.terminal import cells


def markdown(compared: Comparison, columns: Sequence[Column] = COLUMNS) -> str:
    """The ranked table as GitHub-flavoured Markdown."""
    head, *body = cells(compared, compared.shown(columns))
    divider = "|" + "---|" * len(head) + "\n"
    return _line(head) + divider + "".join(map(_line, body))


def _line(row: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n"


LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    "≥": r"$\geq$",
    "…": r"\ldots{}",
}


def latex_text(text: str) -> str:
    """Text escaped for LaTeX; a hyphen before a digit becomes a minus sign."""
    escaped = "".join(LATEX.get(char, char) for char in text)
    return f"$-${escaped[1:]}" if text[:1] == "-" and text[1:2].isdigit() else escaped


def latex(compared: Comparison, columns: Sequence[Column] = COLUMNS) -> str:
    """The ranked table as a ``tabular`` for booktabs."""
    head, *body = cells(compared, compared.shown(columns))
    if not any(row[-1] for row in body):
        head, body = head[:-1], [row[:-1] for row in body]
    notes = head[-1] == "note"
    lines = [" & ".join(map(latex_text, row)) + r" \\" for row in (head, *body)]
    places = "lr" + "r" * (len(head) - 2 - notes) + "l" * notes
    return "\n".join(
        [
            f"% {printable(compared.title)}",
            r"% \usepackage{booktabs}",
            rf"\begin{{tabular}}{{{places}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _record(row: SettingRow, run: Run) -> dict[str, Any]:
    """One run as a flat record: its identity, its whole summary, and accuracy and forgetting after every stage."""
    versions = run["versions"]
    record = {
        "benchmark": run["config"]["name"],
        "row": row.title,
        "learner": run["learner"],
        "order": order_of(run),
        "seed": seed_of(run),
        "complete": run["complete"],
        "stages": len(run["stages"]),
        "tasks": len(run["tasks"]),
        **run["summary"],
        "stores_images": run["stores_images"],
        "chosen_by": run["chosen_by"],
        "settings": json.dumps(run["config"]["learners"][0], sort_keys=True),
        "dataset": run["config"]["data"]["dataset"],
        "task_sizes": " ".join(str(len(task)) for task in run["tasks"]),
        "class_order": " ".join(map(str, run["class_order"])),
        "backbone": run["backbone"]["name"],
        "backbone_sha256": run["backbone"]["sha256"],
        "train_sha256": run["data"]["train"]["sha256"],
        "test_sha256": run["data"]["test"]["sha256"],
        "device": run["machine"]["device"],
        "version": versions["cil"],
        "commit": versions.get("commit"),
        "folder": run["folder"],
    }
    for curve in ("accuracy/seen", "forgetting/mean"):
        values = run["curves"][curve]
        values = values + [None] * (len(run["tasks"]) - len(values))  # the same columns for an unfinished run
        record |= {f"{curve}/{i + 1}": value for i, value in enumerate(values)}
    return {key: printable(value) if isinstance(value, str) else value for key, value in record.items()}


def as_csv(compared: Comparison, columns: Sequence[Column] = COLUMNS) -> str:
    """One row per run, with fractions, bytes and seconds as in ``metrics.json``.

    ``columns`` is ignored, because the file contains every number.
    """
    records = [_record(row, run) for row in compared.rows for run in (*row.runs, *row.left_out)]
    names = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


TABLES: dict[str, Callable[[Comparison, Sequence[Column]], str]] = {".csv": as_csv, ".md": markdown, ".tex": latex}


def check_suffixes(option: str, paths: Sequence[Path], known: Sequence[str]) -> None:
    """Check the suffixes of output files.

    Args:
        option: Name of the command-line option, for the message.
        paths: The files.
        known: Allowed suffixes.

    Raises:
        RunError: A suffix is not allowed.
    """
    for path in paths:
        if path.suffix not in known:
            raise RunError(f"{option} {path}: the suffix selects the format; allowed: {', '.join(known)}")
