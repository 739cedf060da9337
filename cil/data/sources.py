"""Labelled images from folders, tar files, arrays and scikit-learn's digits; ``libraries`` has the other datasets.

Every source has a length, labels, images and a fingerprint. Labels are the dataset's own class positions here; a stream
turns them into its order of appearance.

:mod:`cil.data.folder` and :mod:`cil.data.archive` find the files. timm's ``ImageDataset`` is not used to read them,
because on a broken file it silently returns the *next* image.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from cil.data.archive import TarImages, scan_tar
from cil.data.classes import index
from cil.data.folder import Findings, FolderImages, printable, scan_folder
from cil.errors import DataError

UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError)
"""What PIL raises on files that are not images or are broken; SyntaxError comes from PNG chunks."""


class ImageSource:
    """Labelled images, decoded one at a time.

    Args:
        read: Position → RGB image of PIL. May raise OSError or UnidentifiedImageError; must be thread-safe.
        labels: Class position of every image, int64 [N].
        class_names: Names in the order of the class positions.
        describe: Position → name of the image in messages (its path, if it has one).
        fingerprint: Hex digest that changes when images or labels change.
        domains: Domain of every image, int64 [N], for domain-incremental streams.
        stamp: Text that changes whenever the files may have changed, also where a fingerprint made from names and
            sizes stays the same. It depends on this machine and is not part of a run's identity.
        findings: What each folder or archive behind the images holds beside them.

    Raises:
        DataError: A class has no images.
    """

    def __init__(
        self,
        read: Callable[[int], Image.Image],
        labels: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        *,
        describe: Callable[[int], str],
        fingerprint: str,
        domains: np.ndarray | None = None,
        stamp: str = "",
        findings: Sequence[Findings] = (),
    ) -> None:
        self._read, self.describe, self.fingerprint, self.domains = read, describe, fingerprint, domains
        self.stamp, self.findings = stamp, tuple(findings)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = tuple(str(name) for name in class_names)
        empty = sorted(set(range(len(self.class_names))) - set(self.labels.tolist()))
        if empty:
            raise DataError(f"class {self.class_names[empty[0]]!r} has no images; add some or remove the class")

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        """The RGB image at a position in 0…N−1.

        Raises:
            DataError: The file is truncated or not an image; the message names it.
        """
        try:
            return self._read(index)
        except UNREADABLE as error:
            raise DataError(
                f"{self.describe(index)}: not a readable image ({type(error).__name__}); "
                "repair or remove it, or set data.on_error=skip"
            ) from None

    def read_or_none(self, index: int) -> Image.Image | None:
        """The image at a position, or None where :meth:`read` would raise."""
        try:
            return self.read(index)
        except DataError:
            return None


def from_arrays(images: np.ndarray, labels: Sequence[int] | np.ndarray, class_names: Sequence[str]) -> ImageSource:
    """A source from uint8 arrays.

    Args:
        images: uint8 [N, H, W] (grey) or [N, H, W, 3] (RGB).
        labels: Class positions, [N].
        class_names: One name per class.

    Raises:
        DataError: The images are not uint8 of such a shape, or their number is not that of the labels.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels):
        raise DataError(
            "images must be uint8 [N, H, W] or [N, H, W, 3] with N labels; "
            f"got {images.dtype} {images.shape} and {len(labels)} labels"
        )
    digest = hashlib.sha256(
        images.tobytes() + np.asarray(labels, np.int64).tobytes() + repr(list(class_names)).encode()
    )
    return ImageSource(
        lambda i: Image.fromarray(images[i]).convert("RGB"),
        labels,
        class_names,
        describe=lambda i: f"image {i}",
        fingerprint=digest.hexdigest(),
    )


def rank_in_class(labels: np.ndarray) -> np.ndarray:
    """How many items of the same class come before each item, int64 [N]."""
    rank = np.zeros(len(labels), dtype=np.int64)
    for c in np.unique(labels):
        rank[labels == c] = np.arange((labels == c).sum())
    return rank


def digits(split: str) -> ImageSource:
    """scikit-learn's 1,797 handwritten digits (8×8, ten classes), the embedded dataset.

    They come without a split, so every fourth image of each class is a test image here.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    members = np.flatnonzero((rank_in_class(labels) % 4 == 3) == (split == "test"))
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return from_arrays(images[members], labels[members], names)


def folder(path: Path, place: str = "", not_taken: Sequence[str] = ()) -> ImageSource:
    """One split from a folder of class folders, or from a tar file laid out the same way.

    Args:
        path: The folder or tar file.
        place: Its name below ``data.root``, for the findings.
        not_taken: Further names of the split that exist there, for the findings.

    Raises:
        DataError: The path does not exist, is no plain tar file, or has no class folders, an empty one or several
            splits; the message names it.
    """
    if not path.exists():
        raise DataError(f"{printable(path)}: no such folder or tar file")
    is_tar = path.is_file()
    fact = path.stat()
    scan = scan_tar(path, fact.st_mtime_ns, fact.st_size) if is_tar else scan_folder(path)
    found = index(scan, printable(path))
    digest = hashlib.sha256()
    for entry, label in zip(found.images, found.labels, strict=True):
        digest.update(f"{entry.written}\0{entry.size}\0{label}\n".encode("utf-8", "surrogateescape"))
    changed = [fact.st_mtime_ns] if is_tar else [entry.changed for entry in found.images]
    return from_reader(
        TarImages(path, found.images) if is_tar else FolderImages(path, found.images),
        found.labels,
        found.class_names,
        describe=lambda i: printable(f"{path}: {found.images[i].name}" if is_tar else path / found.images[i].name),
        fingerprint=digest.hexdigest(),
        stamp=hashlib.sha256(np.array(changed).tobytes()).hexdigest(),
        findings=(replace(found.findings, place=place, not_taken=tuple(not_taken)),),
    )


def from_reader(reader: Any, labels: Sequence[int], names: Sequence[str], **facts: Any) -> ImageSource:
    """A source over a reader as timm's: position → (open file, …). ``facts`` go to :class:`ImageSource`."""

    def read(index: int) -> Image.Image:
        file, *_ = reader[index]
        with file:
            return Image.open(io.BytesIO(file.read())).convert("RGB")

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

    def read(index: int) -> Image.Image:
        part, inner = locate(index)
        return part._read(inner)

    def describe(index: int) -> str:
        part, inner = locate(index)
        return part.describe(inner)

    return ImageSource(
        read,
        np.concatenate(labels),
        names,
        describe=describe,
        fingerprint=hashlib.sha256("".join(p.fingerprint for p in parts).encode()).hexdigest(),
        domains=np.repeat(np.arange(len(parts)), [len(p) for p in parts]),
        stamp=" ".join(p.stamp for p in parts),
        findings=[found for p in parts for found in p.findings],
    )
