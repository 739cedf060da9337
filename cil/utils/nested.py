"""Nested dictionaries as flat ones. Imports nothing from this package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def flatten(value: dict[str, Any], *, lists: bool = False, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a nested dictionary; an empty dictionary is a leaf.

    Args:
        value: The dictionary.
        lists: Whether lists of dictionaries are flattened, too, with positions as keys; by default they are leaves.
        prefix: Text in front of every key.

    >>> list(flatten({"a": {"b": 1, "c": {}}, "d": [{"e": 2}]}))
    [('a.b', 1), ('a.c', {}), ('d', [{'e': 2}])]
    >>> list(flatten({"d": [{"e": 2}]}, lists=True))
    [('d.0.e', 2)]
    """
    for key, inner in value.items():
        if lists and isinstance(inner, list) and inner and isinstance(inner[0], dict):
            inner = dict(enumerate(inner))
        if isinstance(inner, dict) and inner:
            yield from flatten(inner, lists=lists, prefix=f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
