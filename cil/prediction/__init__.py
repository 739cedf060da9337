"""Classifies images with a trained model, and writes the predictions.

Names are imported when they are first used, so ``cil predict --help`` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cil.prediction.confident import open_confident
    from cil.prediction.model import Model, Ranked, Trained, find_images, open_run, predict, restore

__all__ = ["Model", "Ranked", "Trained", "find_images", "open_confident", "open_run", "predict", "restore"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "cil.prediction.confident" if name == "open_confident" else "cil.prediction.model"
    return getattr(import_module(module), name)
