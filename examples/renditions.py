"""The images of a folder dataset as renditions: each as its edges, posterised, inverted or blurred."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from cil.data.source import ImageSource
from cil.data.sources import folder, rank_in_class


def edges(image: Image.Image) -> Image.Image:
    """White lines on black where the brightness changes, after a little smoothing."""
    smooth = image.convert("L").filter(ImageFilter.GaussianBlur(0.015 * max(image.size)))
    return ImageOps.autocontrast(smooth.filter(ImageFilter.FIND_EDGES)).convert("RGB")


def posterised(image: Image.Image) -> Image.Image:
    """Two levels per colour channel, stretched to black and full colour."""
    return ImageOps.autocontrast(ImageOps.posterize(image, 1))


def blurred(image: Image.Image) -> Image.Image:
    """Smoothed by a Gaussian whose standard deviation is 4 % of the image's longer side."""
    return image.filter(ImageFilter.GaussianBlur(0.04 * max(image.size)))


RENDITIONS = {"edges": edges, "posterised": posterised, "inverted": ImageOps.invert, "blurred": blurred}


def load(split: str, root: Path, train: str = "train", test: str = "val", kinds=tuple(RENDITIONS), seed: int = 0):
    """The images of ``root/<train>`` or ``root/<test>``; image i of a class is of kind (i + start) mod len(kinds).

    Every class has its own start, drawn with ``seed``, so that each kind is equally frequent in the first images of a
    class, however many of them a stream takes.

    Args:
        split: ``train`` or ``test``.
        root: Folder that holds both.
        train: Folder of class folders below ``root``, or tar file of them, for training.
        test: The same for testing.
        kinds: Renditions, of ``edges``, ``posterised``, ``inverted`` and ``blurred``; ``original`` leaves images as
            they are.
        seed: Seed of the starts.
    """
    made = {**RENDITIONS, "original": lambda image: image}
    if unknown := [kind for kind in kinds if kind not in made]:
        raise ValueError(f"kinds: no rendition {unknown[0]!r}; there are {', '.join(made)}")
    source = folder(root / {"train": train, "test": test}[split])
    starts = np.random.RandomState(seed).randint(len(kinds), size=len(source.class_names))
    kind = (rank_in_class(source.labels) + starts[source.labels]) % len(kinds)
    setting = f"{','.join(kinds)} {seed}".encode()
    return ImageSource(
        lambda i: made[kinds[kind[i]]](source.read(i)),
        source.labels,
        source.class_names,
        describe=lambda i: f"{source.describe(i)} ({kinds[kind[i]]})",
        fingerprint=hashlib.sha256(source.fingerprint.encode() + setting).hexdigest(),
        stamp=source.stamp,
        identify=lambda i: source.identify(i) + kinds[kind[i]].encode(),
        findings=source.findings,
    )
