"""Which picture is a training picture: as the download says, as lists say, or drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cil.errors import DataError

Placed = list[tuple[str, Path]]
"""(class, picture) of one split."""


@dataclass(frozen=True)
class Split:
    """Training and test pictures, and which way they were found: ``how`` goes into split.json."""

    train: Placed
    test: Placed
    how: str


def pictures(folder: Path) -> list[Path]:
    """Every picture at or below a folder, sorted; timm's file endings, hidden files left out."""
    from timm.data.readers.img_extensions import get_img_extensions

    endings = get_img_extensions(as_set=True)
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in endings and not p.name.startswith("."))


def by_class(root: Path) -> dict[str, list[Path]]:
    """Pictures of each class folder right below ``root``."""
    found = {child.name: pictures(child) for child in sorted(root.iterdir()) if child.is_dir()}
    return {name: files for name, files in found.items() if files}


def placed(root: Path) -> Placed:
    return [(name, file) for name, files in by_class(root).items() for file in files]


def seeded(classes: dict[str, list[Path]], *, share: float, most: int, seed: int) -> Split:
    """A drawn split: round(``share`` × pictures) test pictures, in proportion to the classes, at least one of each.

    Args:
        classes: Pictures of every class.
        share: Of the test pictures among all, in (0, 1).
        most: Classes that are kept; of more, so many are drawn.
        seed: Of the draw. The same names and seed give the same split anywhere.

    Raises:
        DataError: No class, or one with fewer than two pictures.
    """
    random = np.random.RandomState(seed)
    names = sorted(classes)
    if len(names) > most:
        names = sorted(names[i] for i in random.permutation(len(names))[:most])
    sizes = np.array([len(classes[name]) for name in names])
    if len(sizes) == 0 or sizes.min() < 2:
        lonely = names[int(sizes.argmin())] if len(sizes) else "none"
        raise DataError(f"class {lonely!r} has fewer than two pictures, too few to split; is this the whole download?")
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
    """``total`` seats in proportion to ``sizes`` by largest remainders, from 1 to size − 1 each, int64 [C].

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
    """The split that lists of files give.

    A line is a picture's path below ``root``, its class the folder it lies in; or a path, a tab or space, and a class.
    Without a test list the other pictures of the listed classes are the test pictures.

    Raises:
        DataError: A list that cannot be read or is empty, or a line that names no picture (with its number).
    """
    train_part = _read(root, train)
    if test is not None:
        return Split(train_part, _read(root, test), "list")
    taken = {file.resolve() for _, file in train_part}
    classes = {name for name, _ in train_part}
    rest = [(f.parent.name, f) for f in pictures(root) if f.parent.name in classes and f.resolve() not in taken]
    return Split(train_part, rest, "list")


def _read(root: Path, file: Path) -> Placed:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: this list cannot be read ({error})") from None
    found = [_line(root, f"{file}: line {n}", line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{file}: this list is empty")
    return found


def _line(root: Path, where: str, line: str) -> tuple[str, Path]:
    mark = "\t" if "\t" in line else " "
    before, _, after = line.rpartition(mark)
    tries: list[tuple[str, str | None]] = [(before.strip(), after)] if before else []
    if mark == " ":  # which may also be part of a picture's name
        tries.insert(0, (line, None))
    for path, given in tries:
        picture = root / path
        if ".." in Path(path).parts or Path(path).is_absolute():
            raise DataError(f"{where}: {path!r} leads outside {root}")
        if picture.is_file():
            name = picture.parent.name if given is None else given
            if name in ("", ".", "..") or "/" in name or "\\" in name:
                raise DataError(f"{where}: {name!r} cannot be a class; its name becomes a folder's")
            return name, picture
    raise DataError(f"{where}: {line!r} is no picture below {root}")


def classes_of(part: Iterable[tuple[str, Path]]) -> set[str]:
    return {name for name, _ in part}


def check(name: str, split: Split, expected: Sequence[int], allow: bool) -> bool:
    """Whether the split has the expected (classes, training pictures, test pictures).

    Raises:
        DataError: It has not and ``allow`` is False, or training and test classes differ, or a picture is in both.
    """
    odd = classes_of(split.train) ^ classes_of(split.test)
    if odd:
        raise DataError(f"{name}: class {min(odd)!r} is not in both splits, as every class must be")
    both = {f.resolve() for _, f in split.train} & {f.resolve() for _, f in split.test}
    if both:
        raise DataError(f"{name}: {min(both)} would be a training and a test picture")
    found = (len(classes_of(split.train)), len(split.train), len(split.test))
    if found == tuple(expected):
        return True
    if allow:
        return False
    told = [f"{c} classes, {n} training and {t} test pictures" for c, n, t in (found, tuple(expected))]
    raise DataError(
        f"{name}: {told[0]}; the published split has {told[1]}. Is the download whole? --allow-counts takes it as it is"
    )
