"""Labelled images from folders, tar files, arrays and scikit-learn's digits; ``libraries`` has the other datasets.

Every source has a length, labels, images and a fingerprint. Labels are the dataset's own class positions here; a stream
turns them into its order of appearance.

timm's factory finds and indexes the files. Its ``ImageDataset`` is not used to read them: on a broken file it silently
returns the *next* image, and its tar reader is not safe across forked workers. This module reads the files itself,
through timm's index.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from cil.errors import DataError

SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "validation", "eval")}
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
    ) -> None:
        self._read, self.describe, self.fingerprint, self.domains = read, describe, fingerprint, domains
        self.stamp = stamp
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


def folder(path: Path) -> ImageSource:
    """One split from a folder of class folders, or from a tar file laid out the same way.

    Raises:
        DataError: The path does not exist, holds no images, or has an empty class folder, which the message names.
    """
    from timm.data.readers import create_reader

    if not path.exists():
        raise DataError(f"{path}: no such folder or tar file")
    is_tar = path.is_file()
    facts = [path.stat()] if is_tar else []
    try:
        reader: Any
        if is_tar:
            reader, listed = _tar(path, facts[0].st_mtime_ns, facts[0].st_size)
        else:
            reader = create_reader("", str(path))
    except Exception as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from None
    if is_tar:
        samples = [
            (info.name, info.size, target) for (info, _, _), target in zip(reader.samples, reader.targets, strict=True)
        ]
        class_to_idx = reader.class_name_to_idx
    else:
        facts = [Path(file).stat() for file, _ in reader.samples]
        samples = [
            (str(Path(file).relative_to(path)), fact.st_size, target)
            for (file, target), fact in zip(reader.samples, facts, strict=True)
        ]
        class_to_idx = reader.class_to_idx
        listed = {child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")}
    if not samples or (len(class_to_idx) < 2 and not listed):
        raise DataError(
            f"{path}: found {len(samples)} images in {len(class_to_idx)} class folders; expected <class>/<image>"
        )
    with_images = {part for name, _, _ in samples for part in Path(name).parts[:-1]}
    empty = sorted(listed - with_images)
    if empty:
        raise DataError(f"{path}: class folder {empty[0]!r} holds no images; fill or remove it")
    digest = hashlib.sha256()
    for name, size, target in samples:
        digest.update(f"{name}\0{size}\0{target}\n".encode())
    names = [name for name, _ in sorted(class_to_idx.items(), key=lambda item: item[1])]
    return from_reader(
        reader,
        [target for _, _, target in samples],
        names,
        describe=lambda i: f"{path}: {samples[i][0]}" if is_tar else str(path / samples[i][0]),
        fingerprint=digest.hexdigest(),
        stamp=hashlib.sha256(np.array([fact.st_mtime_ns for fact in facts]).tobytes()).hexdigest(),
    )


@lru_cache(maxsize=4)
def _tar(path: Path, mtime_ns: int, size: int) -> tuple[Any, set[str]]:
    """timm's reader of a tar file, and the class folders that are members of the archive.

    Modification time and size are part of the cache's key. Thanks to the cache a second run in this process does not
    read through the whole file again.
    """
    import tarfile

    from timm.data.readers import create_reader

    # The file is reopened for each read (one cheap header), because threads and forked workers would share the position
    # in an open one. Without cache_tarinfo=False timm reads and writes a pickle beside large tars.
    options: dict[str, Any] = {"cache_tarfiles": False, "cache_tarinfo": False}
    reader = create_reader("", str(path), **options)
    with tarfile.open(path) as tar:
        listed = {Path(m.name).name for m in tar.getmembers() if m.isdir() and Path(m.name).name not in ("", ".")}
    return reader, listed


def from_reader(reader: Any, labels: Sequence[int], names: Sequence[str], **facts: Any) -> ImageSource:
    """A source over a reader of timm: position → (open file, …). ``facts`` go to :class:`ImageSource`."""

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
    )


def find_split(root: Path, name: str | None, split: str) -> Path:
    """The folder or tar file of a split below ``root``: ``name``, or else the first of the usual names that exists.

    Raises:
        DataError: None exists; the message lists the names that were tried.
    """
    candidates: Iterable[str] = [name] if name else [n + e for n in SPLIT_FOLDERS[split] for e in ("", ".tar")]
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise DataError(f"data.{split}: {root} holds none of {', '.join(candidates)}; set data.root and data.{split}")
