"""What is wrong with a configuration, in lines that name the key, the value, and the nearest valid key."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ValidationError

from cil.config.renamed import new_name
from cil.errors import clipped, nearest, shortened

MOST_LINES = 10
WORDS = {
    "path_type": "should be a path",
    "model_type": "should be a section of keys and values",
    "int_from_float": "should be a valid integer",
    "int_parsing_size": "should be a valid integer",
}
SHOULD = "should be "


class Wrong(NamedTuple):
    """A line of an explanation: the key, what is wrong with its value, the value, and whether the key stands first."""

    key: str
    problem: str
    got: str = ""
    first: bool = True

    @property
    def line(self) -> str:
        return f"{self.key}: {self.problem}{self.got}" if self.first and self.key else self.problem + self.got


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Format pydantic's errors, one line per wrong key and at most ten, each with ``prefix``."""
    found: list[Wrong] = []
    for item in islice(error.errors(include_url=False), 20 * MOST_LINES):  # a key has one for each type it may have
        where, fields = _place(model, [str(part) for part in item["loc"]])
        for wrong in _wrong(item, where, fields):
            last = found[-1] if found else None
            if last and wrong.problem.startswith(SHOULD) and (last.key, last.got) == (wrong.key, wrong.got):
                other = wrong.problem.removeprefix(SHOULD)
                if other not in last.problem:
                    found[-1] = last._replace(problem=f"{last.problem} or {other}")
            else:
                found.append(wrong)
    # a value that has one of the types of a union, but a wrong one, need not have another of them
    return _joined([wrong for wrong in found if not any(_says_more(w, wrong) for w in found)], prefix)


def explain_unknown(keys: Iterable[tuple[Sequence[str], Sequence[str]]], prefix: str = "") -> str:
    """The same lines for unknown keys: (path of the key, keys that are known there)."""
    return _joined([_unknown(where, fields) for where, fields in keys], prefix)


def _joined(found: Iterable[Wrong], prefix: str) -> str:
    lines = list(dict.fromkeys(prefix + wrong.line for wrong in found))
    more = [f"{prefix}and {len(lines) - MOST_LINES} more mistakes"] if len(lines) > MOST_LINES else []
    return "\n".join([*lines[:MOST_LINES], *more])


def _says_more(other: Wrong, wrong: Wrong) -> bool:
    same_value = other.key == wrong.key and not other.problem.startswith(SHOULD)
    return wrong.problem.startswith(SHOULD) and (same_value or other.key.startswith(f"{wrong.key}."))


def _wrong(item: Mapping[str, Any], where: list[str], fields: Sequence[str]) -> list[Wrong]:
    """What one of pydantic's errors says; ``fields`` are the valid keys at its place."""
    key, kind, context = _dotted(where), item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return [_unknown(where, fields)]
    if kind == "missing":
        return [Wrong(key, f"{key} is missing", first=False)]
    if kind == "union_tag_not_found":
        return [Wrong(key, f"{key}.{context['discriminator'].strip(chr(39))} is missing", first=False)]
    if kind == "union_tag_invalid":
        tags = context["expected_tags"].replace("'", "").split(", ")
        own = ", or class: file.py:Class" if "class" in tags else ""
        tags = [known for known in tags if known != "class"]
        tag = context["tag"]
        return [Wrong(key, f"unknown {shortened(tag)}{nearest(tag, tags)}; known here: {', '.join(tags)}{own}")]
    message = WORDS.get(kind) or item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    given = shortened(item["input"])
    told = kind == "value_error" and given.strip("'") in message
    got = "" if told or isinstance(item["input"], dict) else f", got {given}"
    return [Wrong(key, line, got) for line in message.splitlines()]


def _dotted(where: Sequence[str]) -> str:
    return ".".join(clipped(part, 40) for part in where)


def _unknown(where: Sequence[str], fields: Sequence[str]) -> Wrong:
    """The line of a key that is none of the ``fields``."""
    key, last = _dotted(where), where[-1]
    if renamed := new_name(last, list(fields)):
        return Wrong(key, f"the key {key} is now called {'.'.join([*where[:-1], renamed])}", first=False)
    known = f"; known here: {', '.join(sorted(fields))}" if fields else ""
    known = "" if difflib.get_close_matches(last, fields) else known
    return Wrong(key, f"unknown key {key}{nearest(last, fields)}{known}", first=False)


def _place(model: type[BaseModel], loc: Sequence[str]) -> tuple[list[str], list[str]]:
    """The key of an error as the user wrote it, and the field names that are valid there."""
    key: list[str] = []
    here: Any = model  # the type of what stands at the key
    for part in loc:
        kinds = kinds_of(here)
        if len(kinds) > 1:  # pydantic puts the type that it tried into the path, but it is no key
            here = next((kind for kind in kinds if _is_called(kind, part)), Any)
            continue
        here = kinds[0] if kinds else Any
        key.append(part)
        if is_model(here):
            model = here
            by_key = {info.alias or name: info for name, info in model.model_fields.items()}
            here = by_key[part].annotation if part in by_key else Any
        else:
            inner = [kind for kind in typing.get_args(here) if kind is not ...]
            here = inner[min(int(part), len(inner) - 1) if part.isdecimal() else -1] if inner else Any
    return key, [info.alias or name for name, info in model.model_fields.items()]


def kinds_of(annotation: Any) -> list[Any]:
    """The types of a union without None, or the one type that an annotation is."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return kinds_of(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [kind for inner in typing.get_args(annotation) for kind in kinds_of(inner)]
    return [] if annotation is type(None) else [annotation]


def _is_called(kind: Any, part: str) -> bool:
    """Whether pydantic calls a member of a union ``part``: by the value of its tag, its class, or its form."""
    if is_model(kind):
        tag = kind.model_fields["name"].default if "name" in kind.model_fields else None
        return part == tag or kind.__name__ in part
    return part.startswith(f"{getattr(typing.get_origin(kind), '__name__', '-')}[")


def is_model(kind: Any) -> bool:
    """Whether a type is a class of keys, such as a section."""
    return isinstance(kind, type) and not isinstance(kind, types.GenericAlias) and issubclass(kind, BaseModel)
