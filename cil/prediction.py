"""From a finished run, or any other :class:`Model`, to class names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cil import hardware, results
from cil.backbone import load_backbone
from cil.checkpoint import RunFolder
from cil.config import Config
from cil.data.images import read_image
from cil.data.transforms import Transforms
from cil.errors import DataError, RunError
from cil.features import FeatureCache, Track
from cil.learner import Context, Learner
from cil.learners import registry
from cil.randomness import isolated
from cil.stream import past_tasks

Ranked = list[tuple[str, float]]
"""(class name, the model's own score), best first."""


class Model(nn.Module, ABC):
    """Features and classifier as one module, and what it takes to use it on pictures.

    Attributes:
        names: Class names in the order of the logits' columns.
        transforms: From a picture to what the model takes.
        device: Where images must be.
    """

    def __init__(self, names: Sequence[str], transforms: Transforms, device: torch.device) -> None:
        super().__init__()
        self.names, self.transforms, self.device = tuple(names), transforms, device

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images float [B, 3, S, S] → (logits [B, C], features [B, F]), both float32."""


class Trained(Model):
    """A learner as it stands, with its backbone."""

    def __init__(self, learner: Learner, transforms: Transforms, names: Sequence[str]) -> None:
        super().__init__(names, transforms, learner.backbone.device)
        self.learner, self.backbone = learner.eval(), learner.backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.learner.features(images).float()
        return self.learner.logits(features).float(), features


def restore(folder: Path, accelerator: Accelerator) -> tuple[Learner, Transforms, Sequence[str]]:
    """The learner of a run as it was after its last finished stage, its transforms, and its class names.

    Raises:
        RunError: Not a run folder, no finished stage, or other backbone weights than the run used.
    """
    header = results.load(folder)
    run_folder = RunFolder(folder)
    finished = run_folder.finished()
    if not finished:
        raise RunError(f"{folder}: no stage is finished (or stage folders were not kept); run it first")
    config = Config.model_validate(header["config"])
    cls, parameters = registry.configure(config.learners[0])
    backbone = load_backbone(config.backbone, accelerator.device)
    if backbone.fingerprint != header["backbone"]["sha256"]:
        raise RunError(
            f"{folder}: the run used backbone weights {header['backbone']['sha256'][:12]}…, "
            f"now they are {backbone.fingerprint[:12]}…"
        )
    with isolated(0):
        learner = cls(parameters, backbone).to(accelerator.device)
    cache = FeatureCache(accelerator, config.batch_size)
    tasks = past_tasks(header["tasks"][:finished], header["class_names"])
    run_folder.load_learner(learner, tasks, lambda stage: Context(accelerator, cache, stage=stage))
    learner.eval()
    return learner, Transforms(backbone.data_config, config.transform), tasks[-1].names


def open_run(folder: Path, device: str = "cpu") -> Trained:
    """A run's learner after its last finished stage, as a model; see :func:`restore`."""
    return Trained(*restore(folder, hardware.accelerator(device)))


def find_images(places: Iterable[Path]) -> list[Path]:
    """Files as they are given, and all pictures below folders, sorted by path; each once.

    What a folder's pictures are is told by the suffix, as torchvision tells it.

    Raises:
        DataError: A place does not exist, or a folder holds no picture.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found: dict[Path, None] = {}
    for place in places:
        if place.is_file():
            found[place] = None
        elif place.is_dir():
            inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
            if not inside:
                raise DataError(f"{place}: no images in this folder; looked for {' '.join(IMG_EXTENSIONS)}")
            found |= dict.fromkeys(inside)
        else:
            raise DataError(f"{place}: no such file or folder")
    return list(found)


def predict(
    model: Model | Path,
    images: Sequence[Path],
    top: int = 5,
    device: str = "cpu",
    *,
    batch_size: int = 32,
    on_broken: Callable[[DataError], None] | None = None,
    track: Track | None = None,
) -> Iterator[tuple[Path, Ranked]]:
    """The best classes of each image, in the order of the images. Holds one batch of pictures in memory at a time.

    Args:
        model: A model, or a run folder: its learner after the last finished stage.
        images: Image files; see :func:`find_images`.
        top: How many classes.
        device: As ``hardware.device``; a model stays where it is.
        batch_size: Images a forward pass; it changes no prediction.
        on_broken: Called with the error of each file that is no readable image, which is then left out; by default it
            is raised.
        track: Progress bar, as in ``Context``.

    Yields:
        (path, [(class name, the learner's own score), …] best first).

    Raises:
        RunError: The run cannot be loaded.
        DataError: An image cannot be read.
    """
    if not isinstance(model, Model):
        model = open_run(model, device)
    left = iter(images if track is None else track(images, "images", len(images)))
    with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter lock
        while chunk := list(islice(left, batch_size)):
            whole, pictures = [], []
            for path, read in zip(chunk, pool.map(lambda path: _read(path, model.transforms), chunk), strict=True):
                if isinstance(read, Tensor):
                    whole.append(path)
                    pictures.append(read)
                elif on_broken is None:
                    raise DataError(f"{read}; repair or remove it, or have such files skipped (--on-error skip)")
                else:
                    on_broken(read)
            if whole:
                yield from zip(whole, best(model, torch.cat(pictures), top), strict=True)


def best(model: Model, images: Tensor, top: int) -> list[Ranked]:
    """The ``top`` classes of each of a batch of normalised images [B, 3, S, S]."""
    with torch.inference_mode():
        scores = model(images.to(model.device))[0].cpu()
    found = scores.topk(min(top, len(model.names)), dim=1)
    return [
        [(model.names[c], value) for value, c in zip(values, classes, strict=True)]
        for values, classes in zip(found.values.tolist(), found.indices.tolist(), strict=True)
    ]


def _read(path: Path, transforms: Transforms) -> Tensor | DataError:
    """A picture, float [1, 3, S, S], or why it cannot be read."""
    try:
        return read_image(path, transforms)
    except DataError as error:
        return error
