"""The ranked table on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from cil.errors import printable
from cil.report.columns import COLUMNS, Column
from cil.report.comparison import Comparison
from cil.report.protocols import format_differences

TITLE_WIDTH = 32  # characters of a learner and its settings before they wrap


def cells(compared: Comparison, columns: Sequence[Column]) -> list[list[str]]:
    """The table as texts: a heading, then one row per setting, each with learner, runs, the columns, and a note."""
    head = ["learner", "runs", *(column.title(compared.baseline) for column in columns), "note"]
    return [[printable(cell) for cell in head]] + [
        [
            printable(row.title),
            str(len(row.runs)),
            *(column.cell(row, compared.baseline) for column in columns),
            printable(row.note()),
        ]
        for row in compared.rows
    ]


def table(
    compared: Comparison, columns: Sequence[Column] = COLUMNS, width: int | None = None, *, numbered: bool = False
) -> Table:
    """The ranked table of one protocol.

    Args:
        compared: The comparison.
        columns: Its columns, the most important first.
        width: Characters per line; columns that do not fit are omitted, and the caption lists them. None: no limit.
        numbered: Whether the title begins with the number of the protocol.
    """
    available = compared.shown(columns)
    head, *body = cells(compared, available)
    count = len(available)
    if width is not None:
        while count > 1 and _least([_without(row, count) for row in (head, *body)]) > width:
            count -= 1
    head, *body = [_without(row, count) for row in (head, *body)]
    rendered = Table(title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rendered.pad_edge = rendered.show_edge = False
    title = max(cell_len(row[0]) for row in (head, *body))
    title = title if width is None else min(title, TITLE_WIDTH)
    rendered.add_column(head[0], width=title, overflow="fold")
    for heading in head[1:-1]:
        rendered.add_column(Text(heading), justify="right", no_wrap=True)
    notes = any(row[-1] for row in body)
    if notes:
        rendered.add_column(head[-1], min_width=_longest_word(body))
    for row in body:
        rendered.add_row(*map(Text, row if notes else row[:-1]))
    protocol = printable(compared.title)
    rendered.title = Text(f"{compared.number}. {protocol}" if numbered else protocol)
    lines = (
        [f"not to be ranked with the others: {printable(format_differences(compared.differs))}"]
        if compared.differs
        else []
    )
    if any(column.difference for column in columns) and compared.why_no_differences():
        lines.append(compared.why_no_differences())
    if count < len(available):
        left = ", ".join(column.name for column in available[count:])
        lines.append(f"omitted at {width} characters per line (--columns selects): {left}")
    rendered.caption = Text("\n".join(lines)) if lines else None
    return rendered


def _without(row: list[str], count: int) -> list[str]:
    """A row with only the first ``count`` of its columns, besides learner, runs and note."""
    return [*row[: 2 + count], row[-1]]


def _least(rows: Sequence[Sequence[str]]) -> int:
    """Minimal width of a table in characters: every cell on one line, except learner and note, which may wrap."""
    whole = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    note = _longest_word(rows[1:])
    return min(whole[0], TITLE_WIDTH) + sum(2 + wide for wide in whole[1:-1]) + (2 + note if note else 0)


def _longest_word(rows: Sequence[Sequence[str]]) -> int:
    return max((cell_len(word) for row in rows for word in row[-1].split()), default=0)
