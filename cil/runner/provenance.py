"""A run's provenance (versions, weights, data fingerprints) and the check that a folder belongs to the same run."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import ValidationError

from cil import results
from cil.backbone import Backbone
from cil.config import Config
from cil.data.images import LoadedSplit
from cil.data.transforms import Transforms
from cil.errors import CilError, RunError
from cil.results import Header
from cil.runner.checkpoint import RunFolder
from cil.runner.plan import Plan, dump, plans
from cil.stream import Stream
from cil.utils import hardware
from cil.utils.nested import flatten

PACKAGES = ("cil", "torch", "torchvision", "timm", "peft", "accelerate", "numpy")
NO_IMAGES: dict[str, Any] = {"sha256": "none", "images": 0, "skipped": []}
"""The facts of a test split that the data set does not have; a run tested on validation images needs none."""
COMPUTES = ("cil", "pyproject.toml")  # the files of a checkout on which a result can depend


def versions() -> dict[str, str]:
    """Versions of Python and the packages that compute, and the commit if this is a checkout."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    root = Path(__file__).parent.parent.parent
    if (root / ".git").exists():
        versions["commit"] = checkout(root)
    return versions


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
    test: LoadedSplit | None,
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
        "data": {"train": train.facts, "test": test.facts if test is not None else NO_IMAGES},
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
    old, new = _identity(results.read_header(folder.path)), _identity(header)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise RunError(
                f"{folder.path}: holds a run with {key} = {old.get(key)!r}, now {new.get(key)!r}; "
                "give the new one another name= or label, or another --results"
            )


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration, with keys added since then set to their defaults (defaults never change an older run)."""
    try:
        [plan] = plans(Config.model_validate(config))
    except (CilError, ValidationError):  # its learner or a key no longer exists: return it unchanged
        return config
    return dump(plan.config)


def identity_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that identify a run, by dotted key: all but the machine, the name, the paths of data and weights,
    and the limit of the size of images, which changes no pixel. Keys added after the configuration was stored have
    their defaults."""
    config = {k: v for k, v in _completed(config).items() if k not in ("hardware", "name")}
    config["data"] = {k: v for k, v in config["data"].items() if k not in ("root", "download", "max_pixels")}
    config["backbone"] = {k: v for k, v in config["backbone"].items() if k != "weights"}
    return {key: value for key, value in flatten(config, lists=True) if value != {}}


def _identity(header: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in which two runs of the same identity agree: settings, backbone weights and data."""
    flat = identity_settings(header["config"])
    flat["backbone weights (sha256)"] = header["backbone"]["sha256"]
    for split in ("train", "test"):
        flat[f"{split} data (sha256)"] = header["data"][split]["sha256"]
    return flat
