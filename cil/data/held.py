"""Decoded pictures in memory: nothing is decoded before somebody wants it, and nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from threading import Lock

import numpy as np
from PIL import Image

from cil.data.sources import ImageSource


class Held(ImageSource):
    """A source whose pictures are decoded together when the first of them is wanted, and kept if they fit in memory.

    Whose features are all there already wants none. Where they do not fit, each is decoded whenever it is read.
    Reading raises ``DataError`` where any file is no readable image; when streaming, once it is reached.

    Args:
        source: Where they come from.
        memory_bytes: What the decoded pictures may take.
        workers: Threads that decode.
    """

    def __init__(self, source: ImageSource, memory_bytes: float, workers: int) -> None:
        super().__init__(
            self._one,
            source.labels,
            source.class_names,
            describe=source.describe,
            fingerprint=source.fingerprint,
            domains=source.domains,
            stamp=source.stamp,
        )
        self.source, self._memory, self._workers = source, memory_bytes, workers
        self._arrays: dict[int, np.ndarray] = {}
        self._lock = Lock()

    @cached_property
    def fits(self) -> bool:
        """Whether all pictures fit in memory, by the size of sixteen."""
        probed = np.unique(np.linspace(0, len(self) - 1, min(16, len(self))).astype(int)).tolist()
        found = {i: np.asarray(p) for i in probed if (p := self.source.read_or_none(i)) is not None}
        sizes = [array.nbytes for array in found.values()]
        fits = bool(sizes) and float(np.mean(sizes)) * len(self) <= self._memory
        self._arrays = found if fits else {}
        return fits

    def unreadable(self) -> list[int]:
        """Positions of the files that are no readable images; decodes all, and keeps what fits."""
        return [i for i, readable in enumerate(self._decode(self.source.read_or_none)) if not readable]

    def only(self, keep: np.ndarray, source: ImageSource) -> Held:
        """The pictures at positions ``keep``, which ``source`` has; what was decoded stays so."""
        held = Held(source, self._memory, self._workers)
        if self._arrays:
            held.fits = True
            held._arrays = {new: self._arrays[old] for new, old in enumerate(keep.tolist()) if old in self._arrays}
        return held

    def _decode(self, read: Callable[[int], Image.Image | None]) -> list[bool]:
        """Decode what is not there yet; whether each picture could be read."""

        def load(index: int) -> bool:
            if index not in self._arrays:
                picture = read(index)
                if picture is None:
                    return False
                if self.fits:
                    self._arrays[index] = np.asarray(picture)
            return True

        self.fits  # noqa: B018  # found out once, before the threads ask
        with ThreadPoolExecutor(max(1, self._workers)) as pool:  # PIL decodes outside the interpreter lock
            return list(pool.map(load, range(len(self))))

    def _one(self, index: int) -> Image.Image:
        if not self.fits:
            return self.source._read(index)
        if len(self._arrays) < len(self):
            with self._lock:
                self._decode(self.source.read)
        return Image.fromarray(self._arrays[index])
