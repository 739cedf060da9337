"""Errors a user can cause.

Each is one line that says what is wrong, where, what was got, what is allowed and what to do. The command line prints
that line and exits with code 2; a traceback is only for faults of the library itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CilError(ValueError):
    """Root of every error that a user's input, file or machine can cause."""


class ConfigError(CilError):
    """A key or value of a configuration is wrong."""


class StreamError(CilError):
    """A stream cannot be built, or somebody reached for data the protocol closes to them."""


class DataError(CilError):
    """A dataset, folder or image cannot be read."""


class BackboneError(CilError):
    """Weights or an architecture that do not fit."""


class PluginError(CilError):
    """A learner, tuner, rule or dataset named in a configuration cannot be found or does not keep the contract."""


class TrainingError(CilError):
    """Training cannot go on, for instance after a loss that is not finite."""


class ExportError(CilError):
    """A model cannot be written in the format asked for, or an exported one cannot be used."""


class RunError(CilError):
    """A results folder cannot be used: another configuration, another process, a damaged or missing file."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as `` (did you mean 'increment'?)``, or an empty string when nothing known is close.

    >>> nearest("incremnt", ["base", "increment"])
    " (did you mean 'increment'?)"
    >>> nearest("zzz", ["base"])
    ''
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
