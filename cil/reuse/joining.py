"""Joins finished runs into one run folder, which ``cil predict`` and ``cil export`` open like any other.

If all runs have the same features and the same kind of classifier, made of sums, the sums are added, and the result is
what one run over all images would have learned. No image is read: this is federated class-incremental learning without
an algorithm. Runs of different learners or tuners are joined by routing instead (:mod:`cil.reuse.routed`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cil.classifiers.base import StatisticsClassifier
from cil.config import LearnerEntry
from cil.errors import RunError
from cil.learner import Context, Learner
from cil.learners import registry
from cil.reuse.describing import specification_of
from cil.reuse.parents import Parent, difference, open_parents, settings
from cil.reuse.routed import Routed
from cil.reuse.writing import Joint, write
from cil.stream import past_tasks
from cil.utils import hardware
from cil.utils.paths import expand

ROUTE = "join such runs by density instead: --route"


def join(
    runs: Sequence[Path | str],
    out: Path | str,
    *,
    route: bool = False,
    images: Path | str | None = None,
    device: str = "cpu",
    weights: Path | None = None,
    code: Sequence[Path] = (),
) -> Joint:
    """Join runs into one that knows the classes of all, by adding their sums or by routing between them.

    Added sums give the classifier of one run over all images, up to rounding. Routing
    (:class:`cil.reuse.routed.Routed`) is an approximation for runs that cannot be added.

    Classes are matched by name. Those of the first run come first, then the new ones of each further run; the samples
    of a class that several runs know add up.

    Args:
        runs: Run folders, at least two, with the same backbone, transform and precision; without ``route`` also with
            the same learner and settings, and without a tuner or with equal ones. Of each the last finished stage
            counts.
        out: The run folder to write.
        route: Route between the runs by the density of an image. Runs without a specification get one, for which their
            training images or stored features are needed.
        images: Test images, a folder of class folders or a tar file with exactly the joined classes: the joined run is
            tested on them. Without them it has no accuracy.
        device: As ``hardware.device``.
        weights: New place of the backbone's weights, if they were moved.
        code: New places of the files of custom classes, if they were moved.

    Raises:
        RunError: ``out`` exists, a run cannot be loaded, or the runs cannot be added; nothing is written then.
        StreamError: The test images have other classes.
    """
    out, started = _free(out), time.perf_counter()
    accelerator = hardware.accelerator(device)
    parents = open_parents([expand(run) for run in runs], accelerator, weights=weights, code=code)
    names = tuple(dict.fromkeys(name for parent in parents for name in parent.names))
    if route:
        learner, entry = routed(parents, names, accelerator)
    else:
        learner, entry = added(parents, names), parents[0].header["config"]["learners"][0]
    return write(parents, names, learner, entry, out, accelerator, images, started)


def added(parents: Sequence[Parent], names: Sequence[str]) -> Learner:
    """The first run's learner with the sums of all, in the order of ``names``.

    Raises:
        RunError: The runs differ in more than their sums; the message says in what.
    """
    first = parents[0]
    place = {name: row for row, name in enumerate(names)}
    parts = []
    for parent in parents:
        if found := difference(settings(first.header), settings(parent.header)):
            raise RunError(
                f"{parent.folder}: {found} in {first.folder}; sums add up under equal settings only: run one of them "
                f"again with the settings of the other, or {ROUTE}"
            )
        sums = _sums(parent)
        if (what := _unlike_state(first.learner, parent.learner) or _sums(first).unlike(sums)) is not None:
            raise RunError(
                f"{parent.folder}: its {what} differs from that of {first.folder}, so its features or sums mean "
                f"something else (another seed, or a tuner that was trained apart); {ROUTE}"
            )
        rows = [0] * sums.num_classes  # also of classes that were forgotten, whose sums are zero
        for label, name in zip(parent.labels, parent.names, strict=True):
            rows[label] = place[name]
        parts.append((copy.deepcopy(sums), rows))
    _sums(first).clear().add(parts)
    return first.learner


def routed(parents: Sequence[Parent], names: Sequence[str], accelerator: Accelerator) -> tuple[Learner, dict[str, Any]]:
    """The runs' learners behind one router, and its section of the configuration.

    Raises:
        RunError: A run has no specification, and its training images cannot be read.
    """
    backbone, place = parents[0].learner.backbone, {name: row for row, name in enumerate(names)}
    size = parents[0].transforms.size
    nothing = torch.zeros(1, 3, size, size, device=accelerator.device)
    parts, specifications = [], []
    for parent in parents:
        specifications.append(specification_of(parent.folder, backbone, accelerator))
        views = [view for view in parent.learner.views().values() if view is not backbone]
        with torch.inference_mode():
            widths = [view(nothing).shape[1] for view in views]
        entry = parent.header["config"]["learners"][0]
        tasks = parent.header["tasks"][: len(parent.rows)]
        classes = [place[name] for name in parent.names]
        part = {"learner": entry, "labels": list(parent.labels), "classes": classes, "tasks": tasks, "widths": widths}
        parts.append(part)
    section = {"class": "cil.reuse.routed:Routed", "label": "routed", "parts": parts}
    cls, parameters = registry.configure(LearnerEntry.model_validate(section))
    learner = registry.instantiate(cls, parameters, backbone).to(accelerator.device)
    assert isinstance(learner, Routed)
    [task] = past_tasks([range(len(names))], names)
    learner.begin(task, Context(accelerator))
    for inner, density, parent, known in zip(learner.parts, learner.densities, parents, specifications, strict=True):
        inner.load_state_dict(parent.learner.state_dict())
        density.load_state_dict(known.gaussians.state_dict())
    return learner, section


def _sums(parent: Parent) -> StatisticsClassifier:
    sums = parent.learner.statistics
    if sums is not None and sums.over_classes is not None:
        return sums
    raise RunError(
        f"{parent.folder}: the classifier of {parent.header['learner']} is not made of sums, as those of ncm, slda, "
        f"layer_lda, ranpac, fecam and aper are; {ROUTE}"
    )


def _unlike_state(one: Learner, two: Learner) -> str | None:
    """The first tensor or value outside the classifier that two learners do not share; None if they share all."""
    mine, theirs = (_state_beside_sums(learner) for learner in (one, two))
    for key in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(key), theirs.get(key)
        same = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        if not same:
            return key
    return None


def _state_beside_sums(learner: Learner) -> dict[str, Any]:
    state, sums = learner.state_dict(), learner.statistics
    inside = [name for name, module in learner.named_modules() if module is sums]
    return {key: value for key, value in state.items() if not any(key.startswith(f"{name}.") for name in inside)}


def _free(out: Path | str) -> Path:
    out = expand(out)
    if out.exists() or out.is_symlink():
        raise RunError(f"{out}: exists already; give another --out, or delete it")
    return out
