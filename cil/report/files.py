"""Writing what a reader may have open: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from cil.errors import RunError


def write(path: Path, content: str | bytes) -> Path:
    """Replace a file in one step, making its folder if need be.

    Raises:
        RunError: It cannot be written; what was there stays.
    """
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(content.encode() if isinstance(content, str) else content)
        half.replace(path)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path
