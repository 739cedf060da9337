"""A run's provenance: versions, weights, fingerprints of the data, and digests of custom code."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from cil.backbone import Backbone, Backbones, backbone_facts
from cil.config import code
from cil.data.images import LoadedSplit
from cil.data.transforms import Transforms
from cil.results import Header
from cil.rows import StreamFacts
from cil.runner.plan import Plan, dump
from cil.stream import Stream, Task
from cil.utils import hardware

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
    """Provenance: everything about a run that is known before it starts. Its paths are absolute."""
    by_task = _data_by_task(stream)
    data = {
        "train": {**train.facts, "tasks": by_task["train"]},
        "test": {**(test.facts if test is not None else NO_IMAGES), "tasks": by_task["test"]},
    }
    tasks = [list(task.classes) for task in stream.tasks]
    names, order = list(stream.class_names), list(stream.order)
    header = header_of(plan, names, order, tasks, data, backbone, transforms, accelerator)
    if stream.altered:
        header["stream"] = _stream_facts(stream)
    return header


def _stream_facts(stream: Stream) -> StreamFacts:
    """What a stream with returning classes, or chosen or relabelled images, is made of."""
    positions, labels = stream.relabelled
    true = dict(zip(positions.tolist(), labels.tolist(), strict=True))
    images = []
    for task in stream.tasks:
        own = [
            true.get(i, label)
            for i, label in zip(task.train.source[1].tolist(), task.train.labels.tolist(), strict=True)
        ]
        counts = np.bincount(own, minlength=len(stream.class_names))
        images.append([int(counts[label]) for label in task.classes])
    facts: StreamFacts = {"groups": [list(group) for group in stream.groups], "images": images}
    if true:
        facts["relabelled"] = {"positions": positions.tolist(), "labels": labels.tolist()}
    if any(task.unlabelled is not None for task in stream.tasks):
        facts["unlabelled"] = [len(task.unlabelled or ()) for task in stream.tasks]
    return facts


def header_of(
    plan: Plan,
    class_names: list[str],
    class_order: list[int],
    tasks: list[list[int]],
    data: dict[str, Any],
    backbone: Backbone,
    transforms: Transforms,
    accelerator: Accelerator,
) -> Header:
    """The same, for classes, tasks and data of which the facts are known."""
    header: Header = {
        "learner": plan.entry.title,
        "paper": plan.cls.paper,
        "stores_images": plan.cls.keeps_samples(plan.parameters),
        "trains_backbone": plan.cls.trains_backbone,
        "chosen_by": plan.config.chosen_by,
        "tested_on": plan.config.stream.test_on,
        "config": code.with_paths(dump(plan.config), code.absolute),
        "class_names": class_names,
        "class_order": class_order,
        "tasks": tasks,
        "backbone": backbone_facts(backbone),
        "transform": transforms.card,
        "data": data,
        "code": code.digests(dump(plan.config)["learners"][0], plan.cls),
        "versions": versions(),
        "machine": hardware.facts(accelerator),
    }
    if plan.cls.uses_texts(plan.parameters) and backbone.text is not None:
        side = backbone.text
        header["text"] = {
            "sha256": side.fingerprint,
            "width": side.width,
            "scale": side.scale,
            "bias": side.bias,
            "version": side.tower.version,
        }
    if isinstance(backbone, Backbones):
        header["backbones"] = [backbone_facts(member) for member in backbone.members]
    return header


def _data_by_task(stream: Stream) -> dict[str, list[str]]:
    """For each split the fingerprint of every task's images, 32 hexadecimal digits each.

    Those of the training split are described at :func:`train_digest`.
    """
    train, test = [], []
    with stream.open_test() as tested:
        for task in stream.tasks:
            train.append(train_digest(task))
            test.append(tested.images.source.fingerprint_of(tested.task(task.index)[0])[:32])
    return {"train": train, "test": test}


def train_digest(task: Task) -> str:
    """Fingerprint of the images that a task trains on, of those that it holds out, and of those without labels, 32
    hexadecimal digits."""
    images = task.train.source[0]
    parts = [part.source[1] for part in (task.train, task.validation, task.unlabelled) if part is not None]
    return images.source.fingerprint_of(np.concatenate(parts))[:32]
