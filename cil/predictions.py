"""Predictions as a file: JSON, JSON lines or CSV, written image by image and there only once it is whole."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cil.errors import DataError
from cil.files import replacing

if TYPE_CHECKING:
    from cil.prediction import Ranked

Add = Callable[[Path, "Ranked"], None]


@contextmanager
def _json(file: TextIO, columns: int) -> Iterator[Add]:
    """A list of {"path": …, "classes": [{"class": …, "score": …}, …]}, an image a line."""
    before = "[\n"

    def add(path: Path, ranked: Ranked) -> None:
        nonlocal before
        file.write(before + _object(path, ranked))
        before = ",\n"

    yield add
    file.write("[]\n" if before == "[\n" else "\n]\n")


@contextmanager
def _json_lines(file: TextIO, columns: int) -> Iterator[Add]:
    """The same objects, one a line, nothing around them."""
    yield lambda path, ranked: print(_object(path, ranked), file=file)


@contextmanager
def _csv(file: TextIO, columns: int) -> Iterator[Add]:
    """path, class_1, score_1, class_2, …; RFC 4180 quoting, a header."""
    writer = csv.writer(file)
    writer.writerow(["path", *[f"{what}_{i}" for i in range(1, columns + 1) for what in ("class", "score")]])
    yield lambda path, ranked: writer.writerow([path, *[cell for pair in ranked for cell in pair]])


FORMATS: dict[str, Callable[[TextIO, int], AbstractContextManager[Add]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv,
}


def check_output(file: Path) -> None:
    """Refuse a file that could not be written, before the work is done.

    Raises:
        DataError: The suffix names no format, or there is no such folder.
    """
    if file.suffix.lower() not in FORMATS:
        raise DataError(f"{file}: predictions are written as {', '.join(FORMATS)}, not {file.suffix or 'without one'}")
    if not file.parent.is_dir() or file.is_dir():
        raise DataError(f"{file}: {'is a folder' if file.is_dir() else f'there is no folder {file.parent}'}")


@contextmanager
def written(file: Path, columns: int) -> Iterator[Add]:
    """Give the block a function that adds an image's classes; ``file`` is replaced once the block ends without error.

    Args:
        file: Where; the suffix decides the format.
        columns: Classes an image has, for the header of a table.

    Raises:
        DataError: See :func:`check_output`, or the disk is full or not writable.
    """
    check_output(file)
    try:
        with (
            replacing(file) as half,
            half.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream,
            FORMATS[file.suffix.lower()](stream, columns) as add,
        ):
            yield add
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror})") from None


def _object(path: Path, ranked: Ranked) -> str:
    classes: list[dict[str, Any]] = [
        {"class": name, "score": score if math.isfinite(score) else None} for name, score in ranked
    ]
    return json.dumps({"path": str(path), "classes": classes}, ensure_ascii=False, allow_nan=False)
