"""A page on which a model is taught: `cil teach`.

Names are imported when they are first used, so the other commands need neither torch nor a web server.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cil.app.server import serve
    from cil.app.teaching import Teacher, Upload

__all__ = ["REJECT", "Teacher", "Upload", "serve"]

REJECT = 0.05
"""Fraction of the images of known classes that may be taken for unknown ones, by default."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("cil.app.server" if name == "serve" else "cil.app.teaching"), name)
