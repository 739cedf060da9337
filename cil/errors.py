"""Errors that a user can cause.

Each message is one line that says what is wrong, where, which value was given, what is allowed and what to do. The
command line prints this line and exits with code 2; tracebacks are only for faults of the library itself.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


class CilError(ValueError):
    """Root of every error that a user's input, file or machine can cause."""


class ConfigError(CilError):
    """A key or value of a configuration is wrong."""


class StreamError(CilError):
    """A stream cannot be built, or code has read data that the protocol closes to it."""


class DataError(CilError):
    """A dataset, folder or image cannot be read."""


class BackboneError(CilError):
    """Weights or an architecture do not fit, or cannot be loaded."""


class PluginError(CilError):
    """A learner, tuner, rule or dataset named in a configuration cannot be found or violates the contract."""


class TrainingError(CilError):
    """Training cannot continue, e.g. after a non-finite loss."""


class ExportError(CilError):
    """A model cannot be written in the requested format, or an exported model cannot be used."""


class RunError(CilError):
    """A results folder cannot be used: it has another configuration, is in use by another process, or a file is damaged
    or missing."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as `` (did you mean 'increment'?)``, or an empty string if no known word is similar.

    >>> nearest("incremnt", ["base", "increment"])
    " (did you mean 'increment'?)"
    >>> nearest("zzz", ["base"])
    ''
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def printable(text: str) -> str:
    """``text`` on one line: control characters, line breaks and invisible marks (bidirectional ones too) as escapes.

    >>> print(printable("caf\\xe9 \\x1b[31mred\\n"))
    café \\x1b[31mred\\n
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def clipped(text: str, most: int = 100) -> str:
    """``text`` made :func:`printable`; what exceeds ``most`` characters is cut out of its middle.

    >>> clipped("a" * 50 + "b" * 50, 11)
    'aaaa...bbbb'
    """
    text = printable(text)
    side = (most - 3) // 2
    return text if len(text) <= most else f"{text[:side]}...{text[-side:]}"


def shortened(value: Any) -> str:
    """The representation of a value a user gave, on one line of at most 100 characters.

    >>> shortened([1.5, "x", {"a": None}])
    "[1.5, 'x', {'a': None}]"
    >>> shortened(10**5000)
    'an integer of 5001 digits'
    """
    return clipped(_representation.repr(value))


class _Representation(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() <= 128:
            return repr(value)
        return f"an integer of {int(value.bit_length() * 0.30103) + 1} digits"  # Python refuses to print long ones


_representation = _Representation()
_representation.maxstring = _representation.maxother = 100
_representation.maxlist = _representation.maxtuple = _representation.maxdict = 10
