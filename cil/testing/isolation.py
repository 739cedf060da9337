"""The checks of isolation: a learner changes nothing outside itself, and keeps no access to closed data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cil.errors import StreamError
from cil.stream import TaskData
from cil.testing.setting import PIXELS, SIZES, Case, probe_images, random_states, require


def check_backbone_untouched(case: Case) -> None:
    """After the stream the shared backbone is bit-identical, frozen and in eval mode."""
    done = case.finished
    require(
        not done.changed,
        f"the backbone's weights changed ({', '.join(done.changed[:3])}); train copies, e.g. with WeightTuner, and use "
        "a Tuner instead of modifying its modules",
    )
    vit = done.learner.backbone
    require(not any(p.requires_grad for p in vit.parameters()), "backbone weights were left with requires_grad=True")
    require(not any(m.training for m in vit.model.modules()), "the backbone was left in training mode")


def check_global_randomness_untouched(case: Case) -> None:
    """Learning and predicting do not change the global random states of Python, numpy and torch."""
    done, states = case.finished, random_states()
    done.learner.predict(probe_images())
    touched = done.drawn_from or [name for name, state in random_states().items() if state != states[name]]
    require(not touched, f"{' and '.join(touched)} global random state was used or set; draw from ctx.generator")


def check_leaves_no_trace(case: Case) -> None:
    """After learning, no parameter has a gradient and no optimiser is kept."""
    learner = case.finished.learner
    with_gradient = [name for name, p in learner.named_parameters() if p.grad is not None]
    require(not with_gradient, f"gradients were left on {', '.join(with_gradient[:3])}")
    optimisers = [k for k, v in vars(learner).items() if isinstance(v, torch.optim.Optimizer)]
    require(not optimisers, f"an optimiser is kept in {', '.join(optimisers)}; make one per stage")


def check_old_images_are_gone(case: Case) -> None:
    """A learner that does not declare ``stores_images`` keeps no images and no open task data."""
    if case.cls.stores_images:
        return
    try:
        done = case.finished
    except StreamError as error:
        raise AssertionError(f"the learner reads old images ({error})") from None
    places = list(_images_in(done.learner))
    require(
        not places,
        f"the learner keeps images or image batches in {', '.join(places[:3])}; declare "
        "stores_images = True if the method requires it",
    )


def check_test_data_unreachable(case: Case) -> None:
    """While learning, a learner reads neither the test split nor later tasks."""
    try:
        done = case.finished
    except StreamError as error:
        raise AssertionError(f"the learner reads closed data while learning: {error}") from None
    require(len(done.stream.tasks[0].seen) == SIZES[0], "the first task contains later classes")
    require(not done.closed_reads, "the learner read the test split while learning")


def _images_in(value: Any, path: str = "learner", depth: int = 0) -> Any:
    """Paths of tensors and arrays shaped like images, and of open task data, below a learner."""
    if isinstance(value, (Tensor, np.ndarray)):
        shape = tuple(value.shape)
        if value.ndim >= 3 and (shape[-3:] == (3, PIXELS, PIXELS) or shape[-3:] == (PIXELS, PIXELS, 3)):
            yield path
    elif isinstance(value, TaskData):
        if not value._closed:
            yield path
    elif depth < 6:
        if isinstance(value, nn.Module):
            items: Any = [*value._parameters.items(), *value._buffers.items(), *value._modules.items()]
            items += [
                (k, v) for k, v in vars(value).items() if not k.startswith("_") and k not in ("backbone", "config")
            ]
        elif isinstance(value, dict):
            items = value.items()
        elif isinstance(value, (list, tuple, set)):
            items = enumerate(value)
        else:
            return
        for key, inner in items:
            yield from _images_in(inner, f"{path}.{key}", depth + 1)
