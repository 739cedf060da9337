"""Null-space filtering of new updates, and a small correction that brings back what the filter took."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from cil.errors import ConfigError
from cil.merging.base import Task, TaskStatistics
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.linear import SumRule
from cil.merging.spectral import rank, row_blocks, thin_svd
from cil.merging.store import State
from cil.randomness import generator


class NUFILT(SumRule):
    """NUFILT (arXiv 2509.21413; written from a second-hand description): updates act where old ones do not.

    For a linear weight [m, n] with accumulated update c and new update τ, V_p the leading right singular vectors of c
    (the inputs the merged update answers to) and P = I − V_p V_pᵀ:

        c ← c + τ (P + B A),   B [n, r], A [r, n]

    ``steps=0`` leaves B A out, which is the closed form: inputs in the span of V_p see none of the new update.
    Otherwise B A is fitted by Adam, in weight space and without data, to give the new task its main directions back and
    leave the old ones alone: with the top right singular vectors V_c of c and V_τ of τ,

        min ‖ [θ^(t−1)V_c, θ_t V_τ] − (θ^(t−1) + τP + τBA) [V_c, V_τ] ‖²,

    in which θ_0 cancels, so that updates are enough. Tensors that are no linear weights are averaged. The model is not
    rescaled: its norm grows with the tasks.

    Decided here, where the description leaves it open: B starts at zero and A from N(0, 1/n), drawn from the seed, the
    task's number and the tensor's name; V_p and the top vectors stop at the numerical rank of c and τ (the directions
    beyond are arbitrary), so a c of rank below ``protected`` is protected as a whole; a fused qkv weight is three
    matrices. The first task is added as it is.

    Args:
        protected: Width of V_p, ≥ 1; 128 as published, for matrices at least 512 wide. Where it reaches the width n,
            nothing of a later task is left.
        steps: Adam steps, ≥ 0; 50 as published, 0: the closed form.
        rank: r, ≥ 1; 64 as published.
        lr: Adam's rate, > 0.
        directions: Top singular vectors of c and of τ in the fit, ≥ 1.
        split_qkv: Treat the three row blocks of fused query, key and value weights one by one.
        seed: Of A, ≥ 0.

    Slots:
        sum: c.

    Raises:
        ConfigError: An argument is out of range.
    """

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

    def update(self, entry: Entry, state: State, tau: Tensor, task: Task, stats: TaskStatistics | None) -> State:
        if not int(self.count) or not entry.linear:
            return {"sum": state["sum"] + tau}
        drawn = generator(self.seed, int(self.count), zlib.crc32(entry.name.encode()))
        pairs = zip(
            row_blocks(entry, state["sum"], self.split_qkv), row_blocks(entry, tau, self.split_qkv), strict=True
        )
        return {"sum": torch.cat([c + self.filtered(t, c, drawn) for c, t in pairs])}

    def read(self, entry: Entry, state: State, surveyed: float) -> Tensor:
        return state["sum"] if entry.linear else state["sum"] / int(self.count)

    def filtered(self, tau: Tensor, accumulated: Tensor, drawn: torch.Generator) -> Tensor:
        """τ (P + B A), [m, n]."""
        if not bool(accumulated.any()) or not bool(tau.any()):
            return tau
        old, new = _answered(accumulated), _answered(tau)
        answered = old[:, : self.protected]
        inside = tau @ answered @ answered.T
        if not self.steps:
            return tau - inside
        old, new = old[:, : self.directions], new[:, : self.directions]
        top = torch.cat([old, new], dim=1)
        # what τBA has to give there; on old inputs that is nothing, while they are among the protected ones
        wanted = torch.cat([(inside - tau) @ old, (inside - accumulated) @ new], dim=1)
        b = tau.new_zeros(tau.shape[1], self.rank).requires_grad_()
        a = torch.randn(self.rank, tau.shape[1], generator=drawn, dtype=tau.dtype) / math.sqrt(tau.shape[1])
        a = a.to(tau.device).requires_grad_()
        optimizer = torch.optim.Adam([a, b], lr=self.lr)
        with torch.enable_grad():
            for _ in range(self.steps):
                optimizer.zero_grad()
                (tau @ (b @ (a @ top)) - wanted).square().sum().backward()
                optimizer.step()
        return tau - inside + tau @ (b.detach() @ a.detach())


def _answered(matrix: Tensor) -> Tensor:
    """The inputs a matrix [m, n] answers to, strongest first: right singular vectors [n, rank]."""
    _, sigma, v = thin_svd(matrix)
    return v[:, : rank(sigma, matrix.shape)]
