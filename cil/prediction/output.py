"""Writes predictions as JSON, JSON lines or CSV, image by image; the file appears when it is complete."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cil.errors import DataError, printable
from cil.utils.files import remove_leftovers, replacing, reporting

if TYPE_CHECKING:
    from cil.prediction.model import Ranked

Add = Callable[[Path, "Ranked"], None]


@contextmanager
def _json(file: TextIO, columns: int, known: bool) -> Iterator[Add]:
    """A list of {"path": …, "classes": [{"class": …, "score": …}, …]}, one image per line; "known" follows the path."""
    before = "[\n"

    def add(path: Path, ranked: Ranked) -> None:
        nonlocal before
        file.write(before + _object(path, ranked))
        before = ",\n"

    yield add
    file.write("[]\n" if before == "[\n" else "\n]\n")


@contextmanager
def _json_lines(file: TextIO, columns: int, known: bool) -> Iterator[Add]:
    """The same objects without a list around them, one per line."""
    yield lambda path, ranked: print(_object(path, ranked), file=file)


@contextmanager
def _csv(file: TextIO, columns: int, known: bool) -> Iterator[Add]:
    """A table path, known (if asked), class_1, score_1, class_2, … with a header; quoted as in RFC 4180, and control
    characters in names are escaped, as on a terminal."""
    writer = csv.writer(file)
    writer.writerow(
        ["path", *["known"] * known, *[f"{what}_{i}" for i in range(1, columns + 1) for what in ("class", "score")]]
    )
    yield lambda path, ranked: writer.writerow(
        [
            path,
            *([str(ranked.known).lower()] if known else []),
            *[cell for name, score in ranked for cell in (printable(name), score)],
        ]
    )


FORMATS: dict[str, Callable[[TextIO, int, bool], AbstractContextManager[Add]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv,
}


def check_output(file: Path) -> None:
    """Check that a file can be written, before any work is done.

    Raises:
        DataError: The suffix is not that of a format, or the folder does not exist.
    """
    if file.suffix.lower() not in FORMATS:
        raise DataError(f"{file}: predictions are written as {', '.join(FORMATS)}, not {file.suffix or 'without one'}")
    if not file.parent.is_dir() or file.is_dir():
        raise DataError(f"{file}: {'is a folder' if file.is_dir() else f'there is no folder {file.parent}'}")


@contextmanager
def open_writer(file: Path, columns: int, known: bool = False) -> Iterator[Add]:
    """Yields a function that adds the classes of an image; ``file`` is replaced when the block ends without an error.

    Args:
        file: The file to write; its suffix decides the format.
        columns: Number of classes per image, for the header of a table.
        known: Whether the images say if they look like a known class, for a column of a table.

    Raises:
        DataError: As :func:`check_output` raises it, or the disk is full or not writable.
    """
    check_output(file)
    remove_leftovers(file)
    with (
        reporting(file, "What was there stays", error=DataError),
        replacing(file) as half,
        half.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream,
        FORMATS[file.suffix.lower()](stream, columns, known) as add,
    ):
        yield add


def _object(path: Path, ranked: Ranked) -> str:
    classes: list[dict[str, Any]] = [
        {"class": name, "score": score if math.isfinite(score) else None} for name, score in ranked
    ]
    known = {} if getattr(ranked, "known", None) is None else {"known": ranked.known}
    return json.dumps({"path": str(path), **known, "classes": classes}, ensure_ascii=False, allow_nan=False)
