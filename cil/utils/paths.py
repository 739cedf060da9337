"""Paths as users write them: ``~`` and environment variables in them are expanded. Needs no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cil.errors import ConfigError, clipped

VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")
LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes; limits of Linux, and no less than those of other systems


def expand(path: Path | str) -> Path:
    """A path with its ``~``, ``~user``, ``$VAR`` and ``${VAR}`` replaced.

    Raises:
        ConfigError: A variable is not set or empty, there is no such user, or no file system takes the path.
    """
    text = str(path)

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise ConfigError(f"{clipped(text)}: the environment variable {clipped(name)} is not set or empty")
        return os.environ[name]

    try:
        found = Path(VARIABLE.sub(value, text)).expanduser()
    except RuntimeError:  # pathlib's answer to an unknown user
        raise ConfigError(f"{clipped(text)}: there is no user {clipped(text.split('/')[0])}") from None
    try:
        names = os.fsencode(str(found)).split(b"/")
    except UnicodeEncodeError:  # half a surrogate pair that stands for no byte
        names = [b"\0"]
    if b"\0" in b"".join(names) or sum(map(len, names)) > LONGEST_PATH or max(map(len, names)) > LONGEST_NAME:
        raise ConfigError(
            f"{clipped(text)}: no path; it may have {LONGEST_PATH} bytes, {LONGEST_NAME} per name, and no null "
            "character"
        )
    return found
