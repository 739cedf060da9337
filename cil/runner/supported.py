"""Which learners are defined on which kind of stream; the others are refused by name before anything trains."""

from __future__ import annotations

from typing import Any

from cil.config.cleaning import NoiseFilter
from cil.errors import StreamError
from cil.learner import Learner
from cil.learners.bases.on_features import OnFeatures
from cil.stream import Stream


def require_supported(
    cls: type[Learner], stream: Stream, parameters: Any = None, noise_filter: NoiseFilter | None = None
) -> None:
    """Refuse a learner that is not defined on this kind of stream, or with a filter of its images.

    Args:
        cls: Class of the learner.
        stream: The tasks.
        parameters: The learner's configuration; None: any.
        noise_filter: The filter of training images; None for none.

    Raises:
        StreamError: The learner needs new classes in every task, or with its settings all images of a class at once,
            and a task shows old classes again. It keeps old images, and a filter chooses those of the current task.
    """
    if noise_filter is not None and cls.stores_images:
        raise StreamError(
            f"{cls.name or cls.__name__} keeps old images, and noise_filter is not defined for it: it votes on the "
            "images of the current task alone; remove noise_filter, or use a learner that keeps none (ncm, ranpac, …)"
        )
    if stream.online is not None:
        require_batches(cls, parameters)
    if not (stream.shows_again or stream.online):
        return
    if cls.needs_new_classes:
        raise StreamError(
            f"{cls.name or cls.__name__} is defined for tasks of new classes only, and this stream shows classes "
            "again; use stream.type=class_incremental, or another learner (ncm, ranpac, …)"
        )
    for key, wanted in whole_classes(parameters).items():
        raise StreamError(
            f"{cls.name or cls.__name__} with {key} needs all images of a class in one task, and this stream shows "
            f"classes again; use stream.type=class_incremental, or {wanted}"
        )


def whole_classes(parameters: Any) -> dict[str, str]:
    """Settings that need all images of a class at once, as they are called, and what to set instead."""
    found = {"balance": "balance=false"} if getattr(parameters, "balance", False) else {}
    return found | ({"calibrate=draws": "calibrate=none"} if getattr(parameters, "calibrate", "") == "draws" else {})


def require_batches(cls: type[Learner], parameters: Any) -> None:
    """Refuse a learner that needs a task's images together.

    Args:
        cls: Class of the learner.
        parameters: Its configuration; None: any.

    Raises:
        StreamError: It does not declare that it learns in batches, or its settings take something from a whole task.
    """
    name, layers = cls.name or cls.__name__, getattr(parameters, "layers", None)
    if not cls.learns_batches:
        raise StreamError(
            f"{name} is not defined for stream.online: it learns from all images of a task together; use ncm, slda or "
            "ranpac, or remove stream.online"
        )
    needed = [*whole_classes(parameters).values()]
    if getattr(parameters, "tuner", None) is not None:
        needed.append("tuner=null")
    if needed:
        raise StreamError(f"{name} needs {needed[0]} with stream.online, which gives it a few images at a time")
    if issubclass(cls, OnFeatures) and layers is not None and layers.scale == "rms":
        raise StreamError(
            f"{name} needs layers.scale=unit or none with stream.online: rms is taken from all images of the first task"
        )
