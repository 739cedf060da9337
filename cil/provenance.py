"""What a run is: everything a reader must know to trust it, and what tells it from another run."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import ValidationError

from cil import hardware, results
from cil.backbone import Backbone
from cil.checkpoint import RunFolder
from cil.config import Config
from cil.data.images import LoadedSplit
from cil.data.transforms import Transforms
from cil.errors import CilError, RunError
from cil.plan import Plan, dump, plans
from cil.stream import Stream

Header = dict[str, Any]
PACKAGES = ("cil", "torch", "torchvision", "timm", "peft", "accelerate", "numpy")
COMPUTES = ("cil", "pyproject.toml")  # of a checkout: what a result can depend on


def versions() -> dict[str, str]:
    """Versions of what computes, and the commit when running from a checkout."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    root = Path(__file__).parent.parent
    if (root / ".git").exists():
        found["commit"] = checkout(root)
    return found


def checkout(root: Path) -> str:
    """The commit checked out in ``root`` as 40 hexadecimal digits, and ``-dirty`` where what computes differs
    from it: a file of the package or ``pyproject.toml`` changed, or a module that is in no commit. Pages, figures and
    results may differ: a campaign rewrites its tables between runs. ``"unknown"`` without git."""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", *COMPUTES)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def make_header(
    plan: Plan,
    stream: Stream,
    backbone: Backbone,
    transforms: Transforms,
    train: LoadedSplit,
    test: LoadedSplit,
    accelerator: Accelerator,
) -> Header:
    """Provenance: everything about a run that is known before it starts."""
    return {
        "learner": plan.entry.title,
        "paper": plan.cls.paper,
        "stores_images": plan.cls.stores_images,
        "trains_backbone": plan.cls.trains_backbone,
        "chosen_by": plan.config.chosen_by,
        "tested_on": plan.config.stream.test_on,
        "config": dump(plan.config),
        "class_names": list(stream.class_names),
        "class_order": list(stream.order),
        "tasks": [list(task.classes) for task in stream.tasks],
        "backbone": {"name": backbone.name, "sha256": backbone.fingerprint, "feature_dim": backbone.feature_dim},
        "transform": transforms.card,
        "data": {
            split: {"sha256": loaded.source.fingerprint, "images": len(loaded.source), "skipped": loaded.skipped}
            for split, loaded in (("train", train), ("test", test))
        },
        "versions": versions(),
        "machine": hardware.facts(accelerator),
    }


def check_same_run(folder: RunFolder, header: Header) -> None:
    """Refuse a folder that holds another run.

    Raises:
        RunError: Naming the first key that differs.
    """
    if not (folder.path / "metrics.json").exists():
        if folder.finished():
            raise RunError(
                f"{folder.path}: holds stages but no metrics.json to tell of which run; "
                "move it away or use another --results"
            )
        return
    old, new = _identity(results.load(folder.path)), _identity(header)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise RunError(
                f"{folder.path}: holds a run with {key} = {old.get(key)!r}, now {new.get(key)!r}; "
                "give the new one another name= or label, or another --results"
            )


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the keys that came after it: at their defaults, under which nothing is otherwise."""
    try:
        [plan] = plans(Config.model_validate(config))
    except (CilError, ValidationError):  # of a learner or a key that is there no more: as it stands
        return config
    return dump(plan.config)


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What of a run's configuration makes it this run, by dotted key: all but the machine, the name, and where data and
    weights lie. Keys that are newer than a stored configuration are at their defaults."""
    config = {k: v for k, v in _completed(config).items() if k not in ("hardware", "name")}
    config["data"] = {k: v for k, v in config["data"].items() if k not in ("root", "download")}
    config["backbone"] = {k: v for k, v in config["backbone"].items() if k != "weights"}
    return dict(_flatten(config))


def _identity(header: Header) -> dict[str, Any]:
    """What makes two runs the same: the settings, the backbone's weights, the data."""
    flat = settings(header["config"])
    flat["backbone weights (sha256)"] = header["backbone"]["sha256"]
    for split in ("train", "test"):
        flat[f"{split} data (sha256)"] = header["data"][split]["sha256"]
    return flat


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, inner in enumerate(value):
            yield from _flatten(inner, f"{prefix}.{i}")
    else:
        yield prefix, value
