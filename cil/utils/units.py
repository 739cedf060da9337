"""The files of one folder of the feature store. Imports nothing from this package."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

UNIT = re.compile(r"[0-9a-f]{32}-\d+\.safetensors")
"""Name of a file of features: digest of the images, and their number."""
ABANDONED = 24 * 3600
"""Seconds after which a temporary file must have been left by a process that was killed."""


def unit_files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Files of features in a folder, with their status; abandoned temporary files are deleted on the way."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat()
                if entry.name.startswith("."):
                    if stat.st_mtime < time.time() - ABANDONED:
                        Path(entry.path).unlink()
                elif UNIT.fullmatch(entry.name):
                    yield Path(entry.path), stat


def remove_if_empty(folder: Path) -> None:
    """Delete a folder that holds no features, with its ``key.json``, unless another process is writing there."""
    if not any(unit_files(folder)):
        with contextlib.suppress(OSError):
            (folder / "key.json").unlink(missing_ok=True)
            folder.rmdir()
