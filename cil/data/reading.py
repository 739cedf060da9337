"""Reads single images as tensors: images of a source, also in worker processes, and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from cil.config.schema import MAX_PIXELS
from cil.data.folder import as_text
from cil.data.pixels import decode, why
from cil.data.source import ImageSource
from cil.data.transforms import Transforms
from cil.errors import CilError, DataError
from cil.utils.randomness import isolated, seed_everything

Item = tuple[int, int | None]
"""An image's position, and the seed of its augmentation (None: the test transform)."""


class ImageReader(Dataset[np.ndarray]):
    """(position, augmentation seed or None) → uint8 [3, S, S]. Seeds the global random state, so it
    must run inside :func:`~cil.utils.randomness.isolated` or in a worker process."""

    def __init__(self, source: ImageSource, transforms: Transforms) -> None:
        self.source, self.transforms = source, transforms

    def __getitem__(self, item: Item) -> np.ndarray:
        index, seed = item
        image = self.source.read(index)
        if seed is None or self.transforms.augment is None:
            return _evaluated(image, self.transforms, self.source.max_pixels, lambda: self.source.describe(index))
        seed_everything(seed)
        return np.asarray(self.transforms.augment(image))


class WorkerReader(ImageReader):
    """The same in a worker process, where an unreadable file is returned as a value: an exception would arrive as a
    traceback."""

    def __getitem__(self, item: Item) -> np.ndarray | CilError:  # type: ignore[override]
        try:
            return super().__getitem__(item)
        except CilError as error:
            return error


def stack(images: list[np.ndarray | CilError]) -> torch.Tensor | CilError:
    """A batch, uint8 [B, 3, S, S], or the first error among its images."""
    broken = [p for p in images if isinstance(p, CilError)]
    return broken[0] if broken else torch.from_numpy(np.stack(images))  # type: ignore[arg-type]


def read_image(
    image: Path | bytes, transforms: Transforms, max_pixels: int = MAX_PIXELS, *, name: str = ""
) -> torch.Tensor:
    """One image file under the test transform, normalised, float [1, 3, S, S].

    Args:
        image: The file, or its bytes.
        transforms: The transforms of a backbone.
        max_pixels: Maximum number of pixels of the image.
        name: Its name in messages; default: the path.

    Raises:
        DataError: The file does not exist, is not an image, or is too large.
    """
    if isinstance(image, Path):
        name = name or as_text(image)
        if not image.is_file():
            raise DataError(f"{name}: no such file")
    try:
        decoded = decode(image, max_pixels)
    except Exception as error:
        raise DataError(f"{name}: {why(error, max_pixels, 'max_pixels')}") from None
    with isolated():
        pixels = torch.from_numpy(_evaluated(decoded, transforms, max_pixels, lambda: name))
    return transforms.normalize(pixels[None])


def _evaluated(image: Image.Image, transforms: Transforms, max_pixels: int, describe: Callable[[], str]) -> np.ndarray:
    """An image under the test transform, uint8 [3, S, S].

    Raises:
        DataError: The image is so narrow that the transform would enlarge it beyond the limit.
    """
    width, height = transforms.resized(image.size)
    if width * height > max_pixels:
        raise DataError(
            f"{describe()}: {image.width} × {image.height} pixels, which the test transform would enlarge to "
            f"{width} × {height}, more than max_pixels allows ({max_pixels}); remove it, or set transform.crop=squash"
        )
    return np.asarray(transforms.evaluate(image))
