"""Removes a class exactly from a learner whose state allows it, and tests what is left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from cil.classifiers.joined import Joined
from cil.classifiers.scales import BlockScales
from cil.data.transforms import Transforms
from cil.errors import DataError, RunError, shortened
from cil.features import FeatureCache
from cil.growing import events
from cil.growing.calibration import scored
from cil.growing.lesson import Images, open_images
from cil.growing.records import Kept, learned, read_contents, read_taught
from cil.growing.setting import Setting
from cil.growing.stream import image_set
from cil.learner import Context, Learner
from cil.learners import registry
from cil.runner.checkpoint import RunFolder
from cil.stream import past_tasks

HIDE = "give --hide for a class that is no longer predicted, although its statistics remain"


def current(folder: Path, header: events.Header, setting: Setting) -> Learner:
    """The learner of a model in its current state.

    Raises:
        RunError: The state is missing or damaged.
    """
    plan, backbone, accelerator = setting
    learner = registry.instantiate(plan.cls, plan.parameters, backbone).to(accelerator.device)
    tasks = past_tasks(header["tasks"], header["class_names"])
    RunFolder(folder).load_learner(learner, tasks, lambda stage: Context(accelerator, stage=stage))
    return learner.eval()


def remove(
    learner: Learner, folder: Path, header: events.Header, label: int, setting: Setting, images: Images | None
) -> None:
    """Take a class out of a model's learner.

    Args:
        learner: The learner in its current state.
        folder: The model's folder.
        header: Its header.
        label: The class.
        setting: Learner and backbone of the model, and the device.
        images: The images that the class was taught with; needed by learners with sums over all classes, unless the
            features of these images are kept.

    Raises:
        RunError: The learner keeps more of the class than can be removed.
        DataError: Images are needed, or some of the class's are not among those given.
    """
    name, title = shortened(header["class_names"][label]), setting.plan.entry.title
    statistics = learner.statistics
    reason = ""
    if statistics is None or statistics.removed_with is None:
        reason = f"learner {title} keeps more of a class than sums of its own"
    elif next(learner.parameters(), None) is not None and label in header["tasks"][0]:
        reason = f"the images of the first lesson, and so those of {name}, have trained the features"
    elif label in header["tasks"][0] and any(
        isinstance(part, BlockScales | Joined) and part.from_images for part in learner.modules()
    ):
        reason = f"the images of the first lesson, and so those of {name}, have set the scales of the features"
    if statistics is None or reason:
        raise RunError(f"{folder}: {name} cannot be forgotten exactly: {reason}; {HIDE}")
    features = None
    if statistics.removed_with == "samples":
        features = learner.scaled(_features(folder, header, label, learner, setting, images))
    statistics.remove(label, features)


def tested(
    learner: Learner, kept: Sequence[Kept], absent: Sequence[int], accelerator: Accelerator
) -> tuple[list[int], list[int]]:
    """The numbers of right and of tested held-out images of each lesson, from kept features.

    Args:
        learner: The learner.
        kept: What each lesson holds out.
        absent: Labels that are not predicted, and whose images are not tested.
        accelerator: Device and precision.
    """
    correct, total = [0] * len(kept), [0] * len(kept)
    for lesson, (scores, labels) in scored(learner, kept, absent, accelerator).items():
        correct[lesson], total[lesson] = int((scores.argmax(1).numpy() == labels).sum()), len(labels)
    return correct, total


def _features(
    folder: Path,
    header: events.Header,
    label: int,
    learner: Learner,
    setting: Setting,
    images: Images | None,
) -> Tensor:
    """The features of all images that a class was trained with, [N, F]."""
    if images is None:
        kept = read_taught(folder, header, label, list(learner.views()))
        if kept is not None:
            return kept
    name = header["class_names"][label]
    contents = learned(read_contents(folder, len(header["tasks"])), header, label)
    wanted = [content for content, held_out in contents if not held_out]
    if images is None:
        raise DataError(
            f"{folder}: {shortened(name)} can only be forgotten exactly with its {len(wanted)} images, because "
            f"{header['learner']} keeps sums over all classes; give them (--images FOLDER), or {HIDE}"
        )
    split = open_images(images, "skip")
    if name not in split.source.class_names:
        raise DataError(f"{split.title}: has no class {shortened(name)}; give the images that it was taught with")
    own = np.flatnonzero(split.source.labels == split.source.class_names.index(name))
    place = {split.source.content(i): i for i in own.tolist()}
    missing = sum(content not in place for content in wanted)
    if missing:
        raise DataError(
            f"{split.title}: {missing} of the {len(wanted)} images that {shortened(name)} was taught with are not "
            "there (images are compared by their content); give all of them"
        )
    positions, rows = np.unique([place[content] for content in wanted], return_inverse=True)
    plan, backbone, accelerator = setting
    transforms = Transforms(backbone.data_config, plan.config.transform)
    every = image_set(split, positions, np.full(len(positions), label), (), transforms)
    cache = FeatureCache(accelerator, plan.config.inference_batch_size)
    return cache.get(learner, every, rows)
