"""Errors that a user can cause.

Each message is one line that says what is wrong, where, which value was given, what is allowed and what to do. The
command line prints this line and exits with code 2; tracebacks are only for faults of the library itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
