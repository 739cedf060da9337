"""From a finished run to class names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from cil import hardware
from cil.data.images import read_image
from cil.runner import restore


def predict(run: Path, images: Sequence[Path], top: int = 5, device: str = "cpu") -> Iterator[tuple[Path, list[tuple[str, float]]]]:
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
