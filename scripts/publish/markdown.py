"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    first, *others = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in (head, *rows)]
    return first + "|" + "---|" * len(head) + "\n" + "".join(others)
