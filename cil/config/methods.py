"""What the built-in learners, tuners and merging rules are called, what they do, and which keys they have.

All of it is read from ``methods.json`` beside this file, so that lists and a misspelt key do not wait for torch, which
the classes need. ``python -m scripts.publish.methods`` writes the file from the classes, and a test compares both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, TypedDict

FILE = files("cil") / "config" / "methods.json"


class LearnerFacts(TypedDict):
    """A learner: the attributes of its class, and the name of its hyper-parameters among the sections."""

    summary: str
    trains: str
    stores_images: bool
    keys: str


class PartFacts(TypedDict):
    """A tuner, merging rule or finaliser: what it does, and its hyper-parameters with their defaults as a text."""

    summary: str
    hyper_parameters: str


class Methods(TypedDict):
    """Everything in the file, by name.

    A section has the keys of one class of hyper-parameters. The value of a key is the name of a further section where
    the key holds one, a table (value of ``name`` → section) where it holds one of several, and null elsewhere.
    """

    learners: dict[str, LearnerFacts]
    tuners: dict[str, PartFacts]
    rules: dict[str, PartFacts]
    sections: dict[str, dict[str, str | dict[str, str] | None]]


@cache
def methods() -> Methods:
    """The content of the file."""
    content: Methods = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def unknown_keys(learner: str, parameters: Mapping[str, Any]) -> list[tuple[list[str], list[str]]]:
    """Keys among a learner's hyper-parameters that it does not have: (path of the key, keys that are known there).

    Keys inside lists and of your own classes are not looked at, and neither are values.

    Args:
        learner: Name of a built-in learner; of another one nothing is known here, and nothing is found.
        parameters: Its hyper-parameters as written in a configuration.

    >>> unknown_keys("ranpac", {"projectin": 5, "tuner": {"name": "ssf", "scale": 2}})[1]
    (['tuner', 'scale'], ['name'])
    """
    facts = methods()["learners"].get(learner)
    return [] if facts is None else list(_unknown(facts["keys"], parameters, ()))


def _unknown(section: str, values: Mapping[str, Any], above: Sequence[str]) -> Iterator[tuple[list[str], list[str]]]:
    known = methods()["sections"][section]
    for key, value in values.items():
        if key not in known:
            yield [*above, str(key)], list(known)
            continue
        inner = known[key]
        if isinstance(inner, dict):
            inner = inner.get(str(value.get("name"))) if isinstance(value, Mapping) else None
        if inner is not None and isinstance(value, Mapping):
            yield from _unknown(inner, value, (*above, key))
