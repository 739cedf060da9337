"""Atomic file writes, and one wording for a write that fails. Needs no torch, and of this package the errors alone."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from safetensors import SafetensorError

from cil.errors import CilError, RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces ``path`` in one step if the block ends without an exception.

    A link at ``path`` is replaced, not followed.

    Raises:
        OSError: The file cannot be written; an existing file at ``path`` is unchanged.
    """
    temporary = fresh(path)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # ours: neither a file nor a link before
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fresh(path: Path) -> Path:
    """A temporary name beside ``path`` that nobody can foresee, so that no link waits there."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")


def remove(path: Path) -> None:
    """Delete a file, a folder, or a link without what it leads to; nothing happens if there is none.

    Raises:
        OSError: It cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Delete what killed processes have left of ``path``: temporary files and folders with the number of a process
    (:func:`fresh`) that has ended."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(?:old\.)?(\d+)(?:\.[0-9a-f]+)?")
    for beside in path.parent.iterdir() if path.parent.is_dir() else ():
        match = pattern.fullmatch(beside.name)
        if match and not psutil.pid_exists(int(match.group(1))):
            with suppress(FileNotFoundError):  # another process may do the same
                remove(beside)


def write(path: Path, content: str | bytes) -> Path:
    """Replace a file in one step, and make its folder if it is missing.

    Raises:
        RunError: The file cannot be written; what was there stays.
    """
    with reporting(path, "What was there stays"):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with replacing(path) as half:
            half.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
    return path


@contextmanager
def reporting(
    path: Path, consequence: str, *, error: type[CilError] = RunError, only_full: bool = False
) -> Iterator[None]:
    """Turn a failed write inside the block into one line for the user.

    Args:
        path: What is being written, for the message.
        consequence: What the failure means for the user, and what to do; a sentence without a full stop.
        error: The error to raise.
        only_full: Translate only a full disk, and let every other OSError pass unchanged.

    Raises:
        CilError: ``error``, if the disk is full or ``path`` cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as failure:
        code = failure.errno if isinstance(failure, OSError) else _system_error(failure)
        if only_full and code not in FULL:
            raise
        reason = "the disk is full" if code in FULL else os.strerror(code) if code else str(failure)
        raise error(f"{path}: cannot write: {reason}. {consequence}") from None


def flush(path: Path) -> None:
    """Force the content of a file or folder to disk, before anything that depends on it is written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _system_error(error: SafetensorError) -> int | None:
    """The system's error number in a safetensors message, which has it as text: ``… (os error 28)``."""
    match = re.search(r"os error (\d+)", str(error))
    return int(match.group(1)) if match else None
