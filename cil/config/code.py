"""Custom code that a configuration names: its place as an absolute path, and digests of its source files.

A run is bound to what its code was, not to where it was: its results record a SHA-256 for each file of a custom class,
which are the file of the class and the files beside it (or in its package) that it imports.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cil.config.plugins import load_object
from cil.errors import PluginError

log = logging.getLogger(__name__)
PATHS = (("data", "root"), ("data", "class_names"), ("backbone", "weights"), ("hardware", "feature_store"))
"""Keys of a configuration that may hold a path; so may ``weights`` of each of several backbones."""
NO_PATHS = ("random", "off")
"""Values of these keys that are no paths."""


def with_paths(config: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A plain configuration with every path in it changed: data, weights, feature store, and files of custom code."""
    new = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    for section, key in PATHS:
        if isinstance(new.get(section), Mapping):
            new[section] = _with_path(new[section], key, change)
    if isinstance(new.get("backbones"), list):
        new["backbones"] = [_with_path(section, "weights", change) for section in new["backbones"]]
    dataset = new.get("data", {}).get("dataset", "")
    if ":" in dataset:
        new["data"]["dataset"] = _with_place(dataset, change)
    new["learners"] = [with_classes(entry, lambda spec: _with_place(spec, change)) for entry in new["learners"]]
    return new


def _with_path(section: Mapping[str, Any], key: str, change: Callable[[str], str]) -> dict[str, Any]:
    value = section.get(key)
    return dict(section) if value is None or value in NO_PATHS else {**section, key: change(value)}


def with_classes(entry: Any, change: Callable[[str], str]) -> Any:
    """A learner's section with every custom class in it changed, at any depth (``{tuner: {class: …}}``)."""
    if isinstance(entry, Mapping):
        return {
            key: change(value) if key == "class" and isinstance(value, str) else with_classes(value, change)
            for key, value in entry.items()
        }
    return [with_classes(item, change) for item in entry] if isinstance(entry, list) else entry


def _with_place(spec: str, change: Callable[[str], str]) -> str:
    place, _, name = spec.rpartition(":")
    return f"{change(place)}:{name}" if place.endswith(".py") else spec


def absolute(path: str) -> str:
    """A path that means the same in every working folder; links in it stay as they are."""
    return os.path.normpath(Path(path).expanduser().absolute())


def found(entry: Mapping[str, Any], given: Sequence[Path] = ()) -> dict[str, Any]:
    """A recorded learner's section with the places where the files of its custom classes are now.

    A file is looked for among ``given`` first, then where it was, then in the working folder.

    Args:
        entry: The section of a learner.
        given: New places of the files, each with the name it had; a single file may have another name.

    Raises:
        PluginError: A file is in none of these places.
    """

    def place(path: str) -> str:
        names = [file for file in given if file.name == Path(path).name] or list(given if len(given) == 1 else ())
        for candidate in (*names, Path(path).expanduser(), Path(Path(path).name)):
            if candidate.is_file():
                return str(candidate)
        raise PluginError(f"{path}: no such file, and the model needs its code; give its new place: --code FILE.py")

    return with_classes(entry, lambda spec: _with_place(spec, place))


def digests(entry: Mapping[str, Any], cls: type) -> dict[str, str]:
    """SHA-256 of every source file of the custom code in a learner's section, by a name without a folder.

    The file of a class has the key of the section that names it (``class``, ``tuner.class``), and files that it imports
    have their paths relative to it. Code of this package has none: its version identifies it.

    Args:
        entry: The section of a learner.
        cls: The learner's class.
    """
    parts: dict[str, Any] = {"class": cls}
    for key, spec in _classes(entry):
        if key != "class":
            parts[key] = load_object(spec, key.rpartition(".")[0])
    sums: dict[str, str] = {}
    for key, part in parts.items():
        module = sys.modules.get(part.__module__)
        file = getattr(module, "__file__", None)
        if part.__module__.split(".")[0] == "cil" or file is None:
            continue
        main = Path(file)
        for name, source in _sources(main, part.__module__):
            sums[key if source == main else name] = hashlib.sha256(source.read_bytes()).hexdigest()
    return sums


def warn_if_changed(recorded: Mapping[str, str] | None, entry: Mapping[str, Any], cls: type, what: object) -> None:
    """Log a warning if custom code is not what it was when a model was trained.

    Args:
        recorded: The :func:`digests` of that time; None if it recorded none.
        entry: The section of the learner.
        cls: Its class.
        what: The model, for the message.
    """
    if recorded is None or (now := digests(entry, cls)) == recorded:
        return
    changed = sorted(name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name))
    log.warning(
        "%s: the code of its learner has changed since it was trained (%s); its answers may differ from its results",
        what,
        ", ".join(changed),
    )


def _classes(entry: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in entry.items() if isinstance(entry, Mapping) else ():
        if key == "class" and isinstance(value, str) and ":" in value:
            yield f"{prefix}class", value
        else:
            yield from _classes(value, f"{prefix}{key}.")


def _sources(main: Path, module: str) -> Iterator[tuple[str, Path]]:
    """(name, file) of a module and of everything that it imports from its own folder or package."""
    package = module.split(".")[0] if "." in module else None
    root = main.parents[module.count(".") + (main.name == "__init__.py")] if package else main.parent
    waiting, known = [main], set()
    while waiting:
        file = waiting.pop()
        if file in known:
            continue
        known.add(file)
        yield file.relative_to(root).as_posix(), file
        if package or "site-packages" not in root.parts:
            waiting += [found for name in _imports(file, root) for found in _files(root, name, package)]


def _imports(file: Path, root: Path) -> Iterator[str]:
    """Dotted names of all modules, and of what is taken from them, that a file imports."""
    here = list(file.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) + 1 - node.level] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}".lstrip(".") for alias in node.names)


def _files(root: Path, name: str, package: str | None) -> Iterator[Path]:
    """The files below ``root`` that an import of ``name`` executes."""
    parts = name.split(".")
    if package is not None and parts[0] != package:
        return
    for depth in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:depth])
        for candidate in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if candidate.is_file():
                yield candidate
