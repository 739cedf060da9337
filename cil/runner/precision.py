"""The choice of ``precision: auto``: float32 or bfloat16, whichever is faster here, timed once and then kept.

bfloat16 is faster on GPUs and on processors that multiply it, and slower on others, some with AVX512_BF16 among them,
so no list of processors decides: the backbone itself is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, is_bf16_available

from cil import results
from cil.backbone import Backbone, Backbones
from cil.errors import RunError
from cil.runner.plan import Plan
from cil.utils.randomness import generator

SECONDS = 1.0
"""How long the two precisions are timed, after one warm-up of each."""
GAIN = 0.9
"""bfloat16 is chosen if it takes at most this share of float32's time: it rounds more, so a tie goes to float32."""
MOST_IMAGES = 16


def settled(todo: Sequence[Plan], root: Path, backbone: Backbone, accelerator: Accelerator) -> tuple[list[Plan], str]:
    """The runs of a benchmark with ``precision: auto``, each with a precision, and a line that says how it was chosen.

    A run keeps the precision that its folder records. The others have that of the first run that has one, so that a
    benchmark is not split, or else the faster one. The main process decides for all.

    Args:
        todo: The runs.
        root: The results folder.
        backbone: The frozen backbone, on its device.
        accelerator: Device and processes.
    """
    decided: list[Any] = [None]
    if accelerator.is_main_process:
        recorded = [_recorded(root / plan.place) for plan in todo]
        usual, line = next((one for one in recorded if one is not None), None), "as recorded"
        if usual is None:
            took = seconds(backbone) if is_bf16_available() else {"fp32": 1.0, "bf16": 1.0}
            usual = "bf16" if took["bf16"] <= GAIN * took["fp32"] else "fp32"
            line = f"bf16 takes {took['bf16'] / took['fp32']:.2f} of the time of fp32 here"
        decided = [([one or usual for one in recorded], f"precision: {usual} ({line})")]
    broadcast_object_list(decided)
    chosen, line = decided[0]
    plans = [
        replace(plan, config=plan.config.model_copy(update={"precision": one}))
        for plan, one in zip(todo, chosen, strict=True)
    ]
    return plans, line


def _recorded(folder: Path) -> str | None:
    """The precision of the run in a folder; None if there is none, or none that can be read."""
    try:
        return str(results.read_header(folder)["config"]["precision"])
    except RunError:
        return None


def seconds(backbone: Backbone) -> dict[str, float]:
    """Seconds of a forward and a backward pass of a few images of noise, by precision: medians of alternating passes.

    The backward pass leads to the images, as that of a tuner in the first block does.
    """
    _step(backbone, 1, "fp32")  # a first pass is slower
    images = max(1, min(MOST_IMAGES, int(SECONDS / 20 / _step(backbone, 1, "fp32"))))
    found: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for precision in found:
        _step(backbone, images, precision)
    deadline = time.perf_counter() + SECONDS
    while not found["bf16"] or time.perf_counter() < deadline:
        for precision, times in found.items():
            times.append(_step(backbone, images, precision))
    return {precision: statistics.median(times) for precision, times in found.items()}


def _step(backbone: Backbone, images: int, precision: str) -> float:
    packed = isinstance(backbone, Backbones)  # several backbones take packed images
    shape = (3, backbone.data_config["input_size"][-1]) if packed else backbone.input_size
    noise = torch.randn(images, *shape, generator=generator(0, 0)).to(backbone.device).requires_grad_()
    started = time.perf_counter()
    with torch.autocast(backbone.device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = backbone(noise)
    [gradient] = torch.autograd.grad(features.float().sum(), noise)
    gradient.sum().item()  # a GPU has computed everything once this number is here
    return time.perf_counter() - started
