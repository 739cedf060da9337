"""Which folder of a split is the class of which image, and which folder of a data set is the split.

The class is the folder directly below the split, and deeper folders belong to it. :mod:`cil.data.folder` finds the
images.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cil.data.folder import OUTSIDE, Entry, Findings, Scan, as_text, image_types, in_order, natural_key, some
from cil.errors import DataError

SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "validation", "eval")}
SPLIT_NAMES = frozenset(name for names in SPLIT_FOLDERS.values() for name in names)


class NoSplitError(DataError):
    """A data folder does not have the split."""


def find_split(root: Path, name: str | None, split: str) -> tuple[Path, tuple[str, ...]]:
    """The folder or tar file of a split below ``root``: ``name``, or else the first of the usual names that exists.

    Returns:
        (its path, the other usual names that exist).

    Raises:
        NoSplitError: None exists; the message lists the names that were tried.
    """
    candidates = [name] if name else [n + e for n in SPLIT_FOLDERS[split] for e in ("", ".tar")]
    found = [candidate for candidate in candidates if (root / candidate).exists()]
    if not found:
        packed = [] if name else [n + e for n in SPLIT_FOLDERS[split] for e in (".tar.gz", ".tgz", ".zip")]
        there = [candidate for candidate in packed if (root / candidate).exists()]
        hint = f", or unpack {there[0]}" if there else ""
        raise NoSplitError(
            f"data.{split}: {as_text(root)} holds none of {', '.join(candidates)}; set data.root and data.{split}{hint}"
        )
    return root / found[0], tuple(found[1:])


@dataclass(frozen=True)
class Index:
    """The images of a split in their order, the class position of each, and the names of the classes."""

    images: list[Entry]
    labels: list[int]
    class_names: list[str]
    findings: Findings


def index(scan: Scan, where: str) -> Index:
    """The classes of a scan: the folders directly below its top.

    If the top holds nothing but one folder of folders (``train.tar`` with ``train/…`` in it), then this one is the top.

    Args:
        scan: The content of a split.
        where: Its path, for messages.

    Raises:
        DataError: There is no class folder, one has no images, two have the same name, or the folders are splits.
    """
    top = _top(scan)
    scan = scan.once(top)
    images = sorted(scan.images, key=lambda entry: (natural_key(entry.written), entry.written))
    parts = [entry.name[len(top) :].split("/") for entry in images]
    folders = {name[len(top) :] for name in scan.folders if name.startswith(top) and "/" not in name[len(top) :]}
    raw = in_order({first for first, *_ in parts})
    if not raw and not folders:
        stray = len(scan.left_out.get(OUTSIDE, ()))
        raise DataError(f"{where}: found {stray} images, but no class folders; expected <class>/<image>")
    _refuse_splits(where, top, folders | set(raw), parts)
    for name in in_order(folders - set(raw)):
        raise DataError(_empty(where, f"{top}{name}/", name, scan.left_out))
    names = [as_text(name) for name in raw]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{where}: two class folders would both be called {name!r}; rename one of them")
    position = {name: i for i, name in enumerate(raw)}
    findings = Findings(where, scan.left_out, tuple(_notes(top, names, parts)))
    return Index(images, [position[first] for first, *_ in parts], names, findings)


def _top(scan: Scan) -> str:
    """Path of the folder around the class folders, with a ``/`` at its end, or an empty text."""
    top = ""
    while True:
        inside = [entry.name[len(top) :].split("/") for entry in scan.images if entry.name.startswith(top)]
        inside = [parts for parts in inside if len(parts) > 1]
        folders = {name[len(top) :].split("/")[0] for name in scan.folders if name.startswith(top)}
        folders |= {first for first, *_ in inside}
        if len(folders) != 1 or not inside or any(len(parts) == 2 for parts in inside):
            return top
        top += f"{folders.pop()}/"


def _refuse_splits(where: str, top: str, folders: set[str], images: Sequence[Sequence[str]]) -> None:
    splits = {name for name in folders if name.lower() in SPLIT_NAMES}
    trained = {name for name in splits if name.lower() in SPLIT_FOLDERS["train"]}
    flat = {parts[0] for parts in images if len(parts) == 2}
    if trained and splits - trained and (splits == folders or not splits & flat):
        raise DataError(
            f"{where}: holds several splits ({', '.join(sorted(splits))}) and would be read as one; "
            "set data.train and data.test to a folder or tar file for each split"
        )


def _empty(where: str, path: str, name: str, left_out: dict[str, list[str]]) -> str:
    """The message about a class folder without images; it says what the folder holds instead."""
    held = {reason: [n for n in names if n.startswith(path)] for reason, names in left_out.items()}
    reasons = "; ".join(f"{len(names)} {reason} ({some(names)})" for reason, names in held.items() if names)
    instead = f"; left out there: {reasons}; types that are read: {' '.join(sorted(image_types()))}" if reasons else ""
    return f"{where}: class folder {as_text(name)!r} holds no images; fill or remove it{instead}"


def _notes(top: str, names: Sequence[str], images: Sequence[Sequence[str]]) -> Iterable[str]:
    if top and top.split("/")[-2].lower() not in SPLIT_NAMES:
        yield f"the classes are the folders in {as_text(top)}"
    deep = [parts for parts in images if len(parts) > 2]
    if deep:
        example = as_text("/".join(deep[0]))
        yield f"images in subfolders belong to the class folder above: {len(deep)}, e.g. {example}"
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_folded(name), []).append(name)
    groups = [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
    if groups:
        shown = "; ".join(groups[:3]) + ("; …" if len(groups) > 3 else "")
        yield f"classes whose names differ only in case, leading zeros or the form of accents stay apart: {shown}"


def _folded(name: str) -> str:
    return re.sub(r"(?<!\d)0+(?=\d)", "", unicodedata.normalize("NFC", name).casefold()).strip()
