"""Avalanche both ways: our streams as its benchmarks, its strategies as our learner, our learners in its scripts.

Avalanche is imported in this package and nowhere else, and only when asked for: it takes seconds. Its own class
splitting and its checkpoints are not used: given a number of experiences that does not divide the classes it drops the
rest without a word, and what it pickles does not always unpickle. It is handed finished tasks, and what its strategies
keep between tasks is kept for them (:mod:`cil.avalanche.memory`).
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cil.avalanche.data import benchmark
    from cil.avalanche.script import as_strategy

_WHERE = {"benchmark": "data", "as_strategy": "script"}

__all__ = ["as_strategy", "benchmark"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'cil.avalanche' has no attribute {name!r}")
    load()
    return getattr(import_module(f"cil.avalanche.{_WHERE[name]}"), name)


def load() -> None:
    """Import Avalanche's strategies, without the warning that no quadratic solver is there: nothing here needs one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no QP solver found")
        import_module("avalanche.training.supervised")
