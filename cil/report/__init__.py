"""Compares runs: a table on the terminal, figures, tables as files, and a web page that opens from disk.

The package only reads results, so it imports neither torch nor timm.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from cil.errors import RunError
from cil.report import figures
from cil.report.columns import COLUMNS, NAMED, Column, find_column, select_columns, spread
from cil.report.comparison import Comparison, Filters, compare_runs, rank
from cil.report.export import TABLES, as_csv, check_suffixes, latex, markdown
from cil.report.protocols import by_protocol, describe_protocol, protocol
from cil.report.row import SettingRow, paired, rows
from cil.report.terminal import cells, table
from cil.report.webpage import page
from cil.utils.files import write

__all__ = [
    "COLUMNS",
    "FIGURES",
    "NAMED",
    "TABLES",
    "Column",
    "Comparison",
    "Filters",
    "SettingRow",
    "as_csv",
    "by_protocol",
    "cells",
    "check_suffixes",
    "compare_runs",
    "describe_protocol",
    "find_column",
    "latex",
    "markdown",
    "only",
    "page",
    "paired",
    "protocol",
    "rank",
    "rows",
    "select_columns",
    "spread",
    "table",
    "write",
    "write_figure",
    "write_overview",
    "write_table",
]
FIGURES = (".pdf", ".svg", ".png")


def only(compared: Sequence[Comparison], what: str) -> Comparison:
    """The single comparison, for a table or figure that can show only one.

    Args:
        compared: Comparisons of all protocols.
        what: Name of the table or figure, for the message.

    Raises:
        RunError: There are several; the message says how they differ and how to select one.
    """
    if len(compared) > 1:
        titles = "; ".join(f"{one.number}. {one.title}" for one in compared)
        raise RunError(
            f"{what}: runs of {len(compared)} protocols are not ranked together, they differ in "
            f"{', '.join(compared[0].differs)}; select one with --protocol, or give only its folder: {titles}"
        )
    return compared[0]


def write_table(compared: Comparison, path: Path, columns: Sequence[Column] = COLUMNS) -> Path:
    """Write a table as CSV, Markdown or LaTeX, depending on the suffix; returns the path."""
    return write(path, TABLES[path.suffix](compared, columns))


def write_figure(compared: Comparison, path: Path) -> Path:
    """Write the curves of accuracy and forgetting for a paper as PDF, SVG or PNG; returns the path."""
    return write(path, figures.paper(_groups(compared), path.suffix.removeprefix(".")))


def write_overview(compared: Sequence[Comparison], out: Path, columns: Sequence[Column] = COLUMNS) -> list[Path]:
    """Write one figure per protocol and one page about all to the folder ``out``; returns their paths."""
    paths = []
    for one in compared:
        buffer = io.BytesIO()
        figures.comparison(_groups(one), one.title).savefig(buffer, dpi=150)
        name = f"compare-{one.number}.png" if len(compared) > 1 else "compare.png"
        paths.append(write(out / name, buffer.getvalue()))
    return [*paths, write(out / "compare.html", page(compared, columns))]


def _groups(compared: Comparison) -> dict[str, list[dict]]:
    return {row.title: list(row.runs) for row in compared.rows}
