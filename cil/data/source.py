"""What every dataset becomes: labelled images, decoded one at a time.

Every source has a length, labels, images and a fingerprint. Labels are the dataset's own class positions here; a stream
turns them into its order of appearance.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cil.config.schema import MAX_PIXELS
from cil.data.folder import Findings
from cil.data.pixels import Undecoded, decode, let_pil_read, why
from cil.errors import CilError, DataError

ADVICE = "; repair or remove it, or set data.on_error=skip"
"""The end of the message about an image that cannot be read."""


class ImageSource:
    """Labelled images, decoded one at a time.

    Args:
        read: Position → image: one of PIL, a path, the bytes of a file, or a uint8 array [H, W] or [H, W, 3]. May raise
            anything if the image is broken; must be thread-safe.
        labels: Class position of every image, whole numbers [N].
        class_names: Names in the order of the class positions, all different.
        describe: Position → name of the image in messages (its path, if it has one).
        fingerprint: Hex digest that changes when images or labels change.
        domains: Domain of every image, int64 [N], for domain-incremental streams.
        stamp: Text that changes whenever the files may have changed, also where a fingerprint made from names and
            sizes stays the same. It depends on this machine and is not part of a run's identity.
        max_pixels: Maximum number of pixels of an image; larger ones are not decoded.
        identify: Position → bytes that change when the image or the name of its class changes, whatever happens to
            other images; None if only the whole set can be told from another one.
        findings: What each folder or archive behind the images holds beside them.

    Raises:
        DataError: A label is not a class position, two classes have the same name, or a class has no images.
    """

    def __init__(
        self,
        read: Callable[[int], Undecoded],
        labels: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        *,
        describe: Callable[[int], str],
        fingerprint: str,
        domains: np.ndarray | None = None,
        stamp: str = "",
        max_pixels: int = MAX_PIXELS,
        identify: Callable[[int], bytes] | None = None,
        findings: Sequence[Findings] = (),
    ) -> None:
        self._read, self.describe, self.fingerprint, self.domains = read, describe, fingerprint, domains
        self.stamp, self.max_pixels, self.identify, self.findings = stamp, max_pixels, identify, tuple(findings)
        self.class_names = checked_names(class_names)
        self.labels = checked_labels(labels, self.class_names)
        if domains is not None:
            found = np.asarray(domains)
            if found.shape != self.labels.shape or found.dtype.kind not in "iu":
                wanted = f"domains must be whole numbers, one per image, [{len(self)}]"
                raise DataError(f"{wanted}; got {found.dtype} {list(found.shape)}")
        empty = sorted(set(range(len(self.class_names))) - set(self.labels.tolist()))
        if empty:
            raise DataError(f"class {self.class_names[empty[0]]!r} has no images; add some or remove the class")

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        """The RGB image at a position in 0…N−1, as :func:`~cil.data.pixels.decode` returns it.

        Raises:
            DataError: The file is truncated, too large or not an image; the message names it.
        """
        let_pil_read(self.max_pixels)
        try:
            return decode(self._read(index), self.max_pixels)
        except CilError:  # of a source that this one is made of, and complete
            raise
        except Exception as error:
            raise DataError(f"{self.describe(index)}: {why(error, self.max_pixels)}{ADVICE}") from None

    def fingerprint_of(self, indices: np.ndarray) -> str:
        """Hex digest of some of the images, in their order; that of the whole set if images cannot be told apart."""
        if self.identify is None:
            return self.fingerprint
        digest = hashlib.sha256()
        for index in indices.tolist():
            digest.update(hashlib.sha256(self.identify(index)).digest())
        return digest.hexdigest()

    def content(self, index: int) -> bytes:
        """A digest of what the image is stored as, 16 bytes: of its file's bytes, or of its pixels.

        Unlike :attr:`identify` it depends neither on the image's name nor on its class.

        Raises:
            DataError: The file cannot be read.
        """
        try:
            image = self._read(index)
            if isinstance(image, str | os.PathLike):
                image = Path(image).read_bytes()
        except CilError:
            raise
        except Exception as error:  # as in read
            raise DataError(f"{self.describe(index)}: {why(error, self.max_pixels)}{ADVICE}") from None
        if isinstance(image, Image.Image):
            image = np.asarray(image)
        shape = b"" if isinstance(image, bytes) else f"{image.dtype} {image.shape}".encode()
        content = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
        return hashlib.sha256(shape + content).digest()[:16]

    def read_or_none(self, index: int) -> Image.Image | None:
        """The image at a position, or None where :meth:`read` would raise."""
        try:
            return self.read(index)
        except DataError:
            return None


def checked_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Class names as text.

    Raises:
        DataError: They are no sequence, or two are equal.
    """
    if isinstance(class_names, str) or not isinstance(class_names, Iterable):
        got = f"the text {class_names!r}" if isinstance(class_names, str) else type(class_names).__name__
        raise DataError(f"class_names must be a sequence of names, one per class; got {got}")
    names = tuple(str(name) for name in class_names)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        places = [i for i, name in enumerate(names) if name == twice[0]]
        raise DataError(f"class_names: {twice[0]!r} is the name of the classes {places}; give each its own name")
    return names


def checked_labels(labels: Sequence[int] | np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Labels as positions in ``class_names``, int64 [N].

    Raises:
        DataError: They are not whole numbers in 0…C−1, one per image.
    """
    wanted = f"labels must be whole numbers in 0…{len(class_names) - 1}, positions in class_names, one per image"
    try:
        found = np.asarray(labels)
    except ValueError:  # rows of different lengths
        raise DataError(f"{wanted}; got rows of different lengths") from None
    if found.ndim != 1:
        hint = "; for one-hot rows use labels.argmax(1)" if found.ndim == 2 and found.shape[1] > 1 else ""
        hint = hint or ("; use labels[:, 0]" if found.ndim == 2 else "")
        raise DataError(f"{wanted}, [N]; got shape {list(found.shape)}{hint}")
    if not len(found):
        return found.astype(np.int64)
    if found.dtype.kind not in "iu":
        text = found.dtype.kind in "UST" or any(isinstance(label, str) for label in found.tolist())
        hint = "[class_names.index(label) for label in labels]" if text else "labels.astype(int) if that loses nothing"
        raise DataError(f"{wanted}; got {'text' if text else found.dtype} ({found.tolist()[0]!r}, …); use {hint}")
    outside = np.flatnonzero((found < 0) | (found >= len(class_names)))
    if len(outside):
        first = outside[0]
        hint = "; subtract 1" if found.min() == 1 and found.max() == len(class_names) else ""
        raise DataError(f"{wanted}; image {first} has {found[first]} ({len(outside)} such labels){hint}")
    return found.astype(np.int64)
