"""Sources from arrays in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from cil.data.source import ImageSource, checked_labels, checked_names
from cil.errors import DataError


def from_arrays(images: np.ndarray, labels: Sequence[int] | np.ndarray, class_names: Sequence[str]) -> ImageSource:
    """A source from uint8 arrays.

    Args:
        images: uint8 [N, H, W] (grey), [N, H, W, 3] (RGB) or [N, H, W, 4] (RGB and opacity, shown on white).
        labels: Class positions, whole numbers [N].
        class_names: One name per class, all different.

    Raises:
        DataError: The images are not uint8 of such a shape, their number is not that of the labels, a label is not a
            class position, two classes have the same name, or a class has no images.
    """
    pixels, names = checked_images(images), checked_names(class_names)
    if not names:
        raise DataError("class_names is empty; give one name per class")
    positions = checked_labels(labels, names)
    if len(pixels) != len(positions):
        raise DataError(f"images and labels must have the same length; got {len(pixels)} and {len(positions)}")
    digest = hashlib.sha256(pixels.tobytes() + positions.tobytes() + repr(list(class_names)).encode())
    return ImageSource(
        lambda i: pixels[i],
        positions,
        names,
        describe=lambda i: f"image {i}",
        fingerprint=digest.hexdigest(),
        identify=lambda i: f"{names[positions[i]]}\0".encode() + pixels[i].tobytes(),
    )


def checked_images(images: np.ndarray) -> np.ndarray:
    wanted = "images must be uint8 [N, H, W] or [N, H, W, 3]"
    try:
        pixels = np.asarray(images)
    except (ValueError, TypeError):  # images of different sizes, or a tensor on a GPU
        raise DataError(f"{wanted}, an array; got {type(images).__name__} that is none") from None
    got = f"got {pixels.dtype} {list(pixels.shape)}"
    if pixels.ndim not in (3, 4) or 0 in pixels.shape:
        raise DataError(f"{wanted}, with at least one image and pixel; {got}")
    if pixels.ndim == 4 and pixels.shape[3] not in (3, 4):
        hint = {1: "use images[..., 0]"}.get(pixels.shape[3], "the last axis must be the channels")
        if pixels.shape[1] in (1, 3, 4):
            hint = "channels come last: use images.transpose(0, 2, 3, 1)"
            hint = "use images[:, 0]" if pixels.shape[1] == 1 else hint
        raise DataError(f"{wanted}; {got}; {hint}")
    if pixels.dtype != np.uint8:
        hint = "use images.astype(np.uint8) if the values are whole numbers in 0…255"
        if pixels.dtype.kind == "f":
            hint = "for values in 0…1 use (images * 255).round().astype(np.uint8)"
        elif pixels.dtype.kind == "b":
            hint = "use images.astype(np.uint8) * 255"
        elif pixels.dtype == np.uint16:
            hint = "for 16 bits use (images >> 8).astype(np.uint8)"
        raise DataError(f"{wanted}; {got}; {hint}")
    return pixels
