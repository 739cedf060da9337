"""Waiting for what another process does, never without an end."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest


def until(there: Callable[[], object], seconds: float, problem: str | Callable[[], str]) -> None:
    """Return as soon as ``there()`` is true; fail with ``problem`` if it is not after so many seconds."""
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() > deadline:
            pytest.fail(f"after {seconds:g} s: {problem() if callable(problem) else problem}")
        time.sleep(0.01)
