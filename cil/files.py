"""Files that are there whole or not at all; a leaf: nothing of ours is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the block a name to write to; ``path`` becomes that file, in one step, once the block ends without error.

    Raises:
        OSError: Nothing could be written there; what was there stays.
    """
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield half
        flush(half)
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Make sure a file's or folder's content is on the disk before anything that depends on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
