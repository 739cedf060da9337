"""Decoded images in memory: nothing is decoded before it is first read, and nothing is decoded twice."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from threading import Lock

import numpy as np
from PIL import Image

from cil.data.pixels import Undecoded
from cil.data.source import ImageSource


class DecodedSource(ImageSource):
    """Decodes all images of a source at the first access and keeps them if they fit in memory.

    If every feature is already cached, no image is decoded. If the images do not fit, each is decoded whenever it is
    read. The first read raises ``DataError`` if any file is not a readable image; if the images do not fit, only the
    read of that file does.

    Args:
        source: The images.
        memory_bytes: Bytes that the decoded images may take.
        workers: Number of decoding threads.
    """

    def __init__(self, source: ImageSource, memory_bytes: float, workers: int) -> None:
        super().__init__(
            self._read_decoded,
            source.labels,
            source.class_names,
            describe=source.describe,
            fingerprint=source.fingerprint,
            domains=source.domains,
            stamp=source.stamp,
            max_pixels=source.max_pixels,
            identify=source.identify,
        )
        self.source, self._memory, self._workers = source, memory_bytes, workers
        self._arrays: dict[int, np.ndarray] = {}
        self._lock = Lock()

    @cached_property
    def fits(self) -> bool:
        """Whether all images fit in memory, estimated from the decoded size of at most sixteen of them."""
        probed = np.unique(np.linspace(0, len(self) - 1, min(16, len(self))).astype(int)).tolist()
        arrays = {i: np.asarray(p) for i in probed if (p := self.source.read_or_none(i)) is not None}
        sizes = [array.nbytes for array in arrays.values()]
        fits = bool(sizes) and float(np.mean(sizes)) * len(self) <= self._memory
        self._arrays = arrays if fits else {}
        return fits

    def unreadable(self) -> list[int]:
        """Positions of the files that are not readable images. Decodes all images, and keeps them if they fit."""
        return [i for i, readable in enumerate(self._decode(self.source.read_or_none)) if not readable]

    def content(self, index: int) -> bytes:
        return self.source.content(index)

    def restricted_to(self, keep: np.ndarray, source: ImageSource) -> DecodedSource:
        """The images at positions ``keep``, which are those of ``source``; images decoded already stay decoded."""
        restricted = DecodedSource(source, self._memory, self._workers)
        if self._arrays:
            restricted.fits = True
            restricted._arrays = {
                new: self._arrays[old] for new, old in enumerate(keep.tolist()) if old in self._arrays
            }
        return restricted

    def _decode(self, read: Callable[[int], Image.Image | None]) -> list[bool]:
        """Decode the images that are not decoded yet; returns for each image whether it could be read."""

        def load(index: int) -> bool:
            if index not in self._arrays:
                image = read(index)
                if image is None:
                    return False
                if self.fits:
                    self._arrays[index] = np.asarray(image)
            return True

        self.fits  # noqa: B018  # computed once, before the threads need it
        with ThreadPoolExecutor(max(1, self._workers)) as pool:  # PIL decodes outside the interpreter lock
            return list(pool.map(load, range(len(self))))

    def _read_decoded(self, index: int) -> Undecoded:
        if not self.fits:
            return self.source._read(index)
        if len(self._arrays) < len(self):
            with self._lock:
                self._decode(self.source.read)
        return Image.fromarray(self._arrays[index])
