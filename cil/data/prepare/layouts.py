"""What the original downloads look like, and the split each of them gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from cil.data.prepare.known import Benchmark
from cil.data.prepare.split import Placed, Split, by_class, placed, seeded
from cil.data.prepare.unpack import below
from cil.errors import DataError

SplitWanted = Literal["auto", "official", "seeded"]
CIFAR_BYTES = 2 + 3 * 32 * 32
"""Of a picture in CIFAR-100's binary files: coarse label, fine label, then red, green and blue, row by row."""


def ready_made(root: Path) -> Split | None:
    """The split of a folder that has ``train`` and ``test`` (or ``val``) folders of classes already, else None."""
    for test in ("test", "val"):
        found = below(root, ("train", test))
        if found is not None and (found / "train").is_dir() and by_class(found / "train"):
            return Split(placed(found / "train"), placed(found / test), "as given")
    return None


def cub(root: Path, benchmark: Benchmark, wanted: SplitWanted, seed: int) -> Split:
    """CUB-200-2011 from ``images.txt`` and, for the official split, ``train_test_split.txt``.

    Raises:
        DataError: A file is missing, or two of them disagree.
    """
    needed = ["images.txt", "images", *(["train_test_split.txt"] if wanted == "official" else [])]
    home = below(root, needed)
    if home is None:
        raise DataError(f"{root}: no folder with {', '.join(needed)} there; is this {benchmark.original}?")
    files = {n: home / "images" / name for n, name in _numbered(home / "images.txt")}
    missing = [file for file in files.values() if not file.is_file()]
    if missing:
        raise DataError(f"{home / 'images.txt'}: {missing[0]} is missing ({len(missing)} of {len(files)} pictures)")
    if wanted == "official":
        training = dict(_numbered(home / "train_test_split.txt"))
        if training.keys() != files.keys() or not set(training.values()) <= {"0", "1"}:
            raise DataError(f"{home / 'train_test_split.txt'}: not a 0 or 1 for every picture of images.txt")
        parts: dict[str, Placed] = {"1": [], "0": []}
        for n, file in files.items():
            parts[training[n]].append((file.parent.name, file))
        return Split(parts["1"], parts["0"], "official")
    classes: dict[str, list[Path]] = {}
    for file in files.values():
        classes.setdefault(file.parent.name, []).append(file)
    return drawn(classes, benchmark, seed)


def _numbered(file: Path) -> list[tuple[str, str]]:
    lines = [line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(len(line) != 2 for line in lines):
        raise DataError(f"{file}: every line should be a number and a value")
    return [(n, value.strip()) for n, value in lines]


def class_folders(root: Path) -> Path:
    """The folder whose subfolders are classes: the first on the way down with more than one folder that holds pictures.

    Raises:
        DataError: There is none.
    """
    home = root
    for _ in range(3):
        inner = [child for child in sorted(home.iterdir()) if child.is_dir() and not child.name.startswith(".")]
        if len(inner) != 1:
            break
        home = inner[0]
    if len(by_class(home)) < 2:
        raise DataError(f"{root}: no class folders with pictures there; expected <class>/<picture> or train/ and test/")
    return home


def objectnet_images(root: Path) -> Path:
    """ObjectNet's ``images``. Its folders stay the classes' names: published class orders count these, sorted."""
    home = below(root, ("images", "mappings"))
    return home / "images" if home is not None else class_folders(root)


def drawn(classes: dict[str, list[Path]], benchmark: Benchmark, seed: int) -> Split:
    share = benchmark.test / (benchmark.train + benchmark.test)
    return seeded(classes, share=share, most=benchmark.classes, seed=seed)


def cifar(root: Path) -> Iterator[tuple[str, str, str, Image.Image]]:
    """CIFAR-100 from its binary files: (split, class, name, picture), names being the pictures' places in the file.

    Raises:
        DataError: Another version of CIFAR, a missing file, or one of a wrong length or label.
    """
    home = below(root, ("train.bin", "test.bin", "fine_label_names.txt"))
    if home is None:
        if below(root, ("train", "test", "meta")) is not None:
            raise DataError(
                f"{root}: this is CIFAR-100's Python version, which is pickles; give cifar-100-binary.tar.gz instead"
            )
        raise DataError(f"{root}: no train.bin, test.bin, fine_label_names.txt there; give cifar-100-binary.tar.gz")
    names = (home / "fine_label_names.txt").read_text(encoding="utf-8").split()
    if names != sorted(names):
        raise DataError(f"{home / 'fine_label_names.txt'}: not in alphabetical order, as class folders are")
    for split in ("train", "test"):
        raw = np.fromfile(home / f"{split}.bin", dtype=np.uint8)
        if len(raw) == 0 or len(raw) % CIFAR_BYTES:
            raise DataError(f"{home / split}.bin: {len(raw)} bytes are not pictures of {CIFAR_BYTES} bytes each")
        rows = raw.reshape(-1, CIFAR_BYTES)
        if rows[:, 1].max() >= len(names):
            raise DataError(f"{home / split}.bin: label {rows[:, 1].max()}, but there are {len(names)} names")
        for i, row in enumerate(rows):
            picture = Image.fromarray(np.ascontiguousarray(row[2:].reshape(3, 32, 32).transpose(1, 2, 0)))
            yield split, names[row[1]], f"{i:05d}.png", picture
