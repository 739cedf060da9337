"""Isotropic merging: every singular value of the merged update becomes their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cil.errors import ConfigError
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.linear import SumRule
from cil.merging.numerics import rank, require_finite, row_blocks, thin_svd
from cil.merging.store import State


class IsoC(SumRule):
    """Isotropic merging in the common space (Iso-C, arXiv 2502.04959): every singular value becomes their mean.

    For the sum Δ = U diag(σ) Vᵀ of the T updates of a linear weight, Δ ← s · mean(σ) U Vᵀ. With ``of="mean"`` Δ is
    their mean, so the result is divided by T. All other tensors are averaged, as in mammoth's code. The rule is exact
    and order-free, and reading needs one SVD per matrix. A Δ without full numerical rank (LoRA) has arbitrary
    directions: only those with σ_i > max(m, n) ε σ_0 are used, and the mean is over them (our decision).

    Args:
        scale: Factor s, finite; 1.0 to 1.5 in the literature, for the sum. It scales only linear weights.
        of: Δ, the ``sum`` of the updates as published, or their ``mean``, which was the default once.
        split_qkv: Whether the three row blocks of a fused query, key and value weight are separate matrices.

    State:
        sum: Σ τ.

    Raises:
        ConfigError: ``scale`` is not finite, or ``of`` is unknown.
    """

    summary = "merged update with equal singular values"
    paper = "arXiv 2502.04959"
    matrices = True

    def __init__(
        self,
        scale: float = 1.0,
        split_qkv: bool = True,
        of: Literal["mean", "sum"] = "sum",
        *,
        finalisers: Sequence[Finaliser] = (),
    ) -> None:
        super().__init__(finalisers)
        require_finite("IsoC", scale)
        if of not in ("mean", "sum"):
            raise ConfigError(f"IsoC: of is {of!r}; it must be 'mean' or 'sum'")
        self.scale, self.split_qkv, self.of = scale, split_qkv, of

    def read(self, entry: Entry, state: State, statistic: float) -> Tensor:
        mean = state["sum"] / int(self.count)
        if not entry.linear:
            return mean
        merged = state["sum"] if self.of == "sum" else mean
        return torch.cat([self.scale * isotropic(block) for block in row_blocks(entry, merged, self.split_qkv)])


def isotropic(matrix: Tensor) -> Tensor:
    """Return mean(σ) U Vᵀ over the directions within the numerical rank, [m, n]; zero for a zero matrix."""
    if not bool(matrix.any()):
        return matrix
    u, sigma, v = thin_svd(matrix)
    known = rank(sigma, matrix.shape)
    return sigma[:known].mean() * (u[:, :known] @ v[:, :known].T)
