"""Writing what a reader may have open: whole or not at all."""

from __future__ import annotations

from pathlib import Path

from cil.errors import RunError
from cil.files import replacing


def write(path: Path, content: str | bytes) -> Path:
    """Replace a file in one step, making its folder if need be.

    Raises:
        RunError: It cannot be written; what was there stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as half:
            half.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path
