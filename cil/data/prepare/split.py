"""Splits into training and test images: read from the download, read from lists, or drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cil.data.folder import reason_to_skip, scan_folder
from cil.errors import DataError

Placed = list[tuple[str, Path]]
"""(class, image file) pairs of one half of a split."""


@dataclass(frozen=True)
class Split:
    """Training and test images, and how they were split: ``how`` is recorded in ``split.json``."""

    train: Placed
    test: Placed
    how: str


def image_files(folder: Path) -> list[Path]:
    """Every image file at or below a folder, sorted by path; those that training would read there."""
    return sorted(folder / entry.name for entry in scan_folder(folder).once().images)


def by_class(root: Path) -> dict[str, list[Path]]:
    """Image files of each class folder directly below ``root``, without empty and hidden folders."""
    folders = sorted(child for child in root.iterdir() if child.is_dir() and reason_to_skip(child.name) is None)
    classes = {child.name: image_files(child) for child in folders}
    return {name: files for name, files in classes.items() if files}


def placed(root: Path) -> Placed:
    """(class, image file) of every image in the class folders directly below ``root``."""
    return [(name, file) for name, files in by_class(root).items() for file in files]


def seeded(classes: dict[str, list[Path]], *, share: float, most: int, seed: int) -> Split:
    """A drawn split: round(``share`` × images) test images, in proportion to the class sizes, at least one per class.

    Args:
        classes: Image files of every class.
        share: Fraction of the test images among all images, in (0, 1).
        most: Number of classes to keep; if there are more, this many are drawn.
        seed: Seed of the draw. The same names and seed give the same split on every machine.

    Raises:
        DataError: There is no class, or a class has fewer than two images.
    """
    random = np.random.RandomState(seed)
    names = sorted(classes)
    if len(names) > most:
        names = sorted(names[i] for i in random.permutation(len(names))[:most])
    sizes = np.array([len(classes[name]) for name in names])
    if len(sizes) == 0 or sizes.min() < 2:
        lonely = names[int(sizes.argmin())] if len(sizes) else "none"
        raise DataError(f"class {lonely!r} has fewer than two images, too few to split; is this the whole download?")
    counts = apportioned(sizes, round(share * int(sizes.sum())))
    train_part: Placed = []
    test_part: Placed = []
    for name, count in zip(names, counts.tolist(), strict=True):
        files = sorted(classes[name])
        chosen = set(random.permutation(len(files))[:count].tolist())
        for i, file in enumerate(files):
            (test_part if i in chosen else train_part).append((name, file))
    return Split(train_part, test_part, "seeded")


def apportioned(sizes: np.ndarray, total: int) -> np.ndarray:
    """Shares ``total`` in proportion to ``sizes`` by largest remainders, from 1 to size − 1 each, int64 [C].

    >>> apportioned(np.array([10, 10, 3]), 5).tolist()
    [2, 2, 1]
    """
    total = int(np.clip(total, len(sizes), (sizes - 1).sum()))
    quota = sizes * (total / sizes.sum())
    counts = np.clip(np.floor(quota).astype(np.int64), 1, sizes - 1)
    step = 1 if counts.sum() < total else -1
    while (missing := total - int(counts.sum())) != 0:
        open_ = np.flatnonzero((counts < sizes - 1) if step > 0 else (counts > 1))
        order = np.argsort(-step * (quota - counts)[open_], kind="stable")
        counts[open_[order[: abs(missing)]]] += step
    return counts


def listed(root: Path, train: Path, test: Path | None) -> Split:
    """The split that lists of files define.

    A line is an image's path below ``root``, whose class is its folder; or a path, a tab or space, and a class. Without
    a test list the other images of the listed classes are the test images.

    Raises:
        DataError: A list cannot be read or is empty, or a line, whose number the message gives, names no image.
    """
    train_part = _read(root, train)
    if test is not None:
        return Split(train_part, _read(root, test), "list")
    training = {file.resolve() for _, file in train_part}
    classes = {name for name, _ in train_part}
    rest = [(f.parent.name, f) for f in image_files(root) if f.parent.name in classes and f.resolve() not in training]
    return Split(train_part, rest, "list")


def _read(root: Path, file: Path) -> Placed:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: this list cannot be read ({error})") from None
    part = [_parse_line(root, f"{file}: line {n}", line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    if not part:
        raise DataError(f"{file}: this list is empty")
    return part


def _parse_line(root: Path, where: str, line: str) -> tuple[str, Path]:
    mark = "\t" if "\t" in line else " "
    before, _, after = line.rpartition(mark)
    readings: list[tuple[str, str | None]] = [(before.strip(), after)] if before else []
    if mark == " ":  # a space may also be part of the file's name
        readings.insert(0, (line, None))
    for path, written_class in readings:
        image = root / path
        if ".." in Path(path).parts or Path(path).is_absolute():
            raise DataError(f"{where}: {path!r} leads outside {root}")
        if image.is_file():
            name = image.parent.name if written_class is None else written_class
            if name in ("", ".", "..") or "/" in name or "\\" in name:
                raise DataError(f"{where}: {name!r} cannot be a class, because its name becomes a folder name")
            return name, image
    raise DataError(f"{where}: {line!r} is not an image below {root}")


def classes_of(part: Iterable[tuple[str, Path]]) -> set[str]:
    return {name for name, _ in part}


def check(name: str, split: Split, expected: Sequence[int], allow: bool) -> bool:
    """Whether a split has the expected (classes, training images, test images).

    Raises:
        DataError: It does not and ``allow`` is False, or training and test classes differ, or an image is in both.
    """
    odd = classes_of(split.train) ^ classes_of(split.test)
    if odd:
        raise DataError(f"{name}: class {min(odd)!r} is not in both splits, but every class must be")
    both = {f.resolve() for _, f in split.train} & {f.resolve() for _, f in split.test}
    if both:
        raise DataError(f"{name}: {min(both)} would be a training and a test image")
    counts = (len(classes_of(split.train)), len(split.train), len(split.test))
    if counts == tuple(expected):
        return True
    if allow:
        return False
    sizes = [f"{c} classes, {n} training and {t} test images" for c, n, t in (counts, tuple(expected))]
    raise DataError(
        f"{name}: {sizes[0]}; the published split has {sizes[1]}. Is the download complete? --allow-counts accepts it"
    )
