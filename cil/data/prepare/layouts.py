"""Reads the layouts of the original downloads, each into a split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from cil.data.folder import reason_to_skip
from cil.data.prepare.known import Benchmark
from cil.data.prepare.split import Placed, Split, by_class, placed, seeded
from cil.data.prepare.unpack import below
from cil.errors import DataError

SplitWanted = Literal["auto", "official", "seeded"]
CIFAR_BYTES = 2 + 3 * 32 * 32
"""Bytes of an image in CIFAR-100's binary files: coarse label, fine label, then red, green and blue, row by row."""


def ready_made(root: Path) -> Split | None:
    """The split of a folder that already has ``train`` and ``test`` (or ``val``) folders of classes, else None."""
    for test in ("test", "val"):
        home = below(root, ("train", test))
        if home is not None and (home / "train").is_dir() and by_class(home / "train"):
            return Split(placed(home / "train"), placed(home / test), "as given")
    return None


def cub(root: Path, benchmark: Benchmark, wanted: SplitWanted, seed: int) -> Split:
    """CUB-200-2011 from ``images.txt`` and, for the official split, ``train_test_split.txt``.

    Raises:
        DataError: A file is missing, or two files disagree.
    """
    needed = ["images.txt", "images", *(["train_test_split.txt"] if wanted == "official" else [])]
    home = below(root, needed)
    if home is None:
        raise DataError(f"{root}: no folder with {', '.join(needed)} there; is this {benchmark.original}?")
    files = {n: home / "images" / name for n, name in _numbered(home / "images.txt")}
    missing = [file for file in files.values() if not file.is_file()]
    if missing:
        raise DataError(f"{home / 'images.txt'}: {missing[0]} is missing ({len(missing)} of {len(files)} images)")
    if wanted == "official":
        training = dict(_numbered(home / "train_test_split.txt"))
        if training.keys() != files.keys() or not set(training.values()) <= {"0", "1"}:
            raise DataError(f"{home / 'train_test_split.txt'}: does not have a 0 or 1 for every image of images.txt")
        parts: dict[str, Placed] = {"1": [], "0": []}
        for n, file in files.items():
            parts[training[n]].append((file.parent.name, file))
        return Split(parts["1"], parts["0"], "official")
    classes: dict[str, list[Path]] = {}
    for file in files.values():
        classes.setdefault(file.parent.name, []).append(file)
    return draw_split(classes, benchmark, seed)


def _numbered(file: Path) -> list[tuple[str, str]]:
    lines = [line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(len(line) != 2 for line in lines):
        raise DataError(f"{file}: every line must be a number and a value")
    return [(n, value.strip()) for n, value in lines]


def class_folders(root: Path) -> Path:
    """The folder whose subfolders are the classes: the first at or below ``root`` that has more than one subfolder.

    Raises:
        DataError: Fewer than two of its subfolders hold images.
    """
    home = root
    for _ in range(3):
        inner = [child for child in sorted(home.iterdir()) if child.is_dir() and not reason_to_skip(child.name)]
        if len(inner) != 1:
            break
        home = inner[0]
    if len(by_class(home)) < 2:
        raise DataError(f"{root}: no class folders with images there; expected <class>/<image> or train/ and test/")
    return home


def objectnet_images(root: Path) -> Path:
    """ObjectNet's folder ``images``. Its folder names remain the class names, because published class orders are
    positions in their sorted list."""
    home = below(root, ("images", "mappings"))
    return home / "images" if home is not None else class_folders(root)


def draw_split(classes: dict[str, list[Path]], benchmark: Benchmark, seed: int) -> Split:
    """A split drawn from ``seed`` with the benchmark's number of classes and share of test images."""
    share = benchmark.test / (benchmark.train + benchmark.test)
    return seeded(classes, share=share, most=benchmark.classes, seed=seed)


def cifar(root: Path) -> Iterator[tuple[str, str, str, Image.Image]]:
    """CIFAR-100 from its binary files: yields (split, class, file name, image); a name is the position in the file.

    Raises:
        DataError: It is another version of CIFAR, or a file is missing or has a wrong length or label.
    """
    home = below(root, ("train.bin", "test.bin", "fine_label_names.txt"))
    if home is None:
        if below(root, ("train", "test", "meta")) is not None:
            raise DataError(
                f"{root}: this is CIFAR-100's Python version, which is pickled; give cifar-100-binary.tar.gz instead"
            )
        raise DataError(f"{root}: no train.bin, test.bin, fine_label_names.txt there; give cifar-100-binary.tar.gz")
    names = (home / "fine_label_names.txt").read_text(encoding="utf-8").split()
    if names != sorted(names):
        raise DataError(f"{home / 'fine_label_names.txt'}: not in alphabetical order, as class folders are")
    for split in ("train", "test"):
        raw = np.fromfile(home / f"{split}.bin", dtype=np.uint8)
        if len(raw) == 0 or len(raw) % CIFAR_BYTES:
            raise DataError(f"{home / split}.bin: {len(raw)} bytes are not images of {CIFAR_BYTES} bytes each")
        rows = raw.reshape(-1, CIFAR_BYTES)
        if rows[:, 1].max() >= len(names):
            raise DataError(f"{home / split}.bin: label {rows[:, 1].max()}, but there are {len(names)} names")
        for i, row in enumerate(rows):
            image = Image.fromarray(np.ascontiguousarray(row[2:].reshape(3, 32, 32).transpose(1, 2, 0)))
            yield split, names[row[1]], f"{i:05d}.png", image
