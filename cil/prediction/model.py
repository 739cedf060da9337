"""Predicts class names of images with the learner of a run or any other :class:`Model`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import Tensor, nn

from cil import history, results
from cil.backbone import Backbone, Backbones, load_backbone
from cil.config import BackboneConfig, Config
from cil.config import code as custom
from cil.config.schema import MAX_PIXELS
from cil.data.folder import as_text, images_below
from cil.data.packed import make_transforms
from cil.data.reading import read_image
from cil.data.transforms import Transforms
from cil.errors import DataError, RunError
from cil.features import FeatureCache, Track
from cil.learner import Context, Learner
from cil.learners import registry
from cil.runner.checkpoint import RunFolder
from cil.runner.plan import Plan, plans
from cil.stream import past_tasks
from cil.utils import hardware


class Ranked(list[tuple[str, float]]):
    """(class name, score of the model) pairs, best first.

    Attributes:
        known: Whether the image looks like one of the known classes; None if the model was not asked.
    """

    known: bool | None = None


class Model(nn.Module, ABC):
    """Features and classifier as one module, with class names and the transforms of images.

    Attributes:
        names: Class names in the order of the logits' columns.
        transforms: From a decoded image to the model's input.
        device: Device that the images must be on.
    """

    def __init__(self, names: Sequence[str], transforms: Transforms, device: torch.device) -> None:
        super().__init__()
        self.names, self.transforms, self.device = tuple(names), transforms, device

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images float [B, 3, S, S] → (logits [B, C], features [B, F]), both float32."""

    def judged(self, images: Tensor) -> tuple[Tensor, np.ndarray | None]:
        """Class scores [B, C] on the CPU, and whether each image looks like a known class, bool [B], or None."""
        return self(images)[0].cpu(), None


class Trained(Model):
    """A learner in its current state, with its backbone.

    Args:
        learner: The learner.
        transforms: From a decoded image to the model's input.
        names: Names of the predicted classes.
        columns: The learner's label of each of them; None: the names are those of all labels.
    """

    def __init__(
        self, learner: Learner, transforms: Transforms, names: Sequence[str], columns: Sequence[int] | None = None
    ) -> None:
        super().__init__(names, transforms, learner.backbone.device)
        self.learner, self.backbone = learner.eval(), learner.backbone
        self.columns = None if columns is None else tuple(columns)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.learner.features(images).float()
        logits = self.learner.logits(features).float()
        return logits if self.columns is None else logits[:, list(self.columns)], features


def restore(
    folder: Path,
    accelerator: Accelerator,
    *,
    weights: Path | None = None,
    code: Sequence[Path] = (),
    backbone: Backbone | None = None,
) -> tuple[Learner, Transforms, Sequence[str]]:
    """The learner of a run after its last finished stage, its transforms, and its class names.

    If custom code has changed since the run, a warning is logged.

    Args:
        folder: A run folder.
        accelerator: Device and precision.
        weights: New place of the backbone's weights; by default they are where they were.
        code: New places of the files of custom classes; see :func:`cil.config.code.found`.
        backbone: The run's backbone if it is loaded already, as that of another run with the same section ``backbone``.

    Raises:
        RunError: The folder is not a run folder, no stage is finished, or the backbone weights are not there or differ
            from the run's.
        PluginError: The file of a custom class is not there.
    """
    header = results.read_header(folder)
    run_folder = RunFolder(folder)
    finished = min(run_folder.finished(), len(header["tasks"]))  # `cil learn` may have been killed behind the last one
    if not finished:
        raise RunError(f"{folder}: no stage is finished (or its stage folders were deleted); run it first")
    plan, backbone = recorded_setting(folder, header, accelerator.device, weights=weights, code=code, backbone=backbone)
    learner = registry.instantiate(plan.cls, plan.parameters, backbone).to(accelerator.device)
    cache = FeatureCache(accelerator, plan.config.inference_batch_size)
    tasks = past_tasks(header["tasks"][:finished], header["class_names"])
    run_folder.load_learner(learner, tasks, lambda stage: Context(accelerator, cache, stage=stage))
    learner.eval()
    return learner, make_transforms(backbone.data_config, plan.config.transform), tasks[-1].names


def recorded_setting(
    folder: Path,
    header: Mapping[str, Any],
    device: torch.device,
    *,
    weights: Path | None = None,
    code: Sequence[Path] = (),
    backbone: Backbone | None = None,
) -> tuple[Plan, Backbone]:
    """The learner's class and settings of a run, and its backbone; arguments and errors as in :func:`restore`.

    Args:
        folder: The run folder.
        header: The content of its ``metrics.json``.
        device: Device of the backbone.
        weights: New place of the backbone's weights.
        code: New places of the files of custom classes.
        backbone: The backbone, if it is loaded already.
    """
    entry = custom.found(header["config"]["learners"][0], code)
    try:
        config = Config.model_validate({**header["config"], "learners": [entry]})
    except ValidationError as error:  # written by another version, or damaged before there were checksums
        reason = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:1])
        raise RunError(f"{folder / 'metrics.json'}: its config cannot be used here: {reason}") from None
    [plan] = plans(config)
    custom.warn_if_changed(header.get("code"), entry, plan.cls, folder)
    if backbone is None or backbone.fingerprint != header["backbone"]["sha256"]:
        backbone = _backbone(folder, config, header, device, weights)
    return plan, backbone


def _backbone(
    folder: Path, config: Config, header: Mapping[str, Any], device: torch.device, weights: Path | None
) -> Backbone:
    """The backbone of a run, or its several ones as one, with the weights and the names that the run recorded."""
    if config.backbones is None:
        return _single(folder, config.backbone, header["backbone"], device, weights)
    gone = [k for k, one in enumerate(config.backbones) if isinstance(one.weights, Path) and not one.weights.exists()]
    if weights is not None and len(gone) != 1:
        raise RunError(
            f"{folder}: the run has {len(config.backbones)} backbones, and of {len(gone)} of them the weights are not "
            f"where they were, so it is not clear which --weights {weights} belongs to; put the files back in their "
            "places"
        )
    moved = {k: weights for k in gone}
    members = [
        _single(folder, section, recorded, device, moved.get(k))
        for k, (section, recorded) in enumerate(zip(config.backbones, header["backbones"], strict=True))
    ]
    return Backbones(members, config.combine)


def _single(
    folder: Path, config: BackboneConfig, recorded: Mapping[str, Any], device: torch.device, weights: Path | None
) -> Backbone:
    """One backbone of a run."""
    place = weights if weights is not None else config.weights
    if isinstance(place, Path) and not place.expanduser().exists():
        advice = "" if weights is not None else ", where the run had its backbone's weights"
        raise RunError(f"{folder}: no file {place}{advice}; give the place of the weights: --weights FILE")
    if weights is not None:
        config = config.model_copy(update={"weights": weights})
    backbone = load_backbone(config, device, recorded)
    if backbone.fingerprint != recorded["sha256"]:
        raise RunError(
            f"{folder}: the run used backbone weights with sha256 {recorded['sha256'][:12]}…, those in "
            f"{config.weights or config.name} have {backbone.fingerprint[:12]}…; "
            "give the place of the run's weights: --weights FILE"
        )
    backbone.name = recorded["name"]
    return backbone


def open_run(folder: Path, device: str = "cpu", *, weights: Path | None = None, code: Sequence[Path] = ()) -> Trained:
    """The learner of a run after its last finished stage, as a model; see :func:`restore`.

    It predicts no class that ``cil forget`` has removed.

    Args:
        folder: A run folder.
        device: As ``hardware.device``.
        weights: New place of the backbone's weights, if they were moved.
        code: New places of the files of custom classes, if they were moved.
    """
    learner, transforms, names = restore(folder, hardware.accelerator(device), weights=weights, code=code)
    header = results.read_header(folder)
    if not history.absent(header):
        return Trained(learner, transforms, names)
    columns = history.predicted(header)
    return Trained(learner, transforms, [names[label] for label in columns], columns)


def find_images(places: Iterable[Path], say: Callable[[str], None] | None = None) -> list[Path]:
    """The given files in their order, and all images below the given folders, sorted by path; each path once.

    The images of a folder are those that training would read there, whatever their class.

    Args:
        places: Image files and folders.
        say: Called with a line about what is left out of a folder.

    Raises:
        DataError: A path does not exist, or a folder has no images.
    """
    paths: dict[Path, None] = {}
    for place in places:
        if place.is_file():
            paths[place] = None
        elif place.is_dir():
            inside, findings = images_below(place)
            paths |= dict.fromkeys(inside)
            if say is not None:
                for line in findings.lines():
                    say(line)
        else:
            raise DataError(f"{as_text(place)}: no such file or folder")
    return list(paths)


def predict(
    model: Model | Path,
    images: Sequence[Path],
    top: int = 5,
    device: str = "cpu",
    *,
    batch_size: int = 32,
    max_pixels: int = MAX_PIXELS,
    on_broken: Callable[[DataError], None] | None = None,
    track: Track | None = None,
) -> Iterator[tuple[Path, Ranked]]:
    """The top classes of each image, in the order of the images. Only one batch of images is in memory at a time.

    Args:
        model: A model, or a run folder, which stands for its learner after the last finished stage.
        images: Image files; see :func:`find_images`.
        top: Number of classes per image.
        device: As ``hardware.device``, for a run folder; a model stays on its device.
        batch_size: Images per forward pass; it changes no prediction.
        max_pixels: Maximum number of pixels of an image; larger ones are treated as unreadable.
        on_broken: Called with the error of each file that is not a readable image, which is then skipped; by default
            the error is raised.
        track: Progress bar, as in ``Context``.

    Yields:
        (path, [(class name, score of the model), …] best first).

    Raises:
        RunError: The run cannot be loaded.
        DataError: An image cannot be read.
    """
    if not isinstance(model, Model):
        model = open_run(model, device)
    read = partial(_read, transforms=model.transforms, max_pixels=max_pixels)
    left = iter(images if track is None else track(images, "images", len(images)))
    with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter lock
        while chunk := list(islice(left, batch_size)):
            readable, tensors = [], []
            for path, image in zip(chunk, pool.map(read, chunk), strict=True):
                if isinstance(image, Tensor):
                    readable.append(path)
                    tensors.append(image)
                elif on_broken is None:
                    raise DataError(f"{image}; repair or remove it, or skip such files (--on-error skip)")
                else:
                    on_broken(image)
            if readable:
                yield from zip(readable, top_classes(model, torch.cat(tensors), top), strict=True)


def top_classes(model: Model, images: Tensor, top: int) -> list[Ranked]:
    """The ``top`` classes of each image of a batch of normalised images float [B, 3, S, S]."""
    with torch.inference_mode():
        scores, known = model.judged(images.to(model.device))
    best = scores.topk(min(top, len(model.names)), dim=1)
    found = [
        Ranked((model.names[c], value) for value, c in zip(values, classes, strict=True))
        for values, classes in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    for ranked, one in zip(found, () if known is None else known.tolist(), strict=known is not None):
        ranked.known = one
    return found


def _read(path: Path, transforms: Transforms, max_pixels: int) -> Tensor | DataError:
    """An image, float [1, 3, S, S], or the error of reading it."""
    try:
        return read_image(path, transforms, max_pixels)
    except DataError as error:
        return error
