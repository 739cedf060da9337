"""Labelled images from folders, tar files, CSV files and scikit-learn's digits; other modules have the others.

:mod:`cil.data.folder` and :mod:`cil.data.archive` find the files. timm's ``ImageDataset`` is not used to read them,
because on a broken file it silently returns the *next* image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cil.data.archive import TarImages, scan_tar
from cil.data.arrays import from_arrays
from cil.data.classes import index
from cil.data.folder import FolderImages, as_text, scan_folder
from cil.data.listing import listed
from cil.data.pixels import Undecoded
from cil.data.source import ImageSource
from cil.errors import DataError


def rank_in_class(labels: np.ndarray) -> np.ndarray:
    """How many items of the same class come before each item, int64 [N]."""
    rank = np.zeros(len(labels), dtype=np.int64)
    for c in np.unique(labels):
        rank[labels == c] = np.arange((labels == c).sum())
    return rank


def digits(split: str) -> ImageSource:
    """scikit-learn's 1,797 handwritten digits (8×8, ten classes), the embedded dataset.

    They come without a split, so every fourth image of each class is a test image here. Their file (64 pixels from 0 to
    16 and a class per line) is read from the installed package, whose own function takes a second to import.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError(
            "data.dataset: digits comes with scikit-learn, which is not installed: pip install scikit-learn"
        )
    rows = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    pixels, labels = rows[:, :64], rows[:, 64].astype(np.int64)
    images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    members = np.flatnonzero((rank_in_class(labels) % 4 == 3) == (split == "test"))
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return from_arrays(images[members], labels[members], names)


def folder(path: Path, place: str = "", not_taken: Sequence[str] = ()) -> ImageSource:
    """One split from a folder of class folders, from a tar file laid out the same way, or from a CSV file.

    Args:
        path: The folder, tar file, or CSV file with lines ``path,label``.
        place: Its name below ``data.root``, for the findings.
        not_taken: Further names of the split that exist there, for the findings.

    Raises:
        DataError: The path does not exist, is no plain tar file, or has no class folders, an empty one or several
            splits; the message names it.
    """
    if not path.exists():
        raise DataError(f"{as_text(path)}: no such folder, tar file or CSV file")
    if path.suffix.lower() == ".csv" and path.is_file():
        return listed(path)
    is_tar = path.is_file()
    fact = path.stat()
    scan = scan_tar(path, fact.st_mtime_ns, fact.st_size) if is_tar else scan_folder(path)
    found = index(scan, as_text(path))
    digest = hashlib.sha256()
    for entry, label in zip(found.images, found.labels, strict=True):
        digest.update(f"{entry.written}\0{entry.size}\0{label}\n".encode("utf-8", "surrogateescape"))

    def identify(i: int) -> bytes:
        entry = found.images[i]
        name = found.class_names[found.labels[i]]
        return f"{name}\0{entry.written}\0{entry.size}".encode("utf-8", "surrogateescape")

    changed = [fact.st_mtime_ns] if is_tar else [entry.changed for entry in found.images]
    return from_reader(
        TarImages(path, found.images) if is_tar else FolderImages(path, found.images),
        found.labels,
        found.class_names,
        describe=lambda i: as_text(f"{path}: {found.images[i].name}" if is_tar else path / found.images[i].name),
        fingerprint=digest.hexdigest(),
        stamp=hashlib.sha256(np.array(changed).tobytes()).hexdigest(),
        identify=identify,
        findings=(replace(found.findings, place=place, not_taken=tuple(not_taken)),),
    )


def from_reader(reader: Any, labels: Sequence[int] | np.ndarray, names: Sequence[str], **facts: Any) -> ImageSource:
    """A source over a reader as timm's: position → (open file, …). ``facts`` go to :class:`ImageSource`."""

    def read(index: int) -> bytes:
        file, *_ = reader[index]
        with file:
            return file.read()

    return ImageSource(read, labels, names, **facts)


def combine_domains(parts: Sequence[ImageSource]) -> ImageSource:
    """Joins sources of the same classes, one per domain, into one source that records each image's domain.

    Raises:
        DataError: The sources do not have the same classes.
    """
    names = parts[0].class_names
    for part in parts[1:]:
        if set(part.class_names) != set(names):
            odd = sorted(set(part.class_names) ^ set(names))
            raise DataError(f"domains must have the same classes; {odd[:5]} are not in all of them")
    labels = [np.array([names.index(n) for n in p.class_names], dtype=np.int64)[p.labels] for p in parts]
    starts = np.cumsum([0, *[len(p) for p in parts]])

    def locate(index: int) -> tuple[ImageSource, int]:
        d = int(np.searchsorted(starts, index, side="right")) - 1
        return parts[d], index - int(starts[d])

    def read(index: int) -> Undecoded:
        part, inner = locate(index)
        return part._read(inner)

    def describe(index: int) -> str:
        part, inner = locate(index)
        return part.describe(inner)

    def identify(index: int) -> bytes:
        part, inner = locate(index)
        return part.identify(inner) if part.identify is not None else part.fingerprint.encode()

    return ImageSource(
        read,
        np.concatenate(labels),
        names,
        describe=describe,
        fingerprint=hashlib.sha256("".join(p.fingerprint for p in parts).encode()).hexdigest(),
        domains=np.repeat(np.arange(len(parts)), [len(p) for p in parts]),
        stamp=" ".join(p.stamp for p in parts),
        identify=identify,
        findings=[found for p in parts for found in p.findings],
    )
