"""The ranked table on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from cil.report.columns import COLUMNS, Column
from cil.report.comparison import Comparison
from cil.report.protocols import told


def cells(compared: Comparison, columns: Sequence[Column]) -> list[list[str]]:
    """The table as text: a heading, then a row a setting, each with learner, runs, the columns, and a note."""
    head = ["learner", "runs", *(column.title(compared.baseline) for column in columns), "note"]
    return [head] + [
        [row.title, str(len(row.runs)), *(column.cell(row, compared.baseline) for column in columns), row.note()]
        for row in compared.rows
    ]


def table(
    compared: Comparison, columns: Sequence[Column] = COLUMNS, width: int | None = None, *, numbered: bool = False
) -> Table:
    """The ranked table of one protocol.

    Args:
        compared: What to show.
        columns: Its columns, the most important first.
        width: Characters of a line; columns that do not fit are left out, and the caption says which. None: all.
        numbered: Head it with the protocol's number, to be told from others.
    """
    wanted = compared.shown(columns)
    count = len(wanted)
    while count > 1 and width is not None and _least(_build(compared, wanted[:count])) > width:
        count -= 1
    shown = _build(compared, wanted[:count])
    shown.title = f"{compared.number}. {compared.title}" if numbered else compared.title
    lines = [f"not to be ranked with the others: {told(compared.differs)}"] if compared.differs else []
    if any(column.difference for column in columns) and not any(column.difference for column in wanted):
        lines += _why_no_difference(compared)
    if count < len(wanted):
        left = ", ".join(column.name for column in wanted[count:])
        lines.append(f"left out at {width} characters a line (--columns picks): {left}")
    shown.caption = "\n".join(lines) or None
    return shown


def _why_no_difference(compared: Comparison) -> list[str]:
    if compared.baseline is None or len(compared.rows) < 2:
        return []
    return [f"no differences to {compared.baseline.title}: no other finished run shares a class order and seed with it"]


def _build(compared: Comparison, columns: Sequence[Column]) -> Table:
    shown = Table(title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.pad_edge = shown.show_edge = False
    head, *body = cells(compared, columns)
    shown.add_column(head[0], no_wrap=True)
    for heading in head[1:-1]:
        shown.add_column(heading, justify="right", no_wrap=True)
    words = [word for row in body for word in row[-1].split()]
    if words:
        shown.add_column(head[-1], min_width=max(map(len, words)))  # the one column that wraps
    for row in body:
        shown.add_row(*(row if words else row[:-1]))
    return shown


def _least(built: Table) -> int:
    """Characters the table needs at least: all of every cell, of the note its longest word."""
    console = Console(width=10_000)
    whole = [
        max(Measurement.get(console, console.options, cell).maximum for cell in (column.header, *column.cells))
        for column in built.columns
    ]
    if built.columns[-1].min_width is not None:
        whole[-1] = built.columns[-1].min_width
    return sum(whole) + 2 * (len(whole) - 1)
