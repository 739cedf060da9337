"""DARE: entries of every task vector are dropped at random and the rest is scaled up, then vectors are merged."""

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
from cil.merging.ties import TIES, Combination
from cil.utils.randomness import generator


class _Drop(Rule):
    """τ ← mask ⊙ τ / (1 − p), mask ~ Bernoulli(1 − p), which does not change the expectation.

    A mask depends only on the seed, the task's number and the tensor's name. So the order in which tensors are read
    does not matter, and a resumed merge has the same masks as an uninterrupted one.
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
        # the same as PEFT's random_pruning, which draws from the global random state
        keep = torch.full(entry.shape, 1 - self.drop, dtype=tau.dtype)
        mask = torch.bernoulli(keep, generator=generator(self.seed, int(self.count), zlib.crc32(entry.name.encode())))
        return tau * mask.to(tau.device) / (1 - self.drop)


class DARE(_Drop, TaskArithmetic):
    """Task arithmetic of dropped and rescaled task vectors (DARE, arXiv 2311.03099): θ = θ_0 + s Σ mask_t ⊙ τ_t/(1−p).

    It equals PEFT's ``dare_linear`` with ``density`` = 1 − p, except for the source of the masks.

    Args:
        drop: Probability p that an entry is dropped, in [0, 1).
        scale, divide: Factors, as in :class:`TaskArithmetic`.
        seed: Seed of the masks, an integer ≥ 0, or a generator from which one is drawn immediately.

    Raises:
        ConfigError: An argument is out of range.
    """

    summary = "scaled sum of randomly dropped, rescaled updates"
    paper = "arXiv 2311.03099"
    order_free = False  # masks depend on the task's number

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
    """TIES with DARE in place of trimming.

    For ``merge="mean", scale=1`` it equals PEFT's ``dare_ties``, except for the source of the masks.

    Args:
        drop: Probability p that an entry is dropped, in [0, 1).
        merge, scale: How entries are combined and scaled, as in :class:`TIES`.
        seed: Seed of the masks, an integer ≥ 0, or a generator from which one is drawn immediately.

    Raises:
        ConfigError: An argument is out of range.
    """

    summary = "TIES with random dropping in place of trimming"
    paper = "arXiv 2311.03099"
    order_free = False

    def __init__(
        self,
        drop: float = 0.5,
        merge: Combination = "sum",
        scale: float = 0.3,
        seed: int | torch.Generator = 0,
        *,
        finalisers: Sequence[Finaliser] = (),
    ) -> None:
        super().__init__(1.0, merge, scale, finalisers=finalisers)
        self._set(drop, seed)
