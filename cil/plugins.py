"""Somebody else's code, named by its place: ``pkg.module:Name`` or ``path/file.py:Name``.

Learners, tuners, merging rules and datasets that are not part of this package all come in through :func:`load`. A
tuner or a rule stands in a configuration as ``{class: "mine.py:Mine", rank: 4}`` (:class:`Own`): the keys beside
``class`` are the arguments of its constructor, and are checked against its signature before anything runs.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, create_model, model_serializer, model_validator
from pydantic.errors import PydanticUserError

from cil.config import Section
from cil.configfile import validated
from cil.errors import PluginError, nearest


def load(spec: str, what: str) -> Any:
    """What ``pkg.module:Name`` or ``path/file.py:Name`` names.

    A file can import the files beside it. It is run once, and anew after it was changed.

    Args:
        spec: The place; a path is relative to where the process runs.
        what: What it shall be, for messages: ``learner``, ``tuner`` …

    Raises:
        PluginError: Missing file or module, an exception while importing it, or no such name in it.
    """
    place, _, attribute = spec.rpartition(":")
    try:
        if place.endswith(".py"):
            path = Path(place).expanduser()
            if not path.is_file():
                raise PluginError(f"{what} {spec!r}: no such file {path}")
            found = path.stat()
            module = _run_file(path.resolve(), found.st_mtime_ns, found.st_size)
        else:
            module = importlib.import_module(place)
    except PluginError:
        raise
    except Exception as error:  # the user's own code may fail in any way
        raise PluginError(f"{what} {spec!r}: importing {place} failed with {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
        raise PluginError(f"{what} {spec!r}: {place} has no {attribute!r}{nearest(attribute, own)}; it defines {own}")
    return getattr(module, attribute)


@lru_cache(maxsize=32)
def _run_file(path: Path, mtime_ns: int, size: int) -> ModuleType:
    # a name of its own: a file called json.py must not take the place of Python's json for everybody else
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # pydantic and dataclasses look their module up there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # at the end, so that nothing beside it hides an installed package
    found.loader.exec_module(module)
    return module


class _Arguments(Section):
    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())


class _MoreArguments(_Arguments):
    model_config = ConfigDict(extra="allow")


def arguments(
    call: Callable[..., Any], values: dict[str, Any], *, given: Sequence[str] = (), skip: Sequence[str] = ()
) -> dict[str, Any]:
    """``values`` checked against the signature of ``call``, with its defaults filled in.

    Annotations say the types, ``Annotated[float, pydantic.Field(gt=0)]`` also ranges; what has none takes anything.

    Args:
        call: A class or function.
        values: Keyword arguments as a configuration holds them.
        given: The first positional arguments, which the library passes.
        skip: Further arguments that no configuration may name.

    Raises:
        ConfigError: Unknown or missing arguments, wrong types or values out of range; every one of them.
        PluginError: ``call`` does not take the arguments in ``given``, or cannot be asked what it takes.
    """
    parameters = list(inspect.signature(call).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < len(given):
        what = "constructor" if isinstance(call, type) else "function"
        raise PluginError(f"the {what} must take {', '.join(given)} first")
    fields: dict[str, Any] = {
        p.name: (Any if p.annotation is p.empty else p.annotation, ... if p.default is p.empty else p.default)
        for p in parameters
        if p not in positional[: len(given)]
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in skip
    }
    base = _MoreArguments if any(p.kind is p.VAR_KEYWORD for p in parameters) else _Arguments
    try:
        model = create_model(call.__name__, __base__=base, __module__=call.__module__, **fields)
        found = validated(model, values)
    except (PydanticUserError, NameError) as error:  # an annotation that cannot be evaluated or has no schema
        raise PluginError(f"its arguments cannot be checked: {str(error).splitlines()[0]}") from error
    return dict(found)


class Own(Section):
    """A class of the user's own in place of a named one: ``class``, and the arguments of its constructor.

    After validation all arguments are there, defaults included, so that a resolved configuration says them.
    """

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    what: ClassVar[str]
    """For messages."""
    given: ClassVar[tuple[str, ...]] = ()
    """The first arguments of the constructor, which the library passes."""
    skip: ClassVar[tuple[str, ...]] = ()
    """Further arguments that are no hyper-parameters."""

    name: Literal["class"] = "class"
    cls: str = Field(alias="class", description="pkg.module:Class or path/file.py:Class")

    @classmethod
    def kind(cls) -> type:
        """What the class must be derived from."""
        raise NotImplementedError

    @classmethod
    def resolve(cls, spec: str) -> Any:
        """The class at a place.

        Raises:
            PluginError: See :func:`load`; or it is no :meth:`kind`.
        """
        found, kind = load(spec, cls.what), cls.kind()
        if not (isinstance(found, type) and issubclass(found, kind)):
            raise PluginError(f"{cls.what} {spec!r} is {found!r}; it must be a subclass of {kind.__name__}")
        return found

    @model_validator(mode="before")
    @classmethod
    def _all_arguments(cls, raw: Any) -> Any:
        spec = raw.get("class", raw.get("cls")) if isinstance(raw, dict) else None
        if not isinstance(spec, str):
            return raw
        ours = {"class", *cls.model_fields}
        values = {key: value for key, value in raw.items() if key not in ours}
        try:
            filled = arguments(cls.resolve(spec), values, given=cls.given, skip=(*cls.skip, *ours))
        except PluginError as error:
            raise PluginError(str(error) if spec in str(error) else f"{cls.what} {spec!r}: {error}") from error
        return {**{key: value for key, value in raw.items() if key in ours}, **filled}

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"class": self.cls, **{k: v for k, v in handler(self).items() if k not in ("name", "cls", "class")}}

    def build(self, *given: Any) -> Any:
        """An instance of the class."""
        return self.resolve(self.cls)(*given, **(self.model_extra or {}))


def own(raw: Any) -> Any:
    """For the validator of a field that takes a name or an :class:`Own`: the tag by which pydantic tells them apart."""
    return {"name": "class", **raw} if isinstance(raw, dict) and "class" in raw and "name" not in raw else raw
