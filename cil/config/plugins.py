"""Loading external code, given as ``pkg.module:Name`` or ``path/file.py:Name``.

Learners, tuners, merging rules and datasets from outside this package are all loaded by :func:`load_object`. A
configuration names a tuner or a rule as ``{class: "mine.py:Mine", rank: 4}`` (:class:`CustomObject`): the keys beside
``class`` are arguments of its constructor, and are checked against its signature before anything runs.
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

from cil.config.reading import validated
from cil.config.schema import Section
from cil.errors import PluginError, clipped, nearest, shortened
from cil.utils.paths import expand


def load_object(spec: str, what: str) -> Any:
    """Import the object at ``pkg.module:Name`` or ``path/file.py:Name``.

    A file can import the files beside it. It is executed once, and again after it changes.

    Args:
        spec: Where the object is; a path is relative to the working folder.
        what: What the object is, for messages: ``learner``, ``tuner`` …

    Raises:
        PluginError: Missing file or module, an exception while importing it, or no such name in it.
        ConfigError: The path cannot be expanded.
    """
    place, _, attribute = spec.rpartition(":")
    named = f"{what} {clipped(repr(spec), 200)}"
    path = expand(place) if place.endswith(".py") else None
    try:
        if path is not None:
            if not path.is_file():
                raise PluginError(f"{named}: no such file {clipped(str(path), 150)}")
            status = path.stat()
            module = _run_file(path.resolve(), status.st_mtime_ns, status.st_size)
        else:
            module = importlib.import_module(place)
    except PluginError:
        raise
    except Exception as error:  # the user's own code may fail in any way
        raise PluginError(
            f"{named}: importing {clipped(place, 150)} failed with {type(error).__name__}: {clipped(str(error), 150)}"
        ) from error
    if not hasattr(module, attribute):
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
        raise PluginError(
            f"{named}: {clipped(place, 150)} has no {shortened(attribute)}{nearest(attribute, own)}; "
            f"it defines {shortened(own)}"
        )
    return getattr(module, attribute)


@lru_cache(maxsize=32)
def _run_file(path: Path, mtime_ns: int, size: int) -> ModuleType:
    # a unique name: a file called json.py must not replace Python's json for all other code
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic and dataclasses look their module up there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # at the end, so that no file beside it hides an installed package
    spec.loader.exec_module(module)
    return module


class _Arguments(Section):
    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())


class _MoreArguments(_Arguments):
    model_config = ConfigDict(extra="allow")


def arguments(
    call: Callable[..., Any], values: dict[str, Any], *, given: Sequence[str] = (), skip: Sequence[str] = ()
) -> dict[str, Any]:
    """``values`` checked against the signature of ``call``, with its defaults filled in.

    Annotations give types, and ``Annotated[float, pydantic.Field(gt=0)]`` also ranges. An argument without an
    annotation accepts anything.

    Args:
        call: A class or function.
        values: Keyword arguments from a configuration.
        given: The first positional arguments, which the library passes.
        skip: Further arguments that no configuration may name.

    Raises:
        ConfigError: Unknown or missing arguments, wrong types or values out of range; every one of them.
        PluginError: ``call`` does not take the arguments in ``given``, or its signature cannot be read.
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
        checked = validated(model, values)
    except (PydanticUserError, NameError) as error:  # an annotation that cannot be evaluated or has no schema
        raise PluginError(f"its arguments cannot be checked: {str(error).splitlines()[0]}") from error
    return dict(checked)


class CustomObject(Section):
    """A custom class in place of a named one: ``class``, and the arguments of its constructor.

    After validation all arguments are present, defaults included, so that a resolved configuration is complete.
    """

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    what: ClassVar[str]
    """What the object is, for messages."""
    given: ClassVar[tuple[str, ...]] = ()
    """The first arguments of the constructor, which the library passes."""
    skip: ClassVar[tuple[str, ...]] = ()
    """Further arguments that are not hyper-parameters."""

    name: Literal["class"] = "class"
    cls: str = Field(alias="class", description="pkg.module:Class or path/file.py:Class")

    @classmethod
    def kind(cls) -> type:
        """The class from which it must be derived."""
        raise NotImplementedError

    @classmethod
    def resolve(cls, spec: str) -> Any:
        """Import the class.

        Raises:
            PluginError: See :func:`load_object`; or the class is not derived from :meth:`kind`.
        """
        custom, kind = load_object(spec, cls.what), cls.kind()
        if not (isinstance(custom, type) and issubclass(custom, kind)):
            named = f"{cls.what} {clipped(repr(spec), 200)}"
            raise PluginError(f"{named} is {shortened(custom)}; it must be a subclass of {kind.__name__}")
        return custom

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
            shown = clipped(repr(spec), 200)
            raise PluginError(str(error) if shown in str(error) else f"{cls.what} {shown}: {error}") from error
        return {**{key: value for key, value in raw.items() if key in ours}, **filled}

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"class": self.cls, **{k: v for k, v in handler(self).items() if k not in ("name", "cls", "class")}}

    def build(self, *given: Any) -> Any:
        """An instance of the class."""
        return self.resolve(self.cls)(*given, **(self.model_extra or {}))


def as_custom(raw: Any) -> Any:
    """For the validator of a field that takes a name or a :class:`CustomObject`: adds the tag that tells them apart."""
    return {"name": "class", **raw} if isinstance(raw, dict) and "class" in raw and "name" not in raw else raw
