"""A model that keeps learning: `cil learn`, `undo`, `forget`, `rename` and `show` on one folder.

Names are imported when they are first used, so ``cil show`` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cil.growing.model import GrowingModel, Taught

__all__ = ["DEFAULT_LEARNER", "HOLDOUT", "GrowingModel", "Taught"]

DEFAULT_LEARNER = {"name": "layer_lda"}
"""The learner of a new model: the best one of the stored results on every stream, and order-free. On wide or other
backbones it uses less of them, see :func:`cil.growing.setting.default_learner`."""
HOLDOUT = 0.2
"""Share of each class's images that a lesson holds out by default."""


def __getattr__(name: str) -> Any:
    if name not in ("GrowingModel", "Taught"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("cil.growing.model"), name)
