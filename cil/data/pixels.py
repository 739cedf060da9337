"""Turns a file, its bytes or an image of PIL into the 8-bit RGB image that a person sees: :func:`decode`.

Training, prediction and every kind of dataset use it, so that a model is tested on what it was trained on. PIL's own
``convert("RGB")`` is not enough: it clips more than 8 bits to white, shows the hidden colours of transparent pixels,
and ignores the orientation that cameras record. Where none of this occurs, the pixels are those of ``convert("RGB")``,
bit for bit. Colour profiles are not applied.
"""

from __future__ import annotations

import io
import os
import re
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffTags import TAGS_V2

from cil.config.schema import MAX_PIXELS

VERSION = 2
"""Increases whenever :func:`decode` returns other pixels for some files. It is part of all keys of the feature store,
because only decoding tells which files are concerned."""
Undecoded = Image.Image | np.ndarray | bytes | str | os.PathLike[str]
"""What :func:`decode` takes: an image of PIL, uint8 [H, W] or [H, W, 3], the bytes of a file, or its path."""
_TIFF = {tag.name: number for number, tag in TAGS_V2.items()}


def decode(image: Undecoded, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as a person sees it, in PIL's mode ``RGB``.

    - Only the first frame of an animation or of several pages is read.
    - Transparent pixels are shown on white.
    - The orientation of the EXIF data is applied; damaged EXIF data is ignored.
    - Of 16-bit values the high byte is used, as PIL does for 16-bit colours.
    - White is 1 for floats in 0…1, and 255 for other floats and for 32-bit integers.

    Args:
        image: The image, its file's bytes, or the file's path.
        max_pixels: Maximum number of pixels (width × height).

    Raises:
        Exception: Almost any type, because PIL's plugins raise what they meet; :func:`why` says it in one line.
    """
    let_pil_read(max_pixels)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
            raise TypeError(f"got an array {image.dtype} {list(image.shape)}; allowed: uint8 [H, W] or [H, W, 3]")
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return _as_seen(image, max_pixels)
    if not isinstance(image, bytes | str | os.PathLike):
        raise TypeError(f"got {type(image).__name__}; allowed: PIL image, uint8 array, bytes or path of a file")
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        return _as_seen(opened, max_pixels)


def let_pil_read(max_pixels: int) -> None:
    """Raise PIL's own limit for this process where it is lower. It is never lowered, because it is global."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:  # PIL refuses above twice that
        Image.MAX_IMAGE_PIXELS = max_pixels


def why(error: Exception, max_pixels: int, key: str = "data.max_pixels") -> str:
    """The reason of an error of :func:`decode`, as one line for a message; ``key`` names the setting of the limit."""
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))  # PIL's message and ours begin with the size
        return f"too large an image ({pixels and pixels[0]} pixels, {key} allows {max_pixels}); raise {key} to read it"
    text = " ".join(str(error).split())[:200]
    if isinstance(error, UnidentifiedImageError):  # its own text is the address of a buffer
        text = "of no type that PIL reads; SVG and HEIC files, for example, must be converted first"
    return f"not a readable image ({type(error).__name__}{': ' if text else ''}{text})"


def _as_seen(image: Image.Image, max_pixels: int) -> Image.Image:
    if image.width * image.height > max_pixels:
        raise Image.DecompressionBombError(f"{image.width * image.height} pixels")
    if image.mode == "RGB" and not image.info and type(image) is Image.Image:
        return image
    image.load()
    orientation = _orientation(image)
    rgb = _rgb(image)
    rgb.info = {}  # nothing in there is to be applied a second time
    if orientation not in (None, 1):
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
        rgb = ImageOps.exif_transpose(rgb)
    return rgb


def _orientation(image: Image.Image) -> Any:
    """EXIF's number of the orientation, 1 if upright; None if there is none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data raises any type; the image itself is whole
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "RGB" and max(image.info["transparency"]) > 255:  # a 16-bit colour, of which PIL keeps high bytes
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey with 8 bits from grey with more."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    low, high = values.min().item(), values.max().item()
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # the others store 16 bits in this mode
        if low < 0 or high > 255:
            raise ValueError(f"32-bit integers from {low} to {high}, of which none is white; save it with 8 or 16 bits")
        grey = values.astype(np.uint8)
    elif image.mode == "F":
        if not (low >= 0 and (high <= 1 or 2 <= high <= 255)):  # not a number fails as well
            raise ValueError(f"floats from {low:g} to {high:g}; allowed: 0 to 1, or 0 to 255")
        grey = np.rint(values * 255).astype(np.uint8) if high <= 1 else np.asarray(image.convert("L"))
    else:
        twelve = tuple(tags.get(_TIFF["BitsPerSample"], ())) == (12,)
        grey = (values >> (4 if twelve else 8)).astype(np.uint8)
    if tags.get(_TIFF["PhotometricInterpretation"]) == 0:  # white is zero, which PIL heeds up to 8 bits only
        grey = 255 - grey
    transparent = image.info.get("transparency")
    return Image.fromarray(grey if transparent is None else np.where(values == transparent, np.uint8(255), grey))
