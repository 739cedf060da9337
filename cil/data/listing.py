"""Labelled images from a CSV file with one line ``path,label`` per image."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

from cil.data.folder import as_text, in_order
from cil.data.source import ImageSource
from cil.errors import DataError, clipped

HEADER = ("path", "label")


def listed(file: Path) -> ImageSource:
    """The images that a CSV file lists, in its order; their classes are in natural order.

    Paths are relative to the file's folder. A first line ``path,label`` is taken for a header.

    Raises:
        DataError: The file is no UTF-8 text, lists no image, or a line has no path or label, names a file that does not
            exist, or repeats one; the message names the line.
    """
    shown = as_text(file)
    try:
        rows = list(csv.reader(file.read_text(encoding="utf-8-sig").splitlines(), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{shown}: cannot be read as a CSV file in UTF-8 ({' '.join(str(error).split())})") from None
    lines = {number: [cell.strip() for cell in row] for number, row in enumerate(rows, 1) if any(row)}
    if lines and tuple(cell.lower() for cell in next(iter(lines.values()))) == HEADER:
        del lines[next(iter(lines))]
    if not lines:
        raise DataError(f"{shown}: lists no images; write one line path,label per image")
    known: dict[Path, int] = {}
    for number, row in lines.items():
        if len(row) != 2 or not all(row):
            raise DataError(f"{shown}, line {number}: expected path,label, got {clipped(','.join(row))!r}")
        place = file.parent / row[0]
        if not place.is_file():
            raise DataError(f"{shown}, line {number}: there is no file {as_text(place)}")
        if place in known:
            raise DataError(f"{shown}, line {number}: lists {clipped(row[0])} again, after line {known[place]}")
        known[place] = number
    paths, labels = list(known), [row[1] for row in lines.values()]
    names = in_order(set(labels))
    identities = [
        f"{label}\0{row[0]}\0{path.stat().st_size}".encode("utf-8", "surrogateescape")
        for path, label, row in zip(paths, labels, lines.values(), strict=True)
    ]
    changed = [path.stat().st_mtime_ns for path in paths]
    return ImageSource(
        lambda i: paths[i],
        [names.index(label) for label in labels],
        names,
        describe=lambda i: as_text(paths[i]),
        fingerprint=hashlib.sha256(b"\n".join(identities)).hexdigest(),
        stamp=hashlib.sha256(repr(changed).encode()).hexdigest(),
        identify=lambda i: identities[i],
    )
