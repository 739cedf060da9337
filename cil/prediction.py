"""From a finished run to class names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from cil import hardware, results
from cil.backbone import load_backbone
from cil.checkpoint import RunFolder
from cil.config import Config
from cil.data.images import read_image
from cil.data.transforms import Transforms
from cil.errors import RunError
from cil.features import FeatureCache
from cil.learner import Context, Learner
from cil.learners import registry
from cil.randomness import isolated
from cil.stream import past_tasks


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


def predict(
    run: Path, images: Sequence[Path], top: int = 5, device: str = "cpu"
) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """The best classes of each image after the run's last finished stage.

    Args:
        run: A run folder with its stages.
        images: Image files.
        top: How many classes.
        device: As ``hardware.device``.

    Yields:
        (path, [(class name, the learner's own score), …] best first).

    Raises:
        RunError: The run cannot be loaded.
        DataError: An image cannot be read.
    """
    accelerator = hardware.accelerator(device)
    learner, transforms, names = restore(run, accelerator)
    for path in images:
        pixels = read_image(path, transforms).to(accelerator.device)
        with torch.inference_mode():
            scores = learner.logits(learner.features(pixels).float())[0].float().cpu()
        best = scores.topk(min(top, len(names)))
        yield path, [(names[i], v) for v, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
