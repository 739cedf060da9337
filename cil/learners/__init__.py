"""One file a method, in the paper's terms; importing a class imports that method only."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from cil.learners.registry import BUILTIN

if TYPE_CHECKING:
    from cil.learner import Learner


def __getattr__(name: str) -> type[Learner]:
    for path in BUILTIN.values():
        module, _, attribute = path.partition(":")
        if attribute == name:
            return getattr(import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
