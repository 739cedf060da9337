"""A model that keeps learning: `cil learn`, `undo`, `forget`, `rename` and `show` on one folder.

Names are imported when they are first used, so ``cil show`` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cil.growing.model import GrowingModel, Taught

__all__ = ["DEFAULT_LEARNER", "HOLDOUT", "GrowingModel", "Taught"]

DEFAULT_LEARNER = {"name": "fecam", "shrinkage": [10.0, 10.0]}
"""The learner of a new model. RanPAC reaches more where a class has many images, but keeps some 800 MB in every stage;
this one keeps 300 kB per class, and can forget a class exactly without its images."""
HOLDOUT = 0.2
"""Share of each class's images that a lesson holds out by default."""


def __getattr__(name: str) -> Any:
    if name not in ("GrowingModel", "Taught"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("cil.growing.model"), name)
