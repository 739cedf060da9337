"""Sources from what a caller of Python has at hand: paths, PIL images, arrays, or a torch dataset."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from cil.data.arrays import checked_images
from cil.data.folder import as_text
from cil.data.pixels import Undecoded
from cil.data.source import ImageSource
from cil.errors import DataError

ALLOWED = (
    "allowed: a list of paths, PIL images or uint8 arrays [H, W, 3], one uint8 array [N, H, W, 3], or a torch dataset"
)


def count_images(images: Any) -> int:
    """Number of images in what :func:`from_given` takes.

    Raises:
        DataError: It is something else, or it has no images.
    """
    if isinstance(images, str | bytes | os.PathLike | Image.Image):
        what = "one image" if isinstance(images, Image.Image) else f"the path {as_text(os.fsdecode(images))!r}"
        raise DataError(f"images: got {what}; give a list, also of one image")
    if not (hasattr(images, "__len__") and hasattr(images, "__getitem__")) or isinstance(images, dict):
        raise DataError(f"images: got {type(images).__name__}; {ALLOWED}")
    if getattr(images, "shape", None) == () or not len(images):
        raise DataError(f"images: got 0 images (an empty {type(images).__name__}); give at least one")
    return len(images)


def labels_of(images: Any) -> np.ndarray:
    """The labels that a torch dataset of (image, label) has: its ``targets``, or those of its items.

    Raises:
        DataError: ``images`` is no torch dataset, or an item is no pair.
    """
    if not isinstance(images, Dataset):
        raise DataError(f"y: missing; it can only be left out for a torch dataset, and X is {type(images).__name__}")
    targets = getattr(images, "targets", None)
    if targets is not None:
        return np.asarray(targets)
    items = [images[i] for i in range(count_images(images))]
    odd = next((i for i, one in enumerate(items) if not isinstance(one, tuple) or len(one) < 2), None)
    if odd is not None:
        raise DataError(f"image {odd} of the dataset has no label (its item is a {type(items[odd]).__name__}); give y")
    return np.asarray([one[1] for one in items])


def from_given(images: Any, labels: Sequence[int] | np.ndarray, class_names: Sequence[str]) -> ImageSource:
    """A source over images as they are; none is decoded before it is read.

    Its fingerprint is equal to that of no other source, so features of its images are never found in a feature store.

    Args:
        images: Paths, PIL images or uint8 arrays [H, W], [H, W, 3] or [H, W, 4], as a sequence; one such array with a
            first axis [N]; or a torch dataset. An item that is a tuple begins with the image.
        labels: Class positions, whole numbers [N].
        class_names: One name per class, all different.

    Raises:
        DataError: The images are of none of these types, or as :class:`ImageSource` raises it.
    """
    count = count_images(images)
    if count != len(labels):
        raise DataError(f"images and labels must have the same length; got {count} and {len(labels)}")
    read, describe = _reader(images)
    return ImageSource(read, labels, class_names, describe=describe, fingerprint=uuid.uuid4().hex)


def _reader(images: Any) -> tuple[Callable[[int], Undecoded], Callable[[int], str]]:
    """Functions from a position to the image, and to its name in messages."""

    def numbered(i: int) -> str:
        return f"image {i}"

    if isinstance(images, Dataset):
        return lambda i: _first(images[i]), numbered
    if isinstance(images, np.ndarray) and images.dtype.kind not in "OUS":
        pixels = checked_images(images)
        return lambda i: pixels[i], numbered
    items = [_first(one) for one in images]
    kinds = (Image.Image, np.ndarray, bytes, str, os.PathLike)
    odd = next((i for i, one in enumerate(items) if not isinstance(one, kinds)), None)
    if odd is not None:
        raise DataError(f"image {odd}: got {type(items[odd]).__name__}; {ALLOWED}")
    return lambda i: items[i], lambda i: as_text(items[i]) if isinstance(items[i], str | os.PathLike) else numbered(i)


def _first(item: Any) -> Any:
    return item[0] if isinstance(item, tuple) and item else item
