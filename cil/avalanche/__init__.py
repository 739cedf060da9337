"""Avalanche in both directions: our streams as its benchmarks, its strategies as learners, our learners as strategies.

Avalanche is imported only in this package and only on demand, because the import takes seconds. Its class splitting is
not used: if the number of experiences does not divide the number of classes, it silently drops the rest. Its
checkpoints are not used either, because they are pickles. Avalanche receives complete tasks instead, and the state that
its strategies keep between tasks is stored in :mod:`cil.avalanche.memory`.
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
    import_avalanche()
    return getattr(import_module(f"cil.avalanche.{_WHERE[name]}"), name)


def import_avalanche() -> None:
    """Import Avalanche's strategies without its warning about a missing quadratic solver, which is not needed here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no QP solver found")
        import_module("avalanche.training.supervised")
