"""Reading a configuration: YAML, one level of ``extends:``, ``key=value`` overrides, and errors that name the key."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cil.config.explaining import explain
from cil.config.names import fitting
from cil.config.parsing import DEEPEST, MOST_BYTES, parse
from cil.config.schema import Config, as_section
from cil.errors import ConfigError, clipped, nearest, shortened
from cil.utils.paths import expand

M = TypeVar("M", bound=BaseModel)


def shipped() -> dict[str, Path]:
    """Configurations that come with the package, by name (``split_tiny_imagenet100/ncm``)."""
    inside = Path(str(files("cil"))) / "configs"  # in an installed package; a checkout has them beside it
    root = inside if inside.is_dir() else Path(str(files("cil"))).parent / "configs"
    return {
        p.relative_to(root).with_suffix("").as_posix(): p
        for p in sorted(root.rglob("*.yaml"))
        if not p.name.startswith("_")  # files that others extend
    }


def find(name: str) -> Path:
    """The file of a configuration: a path, or the name of a shipped one.

    Raises:
        ConfigError: Neither exists.
    """
    path = expand(name)
    if os.path.isfile(path):  # noqa: PTH113 - pathlib raises where a folder may not be read
        return path
    known = shipped()
    plain = name.removeprefix("configs/").removesuffix(".yaml")
    if plain in known:
        return known[plain]
    if os.path.isdir(path):  # noqa: PTH112
        raise ConfigError(f"{clipped(name, 200)}: is a folder; give a YAML file in it")
    raise ConfigError(
        f"{clipped(name, 200)}: no such file, nor a shipped configuration{nearest(plain, known)}; "
        "see `cil list configs`"
    )


def read(path: Path) -> dict[str, Any]:
    """One YAML file as a dictionary, on top of the file that its key ``extends`` names (one level).

    Raises:
        ConfigError: The file is not YAML or not a mapping, or the extended file is missing or extends another one.
    """
    where, raw = clipped(str(path), 200), _yaml(path)
    if "base" in raw:
        raise ConfigError(f"{where}: the key base is now called extends; write extends: {clipped(str(raw['base']))}")
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{where}: extends: expected the name of a file, got {shortened(base)}")
    below = _yaml(path.parent / expand(base))
    if "extends" in below:
        raise ConfigError(f"{where}: extends: {clipped(base)} extends another file itself; one level is allowed")
    return _merge(below, raw)


def _yaml(path: Path) -> dict[str, Any]:
    where = clipped(str(path), 200)
    try:
        if path.exists() and not path.is_file():  # a folder, a pipe, or a device that never ends
            raise ConfigError(f"{where}: is no file")
        with path.open("rb") as file:
            content = file.read(4 * MOST_BYTES)  # one byte more than a text of this length needs, at least
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror})") from None
    try:
        raw = parse(content.decode("utf-8-sig"), where)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where}: not UTF-8 text (byte {error.start + 1} is 0x{content[error.start]:02x}); save it as UTF-8"
        ) from None
    if not isinstance(raw, dict):
        got = "nothing" if raw is None else type(raw).__name__
        raise ConfigError(f"{where}: expected keys and values, got {got}")
    return raw


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    if "learner" in above or "learners" in above:
        merged.pop("learner", None)
        merged.pop("learners", None)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def override(raw: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply ``a.b=value`` assignments, the value in YAML.

    ``learner.lr=0.1`` reaches the only learner, ``learners.ncm.metric=euclidean`` the one of that name or label.

    Raises:
        ConfigError: No ``=``, or a path through something that is no section.

    >>> override({"stream": {"increment": 2}}, ["stream.increment=5", "name=x"])
    {'stream': {'increment': 5}, 'name': 'x'}
    """
    raw = _copy(raw)
    for assignment in assignments:
        shown = shortened(assignment)
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"{shown}: an override is key=value, e.g. stream.increment=10")
        value = parse(text, shown)
        *path, last = key.split(".")
        if not all([*path, last]) or len(path) >= DEEPEST:
            raise ConfigError(f"{shown}: {clipped(key)} is no key; write names with single dots, e.g. stream.increment")
        learners = raw.get("learners")
        if path[:1] == ["learner"] and isinstance(learners, list):
            if len(learners) != 1:
                raise ConfigError(
                    f"{shown}: the configuration has {len(learners)} learners; write learners.<name>.{clipped(last)}=…"
                )
            path = ["learners", _title(learners[0]), *path[1:]]
        if path[:1] == ["learners"] and len(path) == 1:  # a learner is a section, not a value
            name = clipped(last)
            raise ConfigError(f"{shown}: write learners.{name}.<key>=value, or learners=[{name}]")
        if key in ("learner", "learners"):
            raw.pop("learner", None)
            raw.pop("learners", None)
        _descend(raw, path, shown)[last] = value
    return raw


def _descend(raw: dict[str, Any], path: list[str], shown: str) -> dict[str, Any]:
    """The section at ``path``, which is made where it is missing; ``shown`` is the override, for messages."""
    here = raw
    for depth, part in enumerate(path):
        child: Any = here.get(part)
        place = clipped(".".join(path[: depth + 1]))
        if path[: depth + 1] == ["learners"] and isinstance(child, list):
            continue
        if path[:depth] == ["learners"] and isinstance(raw.get("learners"), list):
            entries = raw["learners"]
            titles = [_title(item) for item in entries]
            if part not in titles:
                there = ", ".join(map(clipped, titles)) or "none"
                raise ConfigError(
                    f"{shown}: no learner {shortened(part)}{nearest(part, titles)}; there are {clipped(there, 200)}"
                )
            position = titles.index(part)
            child = entries[position] = as_section(entries[position])
        elif isinstance(child, str) and part == "learner":
            child = here[part] = as_section(child)
        if child is None:
            child = here[part] = {}
        if isinstance(child, list):
            raise ConfigError(f"{shown}: {place} is a list; give all of it: {place}=[…]")
        if not isinstance(child, dict):
            raise ConfigError(f"{shown}: {place} is a value, not a section")
        here = child
    return here


def _title(item: Any) -> str:
    item = as_section(item)
    if isinstance(item, dict):
        return str(item.get("label") or item.get("name") or str(item.get("class", "")).rsplit(":", 1)[-1])
    return str(item)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def read_raw(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A configuration from a file or a shipped name, with overrides, before validation.

    Raises:
        ConfigError: No such file, no YAML, or an override that has no place.
    """
    path = find(name)
    return {"name": fitting(path.stem), **override(read(path), overrides)}


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """A validated configuration from a file or a shipped name, with overrides.

    Raises:
        ConfigError: Every wrong key at once, one line each.
    """
    return validated(Config, read_raw(name, overrides), prefix="config: ")


def validated(model: type[M], values: Any, prefix: str = "") -> M:
    """``values`` as an instance of ``model``.

    Raises:
        ConfigError: Every wrong key at once, one line each, each with ``prefix``.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, model, prefix)) from None
