"""Reading a configuration: YAML, one level of ``extends:``, ``key=value`` overrides, and errors that name the key."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from cil.config.renamed import new_name
from cil.config.schema import Config, as_section
from cil.errors import ConfigError, nearest

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
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = shipped()
    plain = name.removeprefix("configs/").removesuffix(".yaml")
    if plain in known:
        return known[plain]
    raise ConfigError(
        f"{name}: no such file, nor a shipped configuration{nearest(plain, known)}; see `cil list configs`"
    )


def read(path: Path) -> dict[str, Any]:
    """One YAML file as a dictionary, on top of the file that its key ``extends`` names (one level).

    Raises:
        ConfigError: The file is not YAML or not a mapping, or the extended file is missing or extends another one.
    """
    raw = _yaml(path)
    if "base" in raw:
        raise ConfigError(f"{path}: the key base is now called extends; write extends: {raw['base']}")
    base = raw.pop("extends", None)
    if base is None:
        return raw
    below = _yaml(path.parent / str(base))
    if "extends" in below:
        raise ConfigError(f"{path}: extends: {base} extends another file itself; one level is allowed")
    return _merge(below, raw)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(raw).__name__}")
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
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"{assignment!r}: an override is key=value, e.g. stream.increment=10")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{assignment!r}: the value is not valid YAML: {' '.join(str(error).split())}") from None
        *path, last = key.split(".")
        if path[:1] == ["learner"] and "learners" in raw:
            if len(raw["learners"]) != 1:
                raise ConfigError(
                    f"{assignment!r}: the configuration has {len(raw['learners'])} learners; "
                    f"write learners.<name>.{last}=…"
                )
            path = ["learners", _title(raw["learners"][0]), *path[1:]]
        if path[:1] == ["learners"] and len(path) == 1:  # a learner is a section, not a value
            raise ConfigError(f"{assignment!r}: write learners.{last}.<key>=value, or learners=[{last}]")
        if key in ("learner", "learners"):
            raw.pop("learner", None)
            raw.pop("learners", None)
        _descend(raw, path, assignment)[last] = value
    return raw


def _descend(raw: dict[str, Any], path: list[str], assignment: str) -> dict[str, Any]:
    here: Any = raw
    for depth, part in enumerate(path):
        if isinstance(here, list):
            titles = [_title(item) for item in here]
            if part not in titles:
                raise ConfigError(
                    f"{assignment!r}: no learner {part!r}{nearest(part, titles)}; there are {', '.join(titles)}"
                )
            position = titles.index(part)
            here[position] = here = as_section(here[position])
            continue
        child = here.get(part)
        if isinstance(child, str) and part == "learner":
            child = here[part] = as_section(child)
        if child is None:
            child = here[part] = {}
        if not isinstance(child, (dict, list)):
            raise ConfigError(f"{assignment!r}: {'.'.join(path[: depth + 1])} is a value, not a section")
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
    return {"name": path.stem, **override(read(path), overrides)}


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


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Format pydantic's errors as lines that name the key, the value, and the nearest valid key."""
    lines = []
    for item in error.errors():
        where, fields = _place(model, [str(part) for part in item["loc"]])
        key = ".".join(where)
        if item["type"] == "extra_forbidden" and (renamed := new_name(where[-1], fields)):
            lines.append(f"{prefix}the key {key} is now called {'.'.join([*where[:-1], renamed])}")
        elif item["type"] == "extra_forbidden":
            known = (
                f"; known here: {', '.join(sorted(fields))}"
                if fields and not difflib.get_close_matches(where[-1], fields)
                else ""
            )
            lines.append(f"{prefix}unknown key {key}{nearest(where[-1], fields)}{known}")
        elif item["type"] == "missing":
            lines.append(f"{prefix}{key} is missing")
        elif item["type"] == "union_tag_not_found":
            lines.append(f"{prefix}{key}.{item['ctx']['discriminator'].strip(chr(39))} is missing")
        elif item["type"] == "union_tag_invalid":
            tag, tags = item["ctx"]["tag"], item["ctx"]["expected_tags"].replace("'", "").split(", ")
            own = ", or class: file.py:Class" if "class" in tags else ""
            tags = [known for known in tags if known != "class"]
            lines.append(f"{prefix}{key}: unknown {tag!r}{nearest(tag, tags)}; known here: {', '.join(tags)}{own}")
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
            got = "" if isinstance(item["input"], dict) else f", got {item['input']!r}"
            lines += [f"{prefix}{key + ': ' if key else ''}{line}{got}" for line in message.splitlines()]
    return "\n".join(dict.fromkeys(lines))


def _place(model: type[BaseModel], loc: list[str]) -> tuple[list[str], list[str]]:
    """The key of an error as the user wrote it, and the field names that are valid there."""
    key, models = [], [model]  # there are several models until the tag of a union decides
    for i, part in enumerate(loc):
        if part.startswith(("function-", "constrained-")):
            continue
        tags = {m.model_fields["name"].default: m for m in models if "name" in m.model_fields}
        if len(models) > 1 and part in tags:
            models = [tags[part]]
            continue  # pydantic puts the tag of a union into the path, but it is no key
        key.append(part)
        info = models[0].model_fields.get(part)
        if i < len(loc) - 1 and info is not None:  # else a list position
            models = _models(info.annotation) or models
    return key, [f.alias or name for name, f in models[0].model_fields.items()]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models in a type such as ``Model | None`` or ``list[Annotated[A | B, …]]``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for inner in typing.get_args(annotation) for model in _models(inner)]
