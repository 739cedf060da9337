"""DARE: drop entries of every task vector at random, scale up the rest, then merge as usual."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cil.errors import ConfigError
from cil.merging.base import Rule
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.linear import TaskArithmetic
from cil.merging.ties import TIES, Merge
from cil.randomness import generator


class _Drop(Rule):
    """τ ← mask ⊙ τ / (1 − p), mask ~ Bernoulli(1 − p), which leaves the expectation as it is.

    Masks depend on the seed, the task's number and the tensor's name alone: not on the order in which tensors are read,
    and an interrupted merge goes on with the masks it would have had.
    """

    drop: float
    seed: int

    def _set(self, drop: float, seed: int | torch.Generator) -> None:
        if not 0 <= drop < 1:
            raise ConfigError(f"{type(self).__name__}: drop is {drop}; it must be in [0, 1)")
        self.drop = drop
        self.seed = int(torch.randint(2**62, (1,), generator=seed)) if isinstance(seed, torch.Generator) else seed
        if self.seed < 0:
            raise ConfigError(f"{type(self).__name__}: seed is {seed}; it must be at least 0")

    def prepare(self, entry: Entry, tau: Tensor) -> Tensor:
        # PEFT's random_pruning draws from the global random state; this is the same with a generator of one's own
        keep = torch.full(entry.shape, 1 - self.drop, dtype=tau.dtype)
        mask = torch.bernoulli(keep, generator=generator(self.seed, int(self.count), zlib.crc32(entry.name.encode())))
        return tau * mask.to(tau.device) / (1 - self.drop)


class DARE(_Drop, TaskArithmetic):
    """Task arithmetic of dropped and rescaled task vectors (DARE, arXiv 2311.03099): θ = θ_0 + s Σ mask_t ⊙ τ_t/(1−p).

    PEFT's ``dare_linear`` with ``density`` = 1 − p, except for the source of the masks.

    Args:
        drop: p, in [0, 1).
        scale, divide: As in :class:`TaskArithmetic`.
        seed: An integer ≥ 0, or a generator from which one is drawn at once.

    Raises:
        ConfigError: An argument is out of range.
    """

    order_free = False  # masks are numbered

    def __init__(
        self,
        drop: float = 0.5,
        scale: float = 0.3,
        divide: Literal["none", "tasks"] = "none",
        seed: int | torch.Generator = 0,
        *,
        finalisers: Sequence[Finaliser] = (),
    ) -> None:
        super().__init__(scale, divide, finalisers=finalisers)
        self._set(drop, seed)


class DareTIES(_Drop, TIES):
    """TIES with DARE in place of trimming; PEFT's ``dare_ties`` for ``merge="mean", scale=1``, but for the masks.

    Args:
        drop: p, in [0, 1).
        merge, scale: As in :class:`TIES`.
        seed: An integer ≥ 0, or a generator from which one is drawn at once.

    Raises:
        ConfigError: An argument is out of range.
    """

    order_free = False

    def __init__(
        self,
        drop: float = 0.5,
        merge: Merge = "sum",
        scale: float = 0.3,
        seed: int | torch.Generator = 0,
        *,
        finalisers: Sequence[Finaliser] = (),
    ) -> None:
        super().__init__(1.0, merge, scale, finalisers=finalisers)
        self._set(drop, seed)
