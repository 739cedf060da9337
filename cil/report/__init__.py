"""Comparing runs: a table on the terminal, figures, tables as files, and a page that opens from disk.

Reads results only, so neither torch nor timm is imported.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from cil import figures
from cil.errors import RunError
from cil.report.columns import COLUMNS, NAMED, Column, chosen, named, spread
from cil.report.comparison import Comparison, Filters, load, rank
from cil.report.export import TABLES, as_csv, check_suffixes, latex, markdown
from cil.report.files import write
from cil.report.protocols import by_protocol, describe, protocol
from cil.report.row import Row, paired, rows
from cil.report.terminal import cells, table
from cil.report.webpage import page

__all__ = [
    "COLUMNS",
    "FIGURES",
    "NAMED",
    "TABLES",
    "Column",
    "Comparison",
    "Filters",
    "Row",
    "as_csv",
    "by_protocol",
    "cells",
    "check_suffixes",
    "chosen",
    "describe",
    "latex",
    "load",
    "markdown",
    "named",
    "only",
    "page",
    "paired",
    "protocol",
    "rank",
    "rows",
    "spread",
    "table",
    "write",
    "write_figure",
    "write_overview",
    "write_table",
]
FIGURES = (".pdf", ".svg", ".png")


def only(compared: Sequence[Comparison], what: str) -> Comparison:
    """The one comparison there is.

    Raises:
        RunError: There are several, which one table or figure must not hold; says what differs and how to pick.
    """
    if len(compared) > 1:
        titles = "; ".join(f"{one.number}. {one.title}" for one in compared)
        raise RunError(
            f"{what}: runs of {len(compared)} protocols are not ranked together, they differ in "
            f"{', '.join(compared[0].differs)}; pick one with --protocol, or give its folder alone: {titles}"
        )
    return compared[0]


def write_table(compared: Comparison, path: Path, columns: Sequence[Column] = COLUMNS) -> Path:
    """A table as CSV, Markdown or LaTeX, as the suffix says."""
    return write(path, TABLES[path.suffix](compared, columns))


def write_figure(compared: Comparison, path: Path) -> Path:
    """Accuracy and forgetting for a paper, as the suffix says."""
    return write(path, figures.paper(_groups(compared), path.suffix.removeprefix(".")))


def write_overview(compared: Sequence[Comparison], out: Path, columns: Sequence[Column] = COLUMNS) -> list[Path]:
    """A picture a protocol and one page about all, below ``out``."""
    written = []
    for one in compared:
        buffer = io.BytesIO()
        figures.comparison(_groups(one), one.title).savefig(buffer, dpi=150)
        name = f"compare-{one.number}.png" if len(compared) > 1 else "compare.png"
        written.append(write(out / name, buffer.getvalue()))
    return [*written, write(out / "compare.html", page(compared, columns))]


def _groups(compared: Comparison) -> dict[str, list[dict]]:
    return {row.title: list(row.runs) for row in compared.rows}
