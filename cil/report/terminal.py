"""The ranked table on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from cil.report.columns import COLUMNS, Column
from cil.report.comparison import Comparison
from cil.report.protocols import told

TITLE_WIDTH = 32  # characters of a learner and its settings before they wrap


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
    head, *body = cells(compared, wanted)
    count = len(wanted)
    if width is not None:
        while count > 1 and _least([_without(row, count) for row in (head, *body)]) > width:
            count -= 1
    head, *body = [_without(row, count) for row in (head, *body)]
    shown = Table(title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.pad_edge = shown.show_edge = False
    title = max(cell_len(row[0]) for row in (head, *body))
    title = title if width is None else min(title, TITLE_WIDTH)
    shown.add_column(head[0], width=title, overflow="fold")
    for heading in head[1:-1]:
        shown.add_column(Text(heading), justify="right", no_wrap=True)
    notes = any(row[-1] for row in body)
    if notes:
        shown.add_column(head[-1], min_width=_longest_word(body))
    for row in body:
        shown.add_row(*map(Text, row if notes else row[:-1]))
    shown.title = Text(f"{compared.number}. {compared.title}" if numbered else compared.title)
    lines = [f"not to be ranked with the others: {told(compared.differs)}"] if compared.differs else []
    if any(column.difference for column in columns) and compared.why_no_differences():
        lines.append(compared.why_no_differences())
    if count < len(wanted):
        left = ", ".join(column.name for column in wanted[count:])
        lines.append(f"left out at {width} characters a line (--columns picks): {left}")
    shown.caption = Text("\n".join(lines)) if lines else None
    return shown


def _without(row: list[str], count: int) -> list[str]:
    """A row with the first ``count`` of its columns: learner and runs before them, the note behind."""
    return [*row[: 2 + count], row[-1]]


def _least(rows: Sequence[Sequence[str]]) -> int:
    """Characters a table needs: every cell on one line but for the learner and the note, which may wrap."""
    whole = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    note = _longest_word(rows[1:])
    return min(whole[0], TITLE_WIDTH) + sum(2 + wide for wide in whole[1:-1]) + (2 + note if note else 0)


def _longest_word(rows: Sequence[Sequence[str]]) -> int:
    return max((cell_len(word) for row in rows for word in row[-1].split()), default=0)
