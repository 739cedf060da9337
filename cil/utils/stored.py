"""Stored JSON files, and the checksums of all stored files: written by one function, and read by one function.

A JSON file of a run, a stage or an exported model carries the SHA-256 of its own content under :data:`CHECKSUM`, and
those of the files beside it under ``files``. Files of earlier versions have neither and are read without this check.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cil.errors import CilError, RunError

CHECKSUM = "checksum"
"""Key of a JSON file's own checksum."""
DEEPEST = 64
"""Levels of lists and objects in a stored file; nothing that is written here comes near."""


def digest(content: Any) -> str:
    """The SHA-256 of bytes, or of an array's values as they are stored in memory; hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def file_digest(file: Path) -> str:
    """The SHA-256 of a file, hexadecimal.

    Raises:
        OSError: The file is missing or cannot be read.
    """
    with file.open("rb") as stream:
        found = hashlib.sha256()
        while block := stream.read(2**20):
            found.update(block)
    return found.hexdigest()


def content_digest(value: Mapping[str, Any]) -> str:
    """The SHA-256 of a JSON object without its :data:`CHECKSUM`, whatever the order of its keys and its layout."""
    rest = {key: item for key, item in value.items() if key != CHECKSUM}
    return digest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own checksum as the last key, as :func:`read_json` verifies it."""
    plain = json.loads(json.dumps(value))  # as it is read again: keys are texts, tuples are lists
    plain.pop(CHECKSUM, None)
    return {**plain, CHECKSUM: content_digest(plain)}


def read_json(file: Path, *schemas: TypeAdapter[Any], advice: str, error: type[CilError] = RunError) -> dict[str, Any]:
    """The object in a stored JSON file without its checksum, which is verified where there is one.

    Args:
        file: The file.
        schemas: Keys and types that it must have; further keys are allowed.
        advice: What to do about a damaged file; the end of the message.
        error: The error to raise.

    Raises:
        FileNotFoundError: There is no such file.
        CilError: ``error``, naming the file, if it is damaged or cannot be read.
    """
    try:
        value = json.loads(file.read_bytes().decode(), parse_constant=_no_number)
        if not isinstance(value, dict):
            raise ValueError(f"holds {type(value).__name__}, not an object")
        if not _shallow(value):
            raise ValueError(f"nested more than {DEEPEST} levels deep")
        known = content_digest(value)
        if value.pop(CHECKSUM, known) != known:
            raise ValueError(f"its content does not match its {CHECKSUM}; after a change by hand, delete that key")
        for schema in schemas:
            schema.validate_python(value, strict=True)
    except FileNotFoundError:
        raise
    except ValidationError as failure:
        raise error(f"{file}: damaged: {first_error(failure)}; {advice}") from None
    except RecursionError:
        raise error(f"{file}: damaged: nested too deep; {advice}") from None
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or str(failure)
        raise error(f"{file}: damaged: {' '.join(reason.split())}; {advice}") from None
    return value


def check_file(file: Path, known: str | None, *, advice: str, error: type[CilError] = RunError) -> None:
    """Verify the checksum of a file before it is read.

    Args:
        file: The file.
        known: Its SHA-256 as it was recorded; None for files of earlier versions, which are not verified.
        advice: What to do about a damaged file; the end of the message.
        error: The error to raise.

    Raises:
        FileNotFoundError: There is no such file.
        CilError: ``error``, naming the file, if it is not the file that was written or cannot be read.
    """
    if known is None:
        return
    try:
        found = file_digest(file)
    except FileNotFoundError:
        raise
    except OSError as failure:
        raise error(f"{file}: cannot be read ({failure.strerror}); {advice}") from None
    if found != known:
        raise error(f"{file}: is damaged: its content does not match its recorded checksum; {advice}")


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _shallow(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inner = (item for one in level for item in (one.values() if isinstance(one, dict) else one))
        level = [item for item in inner if isinstance(item, (dict, list))]
        if not level:
            return True
    return False


def first_error(failure: ValidationError) -> str:
    """The first key that does not fit a schema, on one line: where it is, what is wrong, and what was there."""
    first = failure.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"])) or "the file"
    got = repr(first["input"])
    given = "" if first["type"] == "missing" else f", not {got if len(got) <= 40 else got[:39] + '…'}"
    return f"{place}: {first['msg'].lower()}{given}"
