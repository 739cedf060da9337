"""Terminal output of a run: one line per finished stage, and progress bars below if the output is a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cil import metrics, results
from cil.errors import printable
from cil.results import StageRow


class Display:
    """Progress of one or several runs.

    Args:
        console: Where to print; ``Display(None)`` shows nothing (library use and tests).
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._progress: Progress | None = None

    def __enter__(self) -> Display:
        if self._console is not None:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
                disable=not self._console.is_terminal,
            )
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, text: str) -> None:
        """A line above the bars."""
        if self._console is not None:
            self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def track(self, items: Iterable[Any], description: str, length: int) -> Iterator[Any]:
        """Iterate with a bar and the time left; the bar goes when the loop is over."""
        progress = self._progress  # which may be gone by the time a loop that failed is thrown away
        if progress is None or length <= 1:
            yield from items
            return
        bar = progress.add_task(description, total=length)
        try:
            for item in items:
                yield item
                progress.advance(bar)
        finally:
            progress.remove_task(bar)

    def stage(self, title: str, rows: Sequence[StageRow], stages: int) -> None:
        """The line of a finished stage."""
        r, _, total = results.matrices(rows)
        costs = rows[-1]["costs"]
        forgotten = metrics.forgetting(r)
        self.say(
            f"{title}  stage {len(rows)}/{stages}  accuracy {100 * metrics.seen_accuracy(r, total)[-1]:5.1f} %"
            + (f"  forgetting {100 * forgotten:5.1f}" if len(rows) > 1 else " " * 18)
            + f"  {costs['seconds_learn'] + costs['seconds_test']:6.1f} s"
        )

    def table(self, table: Table) -> None:
        if self._console is not None:
            self._console.print(table)
