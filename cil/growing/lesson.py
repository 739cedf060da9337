"""The images of one call of `cil learn`: which of them are new, what their labels are, and which are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cil.config import DataConfig, HardwareConfig
from cil.config.reading import validated
from cil.config.schema import MAX_PIXELS
from cil.data.folder import as_text, some
from cil.data.images import LoadedSplit
from cil.data.source import ADVICE, ImageSource
from cil.errors import DataError
from cil.growing import events
from cil.growing.records import Contents, learned
from cil.rows import Lesson
from cil.stream.protocol import validation_split

Images = str | Path | ImageSource
"""A folder of class folders, a tar file laid out like it, a CSV file with lines path,label, or an open source."""


def open_images(images: Images, on_error: str = "raise", max_pixels: int = MAX_PIXELS) -> LoadedSplit:
    """The images of a call.

    Args:
        images: Where they are.
        on_error: ``skip`` to leave out files that are no readable images; ``raise`` to refuse them.
        max_pixels: Maximum number of pixels of an image; larger ones count as unreadable.

    Raises:
        DataError: There is no such path, it has no class folders, a class is empty, or no image can be read.
        ConfigError: ``on_error`` or ``max_pixels`` is none of what is allowed.
    """
    settings: dict[str, Any] = {"on_error": on_error, "max_pixels": max_pixels}
    hardware = HardwareConfig(feature_store="off")
    if isinstance(images, ImageSource):
        config = validated(DataConfig, {"dataset": "images", "train": "from Python", **settings})
        return LoadedSplit(config, "train", hardware, source=images)
    place = Path(images).absolute()
    if not place.exists():
        raise DataError(f"{as_text(images)}: no such folder, tar file or CSV file")
    config = validated(DataConfig, {"dataset": "folder", "root": place.parent, "train": place.name, **settings})
    return LoadedSplit(config, "train", hardware)


@dataclass(frozen=True)
class Prepared:
    """What is taught in a call.

    Attributes:
        split: The images that were given.
        positions: The new ones among them, int64 [N].
        labels: Their labels, int64 [N].
        held_out: Which of the N are held out: positions in 0…N−1.
        names: Names of all classes of the model after the call, by label.
        contents: Digests of the N images.
        lesson: What the model records of the call.
        notes: Lines that a user should see.
    """

    split: LoadedSplit
    positions: np.ndarray
    labels: np.ndarray
    held_out: np.ndarray
    names: list[str]
    contents: Contents
    lesson: Lesson
    notes: list[str]


def prepare(
    split: LoadedSplit, holdout: float, header: events.Header | None, contents: Sequence[Contents]
) -> Prepared | None:
    """Compare given images with what a model has learned, and split the new ones.

    Args:
        split: The images.
        holdout: Share of each class that is held out, in [0, 1); at least one image per class is not.
        header: The header of the model; None for a new one.
        contents: The images of its lessons.

    Returns:
        What is to be taught; None if the model has learned all of the images already.

    Raises:
        DataError: Names differ only in case, ``holdout`` is out of range, or an image cannot be read.
    """
    if not 0 <= holdout < 1:
        raise DataError(f"holdout: {holdout} is no share; allowed: 0 to below 1, e.g. 0.2")
    source = split.source
    label_of = events.labels_for(header, source.class_names, split.title)
    every = np.array([label_of[name] for name in source.class_names])[source.labels]
    digests = read_contents_of(split)
    known: dict[int, set[bytes]] = {label: set() for label in label_of.values()}
    if header is not None:
        known = {label: {content for content, _ in learned(contents, header, label)} for label in known}
    new = np.array([digest not in known[label] for digest, label in zip(digests, every.tolist(), strict=True)])
    notes = split.lines()
    if split.skipped:
        notes.append(f"{len(split.skipped)} unreadable files left out ({some(split.skipped)})")
    if not new.all():
        notes.append(f"{(~new).sum()} of {len(new)} images left out, because their classes have learned them already")
    positions, labels = np.flatnonzero(new), every[new]
    if not len(positions):
        return None
    _, held_out = validation_split(labels, holdout)
    out = np.isin(np.arange(len(labels)), held_out)
    few = [label for label in np.unique(labels).tolist() if holdout and not out[labels == label].any()]
    names = list(header["class_names"]) if header is not None else []
    names += [name for name, label in label_of.items() if label >= len(names)]
    if few:
        shown = ", ".join(names[label] for label in few[:3]) + (", …" if len(few) > 3 else "")
        notes.append(
            f"nothing is held out of {len(few)} classes with too few images for a share of {holdout} ({shown})"
        )
    found = Contents([digests[i] for i in positions.tolist()], labels, out)
    lesson: Lesson = {
        "when": events.now(),
        "source": split.title,
        "holdout": holdout,
        "train": _counts(labels[~out]),
        "held_out": _counts(labels[out]),
        "train_sha256": _digest(found, names, ~out),
        "held_out_sha256": _digest(found, names, out),
        "unreadable": [as_text(name) for name in split.skipped],
        "known": int((~new).sum()),
    }
    return Prepared(split, positions, labels, held_out, names, found, lesson, notes)


def read_contents_of(split: LoadedSplit) -> list[bytes]:
    """The digest of each image's content.

    Raises:
        DataError: An image cannot be read.
    """
    source = split.source
    try:
        source.read(0)  # decodes all images that fit in memory, so that a broken one is found before anything is taught
        return [source.content(i) for i in range(len(source))]
    except DataError as error:
        reason = str(error).removesuffix(ADVICE)
        raise DataError(f"{reason}; repair or remove it, or skip such files (--on-error skip)") from None


def _counts(labels: np.ndarray) -> dict[str, int]:
    return {str(label): int((labels == label).sum()) for label in np.unique(labels).tolist()}


def _digest(contents: Contents, names: Sequence[str], chosen: np.ndarray) -> str:
    found = hashlib.sha256()
    for i in np.flatnonzero(chosen).tolist():
        found.update(contents.content[i] + names[contents.label[i]].encode("utf-8", "surrogateescape") + b"\0")
    return found.hexdigest()
