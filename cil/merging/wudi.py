"""WUDI: the least interference with every update on its own inputs, without data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from cil.errors import ConfigError
from cil.merging.base import Rule, TaskNorms, TaskStatistics
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.numerics import norm
from cil.merging.regmean import blocks, times
from cil.merging.store import State, StateSpec
from cil.utils.linalg import RESOLUTION, ridge_solve

Anchor = Literal["zero", "mean", "sum"]


class WUDI(Rule):
    """WUDI (Cheng et al., ICML 2025, arXiv 2503.08099): RegMean with each update's own row space in place of inputs.

    The published objective of a linear weight, L(M) = Σ_t ‖(M − Δ_t) Δ_tᵀ‖² / ‖Δ_t‖², is minimised by 300 steps of Adam
    from M = Σ Δ_t. With C_t = Δ_tᵀΔ_t / ‖Δ_t‖² it is Σ_t tr((M − Δ_t) C_t (M − Δ_t)ᵀ), so (our observation) the sums

        S = Σ Δ_t,   C = Σ C_t,   B = Σ Δ_t C_t,   ∇L = 2 (M C − B)

    determine it: the rule is exact and order-free in constant memory, whatever the number of tasks. The closed form,

        M = A + (B − A C) (C + γI)⁻¹,

    shrinks towards the anchor A (0, the mean or the sum of the updates): the minimiser can be several times as large as
    the updates. If the row spaces of the tasks are independent and γ is 0, M answers to every input in the row space of
    a task exactly as that task's update. All other tensors are averaged. A task that did not change a weight is not
    counted for it.

    Args:
        ridge: γ as a multiple of the mean diagonal of C, ≥ 0; with 0 directions outside all row spaces get none of B.
        anchor: A; ``zero``, ``mean`` or ``sum``.
        steps: Number of Adam steps of the published iteration, ≥ 0; with 0 the closed form is used.
        lr: Learning rate of Adam, > 0; 10⁻⁵ as published. Adam's steps have this size whatever the size of the updates.
        block: Largest width of C; wider ones are kept as equal diagonal blocks of at most this width. None: no limit.

    State:
        Linear weights: sum; gram: float64 [k, in/k, in/k], C; product: float64 [out, in], B. Others: sum.

    Raises:
        ConfigError: An argument is out of range.
    """

    summary = "least interference with every update on its own row space"
    paper = "arXiv 2503.08099"
    state_size = "P, another P of linear weights and Gram matrices, float64"
    matrices = True

    def __init__(
        self,
        ridge: float = 0.1,
        anchor: Anchor = "zero",
        steps: int = 0,
        lr: float = 1e-5,
        block: int | None = None,
        *,
        finalisers: Sequence[Finaliser] = (),
    ) -> None:
        super().__init__(finalisers)
        if not 0 <= ridge < math.inf:
            raise ConfigError(f"WUDI: ridge is {ridge}; it must be finite and not negative")
        if anchor not in get_args(Anchor):
            raise ConfigError(f"WUDI: anchor is {anchor!r}; it must be 'zero', 'mean' or 'sum'")
        if steps < 0:
            raise ConfigError(f"WUDI: steps is {steps}; it must not be negative")
        if not 0 < lr < math.inf:
            raise ConfigError(f"WUDI: lr is {lr}; it must be positive and finite")
        if block is not None and block < 1:
            raise ConfigError(f"WUDI: block is {block}; it must be at least 1, or None")
        self.ridge, self.anchor, self.steps, self.lr, self.block = ridge, anchor, steps, lr, block

    def state_spec(self, entry: Entry) -> StateSpec:
        spec: StateSpec = {"sum": (entry.shape, self.layout.dtype)}
        if not entry.linear:
            return spec
        k = blocks(entry.shape[1], self.block)
        width = entry.shape[1] // k
        return {**spec, "gram": ((k, width, width), torch.float64), "product": (entry.shape, torch.float64)}

    def update(self, entry: Entry, state: State, tau: Tensor, task: TaskNorms, stats: TaskStatistics | None) -> State:
        changed = {"sum": state["sum"] + tau}
        if not entry.linear or not bool(tau.any()):
            return {**state, **changed}
        k, width, _ = state["gram"].shape
        delta = tau.double()
        parts = delta.reshape(-1, k, width).transpose(0, 1)
        gram = parts.mT @ parts / norm(tau) ** 2
        gram = (gram + gram.mT) / 2
        return {**changed, "gram": state["gram"] + gram, "product": state["product"] + times(delta, gram)}

    def read(self, entry: Entry, state: State, statistic: float) -> Tensor:
        if not entry.linear:
            return state["sum"] / int(self.count)
        total, gram, product = state["sum"].double(), state["gram"], state["product"]
        if not bool(gram.any()):
            return torch.zeros_like(product)
        if self.steps:
            return descended(total, gram, product, self.steps, self.lr)
        factor = {"zero": 0.0, "mean": 1 / int(self.count), "sum": 1.0}[self.anchor]
        rest = product - times(factor * total, gram)
        if self.ridge == 0:
            return factor * total + times(rest, torch.linalg.pinv(gram, hermitian=True, rtol=RESOLUTION))
        k, width, _ = gram.shape
        strength = self.ridge * float(gram.diagonal(dim1=1, dim2=2).mean())
        right = rest.reshape(-1, k, width).permute(1, 2, 0)  # [k, in/k, out]
        return factor * total + ridge_solve(gram, right, strength).permute(2, 0, 1).reshape(entry.shape)


def descended(start: Tensor, gram: Tensor, product: Tensor, steps: int, lr: float) -> Tensor:
    """The published iteration: Adam from the sum of the updates, with the gradient 2 (M C − B)."""
    weight = start.clone()
    optimizer = torch.optim.Adam([weight], lr=lr)
    for _ in range(steps):
        weight.grad = 2 * (times(weight, gram) - product)
        optimizer.step()
    return weight
