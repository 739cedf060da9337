"""Gives every run its specification: the stored one, or a new one from the run's training images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import ValidationError

from cil import history, results
from cil.backbone import FROZEN, Backbone
from cil.config import Config
from cil.data.images import LoadedSplit
from cil.data.transforms import Transforms
from cil.errors import CilError, RunError
from cil.features import FeatureCache, Track
from cil.growing.records import key, read_kept, read_taught, since
from cil.reuse.specification import Specification
from cil.runner import make_stream
from cil.runner.checkpoint import RunFolder
from cil.runner.provenance import train_digest
from cil.store import open_store
from cil.utils.stored import content_digest


def specification_of(
    folder: Path, backbone: Backbone, accelerator: Accelerator, track: Track | None = None
) -> Specification:
    """The specification of a run after its last finished stage; made and stored if the folder has none.

    Args:
        folder: A run folder.
        backbone: The run's backbone.
        accelerator: Device of the forward passes; none is needed if the features are in the feature store.
        track: Progress bar.

    Raises:
        RunError: No stage is finished, or there is no specification and the training images cannot be read here, or are
            no longer those of the run.
    """
    header = results.read_header(folder)
    finished = _finished(folder, header)
    if not finished:
        raise RunError(f"{folder}: no stage is finished (or its stage folders were deleted); run it first")
    state = _state(folder, header, finished)
    found = Specification.load(folder, state)
    if found is None:
        if "lessons" in header:
            found = _kept(folder, header, finished, backbone.feature_dim)
        else:
            found = _computed(folder, header, finished, backbone, accelerator, track)
        found.save(folder, state)
    return found


def stored_specification(folder: Path) -> Specification | None:
    """The specification of a run if its folder has one of the last finished stage."""
    header = results.read_header(folder)
    finished = _finished(folder, header)
    return Specification.load(folder, _state(folder, header, finished)) if finished else None


def _finished(folder: Path, header: Mapping[str, Any]) -> int:
    return min(RunFolder(folder).finished(), len(header["tasks"]))


def _state(folder: Path, header: Mapping[str, Any], finished: int) -> str:
    """What changes whenever a run has learned or forgotten something: its last stage, and the changes behind it."""
    stage = results.read_stage(folder, finished - 1).checksum
    changes = header.get("changes", [])
    return content_digest({"stage": stage, "changes": changes}) if changes else stage


def _kept(folder: Path, header: Mapping[str, Any], finished: int, width: int) -> Specification:
    """The specification of a model of ``cil learn``, from the frozen features that it keeps: of all its images where it
    keeps them, and otherwise of the held-out ones.

    Raises:
        RunError: It keeps no frozen features.
    """
    labels = history.predicted(header)
    specification = Specification([header["class_names"][label] for label in labels], width)
    taught = [read_taught(folder, header, label, [FROZEN]) for label in labels]
    if all(features is not None for features in taught):
        found = {row: features for row, features in enumerate(taught) if features is not None}
    else:
        held_out, frozen = read_kept(folder, finished), key(FROZEN)
        found = {}
        for row, label in enumerate(labels):
            lessons = [one for one in held_out[since(header, label) :] if frozen in one.features]
            parts = [one.features[frozen][torch.from_numpy(one.label == label)] for one in lessons]
            found[row] = torch.cat([torch.zeros(0, width), *parts])
    for row, features in found.items():
        if len(features):
            specification.add(features, torch.full((len(features),), row))
    if not specification.images:
        raise RunError(
            f"{folder}: keeps no frozen features of its images, so it has no specification; teach it with a learner on "
            "frozen features and with --holdout"
        )
    return specification


def _computed(
    folder: Path,
    header: Mapping[str, Any],
    finished: int,
    backbone: Backbone,
    accelerator: Accelerator,
    track: Track | None,
) -> Specification:
    where = f"make it where they are, by `cil find {folder}`, and copy the folder with it"
    if "joined" in header:
        raise RunError(
            f"{folder}: has no specification, and it is a joined run without images of its own; give each of its "
            "parents one, by `cil find PARENT`, and join them again"
        )
    try:
        config = Config.model_validate(header["config"])
        store = open_store(config.hardware)
        images = LoadedSplit(config.data, "train", config.hardware, store).images(
            Transforms(backbone.data_config, config.transform)
        )
        stream = make_stream(config, images, images)
    except (CilError, ValidationError) as error:
        reason = str(error).split("\n")[0]
        raise RunError(
            f"{folder}: has no specification, and its training images cannot be read here ({reason}); {where}"
        ) from None
    known = header["data"]["train"].get("tasks")
    names = [header["class_names"][c] for c in range(max(max(task) for task in header["tasks"][:finished]) + 1)]
    specification = Specification(names, backbone.feature_dim)
    cache = FeatureCache(accelerator, config.inference_batch_size, track, store)
    for index, task in enumerate(stream.tasks[:finished]):
        if known is not None and train_digest(task) != known[index]:
            raise RunError(
                f"{folder}: has no specification, and the training images of its task {index} are no longer those that "
                f"it learned; {where}"
            )
        specification.add(cache.get(backbone, *task.train.source), task.train.labels)
    return specification
