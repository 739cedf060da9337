"""What commands print, on streams of any encoding: what a stream cannot show is replaced or escaped."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from cil.errors import printable
from cil.utils.paths import expand


class Output(io.TextIOWrapper):
    """Standard output or error. When its reader goes away, as ``head`` does, the rest is dropped without an error.

    Attributes:
        gone: Whether the reader has gone.
        replaced: The stream that this one stands for; its end would close the buffer that both share.
    """

    gone = False
    replaced: TextIO | None = None

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        self.gone = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # also for what is still in the buffers
        os.close(nowhere)


def prepare_streams() -> None:
    """Make standard output and error take every text, and survive that they are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper:
            lines, at_once = stream.line_buffering, stream.write_through  # with -u, stdout is to hold nothing back
            output = Output(stream.buffer, stream.encoding, "replace", line_buffering=lines, write_through=at_once)
            output.replaced = stream
            setattr(sys, name, output)


def say(text: str, *, err: bool = False, file: TextIO | None = None) -> None:
    """Print a text; characters that are invisible, or that the stream does not have, are printed as escapes.

    Args:
        text: The text.
        err: Whether to print to standard error.
        file: The stream; default: the one that ``err`` says.
    """
    stream = file or (sys.stderr if err else sys.stdout)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = "\n".join(map(printable, text.split("\n")))
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def expanded(path: Any) -> Any:
    """For the callback of an option: a path, or several, with ``~`` and variables expanded, as shells do.

    A file or folder that has the name as it is written is taken first.

    Raises:
        ConfigError: See :func:`cil.utils.paths.expand`.
    """
    if isinstance(path, list | tuple):
        return [expanded(one) for one in path]
    return expand(path) if isinstance(path, Path) and not os.path.lexists(path) else path
