"""NUFILT: null-space filtering of new updates, and a small correction that restores part of what the filter removed."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from cil.errors import ConfigError
from cil.merging.base import TaskNorms, TaskStatistics
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.linear import SumRule
from cil.merging.numerics import rank, row_blocks, thin_svd
from cil.merging.store import State
from cil.utils.randomness import generator


class NUFILT(SumRule):
    """NUFILT (arXiv 2509.21413; written from a second-hand description): updates act only where old ones do not.

    For a linear weight [m, n] with accumulated update c and new update τ, V_p the leading right singular vectors of c
    (the inputs the merged update answers to) and P = I − V_p V_pᵀ:

        c ← c + τ (P + B A),   B [n, r], A [r, n]

    With ``steps=0`` there is no B A; this is the closed form, in which the new update does not act on inputs in the
    span of V_p. Otherwise Adam fits B A in weight space, without data, so that the main directions of the new task are
    restored and those of the old tasks do not change: with the top right singular vectors V_c of c and V_τ of τ,

        min ‖ [θ^(t−1)V_c, θ_t V_τ] − (θ^(t−1) + τP + τBA) [V_c, V_τ] ‖²,

    θ_0 cancels in it, so updates are sufficient. Tensors that are not linear weights are averaged. The model is not
    rescaled, so its norm grows with the tasks.

    The description leaves some points open, which are decided here: B starts at zero and A at N(0, 1/n), drawn from the
    seed, the task's number and the tensor's name. V_p and the top vectors end at the numerical rank of c and τ, beyond
    which directions are arbitrary, so a c of rank below ``protected`` is protected completely. A fused qkv weight is
    three matrices. The first task is added as it is.

    Args:
        protected: Number of columns of V_p, ≥ 1; 128 as published, for matrices at least 512 wide. If it reaches the
            width n, nothing of a later task is left.
        steps: Number of Adam steps, ≥ 0; 50 as published, 0: the closed form.
        rank: Rank r of the correction, ≥ 1; 64 as published.
        lr: Learning rate of Adam, > 0.
        directions: Number of top singular vectors of c and of τ in the fit, ≥ 1.
        split_qkv: Whether the three row blocks of a fused query, key and value weight are separate matrices.
        seed: Seed of A, ≥ 0.

    State:
        sum: c.

    Raises:
        ConfigError: An argument is out of range.
    """

    summary = "updates restricted to directions that old ones do not use, then corrected"
    paper = "arXiv 2509.21413"
    order_free = False
    matrices = True

    def __init__(
        self,
        protected: int = 128,
        steps: int = 50,
        rank: int = 64,
        lr: float = 1e-3,
        directions: int = 8,
        split_qkv: bool = True,
        seed: int = 0,
        *,
        finalisers: Sequence[Finaliser] = (),
    ) -> None:
        super().__init__(finalisers)
        for name, value, least in (
            ("protected", protected, 1),
            ("steps", steps, 0),
            ("rank", rank, 1),
            ("directions", directions, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ConfigError(f"NUFILT: {name} is {value}; it must be at least {least}")
        if not 0 < lr < math.inf:
            raise ConfigError(f"NUFILT: lr is {lr}; it must be positive and finite")
        self.protected, self.steps, self.rank, self.lr = protected, steps, rank, lr
        self.directions, self.split_qkv, self.seed = directions, split_qkv, seed

    def update(self, entry: Entry, state: State, tau: Tensor, task: TaskNorms, stats: TaskStatistics | None) -> State:
        if not int(self.count) or not entry.linear:
            return {"sum": state["sum"] + tau}
        random = generator(self.seed, int(self.count), zlib.crc32(entry.name.encode()))
        pairs = zip(
            row_blocks(entry, state["sum"], self.split_qkv), row_blocks(entry, tau, self.split_qkv), strict=True
        )
        return {"sum": torch.cat([c + self.filtered(t, c, random) for c, t in pairs])}

    def read(self, entry: Entry, state: State, statistic: float) -> Tensor:
        return state["sum"] if entry.linear else state["sum"] / int(self.count)

    def filtered(self, tau: Tensor, accumulated: Tensor, random: torch.Generator) -> Tensor:
        """Return τ (P + B A), [m, n], for an update τ and the accumulated update, [m, n] each."""
        if not bool(accumulated.any()) or not bool(tau.any()):
            return tau
        old, new = _input_directions(accumulated), _input_directions(tau)
        protected = old[:, : self.protected]
        inside = tau @ protected @ protected.T
        if not self.steps:
            return tau - inside
        old, new = old[:, : self.directions], new[:, : self.directions]
        top = torch.cat([old, new], dim=1)
        # the target of τBA on these directions; it is zero on old ones, as far as they are protected
        target = torch.cat([(inside - tau) @ old, (inside - accumulated) @ new], dim=1)
        b = tau.new_zeros(tau.shape[1], self.rank).requires_grad_()
        a = torch.randn(self.rank, tau.shape[1], generator=random, dtype=tau.dtype) / math.sqrt(tau.shape[1])
        a = a.to(tau.device).requires_grad_()
        optimizer = torch.optim.Adam([a, b], lr=self.lr)
        with torch.enable_grad():
            for _ in range(self.steps):
                optimizer.zero_grad()
                (tau @ (b @ (a @ top)) - target).square().sum().backward()
                optimizer.step()
        return tau - inside + tau @ (b.detach() @ a.detach())


def _input_directions(matrix: Tensor) -> Tensor:
    """The inputs that a matrix [m, n] acts on, strongest first: right singular vectors [n, rank]."""
    _, sigma, v = thin_svd(matrix)
    return v[:, : rank(sigma, matrix.shape)]
