"""What every number of a configuration has to be, whatever its own range: a number that numpy and torch can take."""

from __future__ import annotations

import math
import typing
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from cil.errors import shortened

LARGEST_SEED = 2**32 - 1
"""numpy's generators take seeds up to this."""
LARGEST_INTEGER = 2**63 - 1
LARGEST_FLOAT = 3.4e38  # the largest of float32, in which learners compute


def is_number(annotation: Any) -> bool:
    """Whether values of a type are numbers or contain some, and none of them may be true or false."""
    kinds = set(_leaves(annotation))
    return bool(kinds & {int, float}) and bool not in kinds


def _leaves(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is Literal:
        yield from map(type, typing.get_args(annotation))
    elif inner := typing.get_args(annotation):
        for one in inner:
            yield from _leaves(one)
    else:
        yield annotation


class Truth:
    """True or false where a number belongs. Pydantic takes them for 1 and 0, but no field takes this."""

    def __init__(self, value: bool) -> None:
        self._value = value

    def __repr__(self) -> str:
        return str(self._value)


def mark_truth(value: Any) -> Any:
    """A value from a configuration for a field of numbers, with a :class:`Truth` in place of every bool."""
    if isinstance(value, list | tuple):
        return [mark_truth(one) for one in value]
    return Truth(value) if isinstance(value, bool) else value


def check_range(value: Any) -> Any:
    """The value itself, if numpy and torch can compute with every number in it.

    Raises:
        ValueError: A number is too large.
    """
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, int) and abs(one) > LARGEST_INTEGER:
            raise ValueError(f"should be an integer of at most {LARGEST_INTEGER}")
        if isinstance(one, float) and LARGEST_FLOAT < abs(one) < math.inf:
            raise ValueError(f"should be a number of at most {LARGEST_FLOAT:g}")
    return value


def check_order(order: Any) -> Any:
    """A class order or a seed itself, if a stream can have it.

    Raises:
        ValueError: A seed that numpy does not take, a list without or with a repeated entry, or an unknown name.
    """
    if isinstance(order, int) and not 0 <= order <= LARGEST_SEED:
        raise ValueError(f"a seed is 0 to {LARGEST_SEED}")
    if isinstance(order, str) and order != "natural":
        raise ValueError("unknown class order; allowed: natural, an integer seed, a list of classes")
    if isinstance(order, list):
        twice = next((one for one, count in Counter(order).items() if count > 1), None)
        if not order or twice is not None:
            found = "is empty" if not order else f"has {shortened(twice)} twice"
            raise ValueError(f"an explicit class order has each class once; this one {found}")
        if any(isinstance(one, int) and not 0 <= one <= LARGEST_SEED for one in order):
            raise ValueError("the classes of an explicit order are counted from 0")
    return order
