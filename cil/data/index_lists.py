"""The index files of few-shot streams: which training images each task after the first shows.

The field's files (Tao et al., CVPR 2020; used by CEC, FACT and TEEN) are ``session_1.txt``, ``session_2.txt``, …, one
image per line: a position in the training split (CIFAR-100), or the path of a file (CUB, miniImageNet).
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import numpy as np

from cil.data.source import ImageSource
from cil.errors import DataError, shortened


def read_sessions(folder: Path, source: ImageSource) -> tuple[np.ndarray, ...]:
    """Positions of the images of the tasks 1, 2, …, in the order of the files, int64 each.

    ``session_1.txt`` is not read: the first task has all images of its classes. A path is found by its last two parts,
    the class's folder and the file.

    Raises:
        DataError: There are no such files, a number is missing among them, or a line names no training image.
    """
    found = {
        int(m[1]): file for file in folder.glob("session_*.txt") if (m := re.fullmatch(r"session_(\d+)", file.stem))
    }
    numbers = sorted(number for number in found if number > 1)
    if not numbers or numbers != list(range(2, numbers[-1] + 1)):
        there = [found[number].name for number in numbers] or "no session_2.txt"
        raise DataError(
            f"stream.shots_files: {folder} has {there}; give the folder with session_2.txt, session_3.txt, …"
        )
    names: dict[str, int] = {}
    return tuple(_positions(found[number], source, names) for number in numbers)


def _positions(file: Path, source: ImageSource, names: dict[str, int]) -> np.ndarray:
    positions = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not (entry := line.strip()):
            continue
        if not entry.isdecimal() and not names:
            names |= {_ending(source.describe(i)): i for i in range(len(source))}
        position = int(entry) if entry.isdecimal() else names.get(_ending(entry), len(source))
        if position >= len(source):
            raise DataError(
                f"{file}, line {number}: {shortened(entry)} is not one of the {len(source)} training images; the files "
                "belong to the official training split"
            )
        positions.append(position)
    if len(set(positions)) < len(positions):
        raise DataError(f"{file}: names an image twice; give each image once")
    return np.array(positions, dtype=np.int64)


def _ending(path: str) -> str:
    """The last two parts of a path: the folder and the file."""
    return "/".join(PurePosixPath(path.replace("\\", "/")).parts[-2:])
