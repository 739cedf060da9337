"""The learners: one file per method, in the terms of its paper. Importing a class imports that method only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cil.learners.registry import BUILTIN, build_learner, resolve

if TYPE_CHECKING:
    from cil.learner import Learner


__all__ = ["BUILTIN", "build_learner", "resolve"]


def __getattr__(name: str) -> type[Learner]:
    for learner, path in BUILTIN.items():
        if path.endswith(f":{name}"):
            return resolve(learner)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(path.rsplit(":", 1)[1] for path in BUILTIN.values())})
