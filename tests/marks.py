"""Marks and lists that several test files share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from cil.learners import registry


def slow_beyond(fast: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Parameters of which those in ``fast`` run always and the others, which repeat them, are slow."""
    fast, found = list(fast), []
    for value in values:
        arguments = value if isinstance(value, tuple) else (value,)
        found.append(pytest.param(*arguments, marks=() if value in fast else pytest.mark.slow))
    return found


def on_any_backbone() -> list[str]:
    """Built-in learners that need no text side; the others are tested on vision-language backbones."""
    return [name for name in registry.BUILTIN if not registry.resolve(name).needs_text]
