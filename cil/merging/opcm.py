"""Orthogonal projection-based continual merging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cil.errors import ConfigError
from cil.merging.base import Task, TaskStatistics
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.linear import SumRule
from cil.merging.numerics import norm
from cil.merging.spectral import rank, row_blocks, thin_svd
from cil.merging.store import State

Variant = Literal["diag_zeroed", "diag_kept", "paper"]

_SLACK = 1e-6
"""Shares of the nuclear norm this close to α are equal to it: float32 and float64 then split at the same place."""


class OPCM(SumRule):
    """OPCM (arXiv 2501.09522): each update is projected away from what the merged one does, and the norm is held.

    For a linear weight [m, n] with accumulated update S and new update Δ, S = U diag(σ) Vᵀ, C = UᵀΔV:

        S ← S + P(Δ),   P(Δ) = Σ_{i,j kept} C_ij u_i v_jᵀ,   θ = θ_0 + S · n̄ / ‖S‖₂,

    n̄ being the mean of ‖τ_t‖₂ over the tasks; all other tensors are summed (P = identity). r directions lie before the
    one with which the cumulated σ, as a share of the nuclear norm Σσ, crosses α: these are protected. Three operators
    carry the name, and differ in the pairs (i, j) they keep:

    ============== ============================================ =======================================================
    variant        removed                                      source
    ============== ============================================ =======================================================
    diag_zeroed    i, j < r, and i = j                          FusionBench since March 2025
    diag_kept      i, j < r                                     tanganke/opcm and MINGLE's copy, where filling
                                                                ``Tensor.diag()`` changes a copy
    paper          i < r or j < r, and i = j                    the paper's formula, second-hand: from a third party's
                                                                quotation of it
    ============== ============================================ =======================================================

    The published rule keeps θ^(t−1) and a factor λ with λ (θ^(t−1) − θ_0) = S; keeping S is the same and does not
    cancel. Nor are full bases needed; with the thin ones

        P(Δ) = Δ − U_r(U_rᵀΔV_r)V_rᵀ − Σ_{i≥r} C_ii u_i v_iᵀ,    paper: (I − U_rU_rᵀ) Δ (I − V_rV_rᵀ) − the same sum

    (both our observations, pinned by tests; no sum for ``diag_kept``). Removing the diagonal makes
    ⟨P(Δ), S⟩ = 0, so the same task twice adds nothing to linear weights; ``diag_kept`` has neither property.

    Decided here where the reference leaves it open:

    * Every floating point tensor takes part, not only those of modules without children; norms count exactly these.
    * The diagonal is removed only where σ_i > max(m, n) ε σ_0, ε that of the dtype: elsewhere the basis is arbitrary.
      S = 0: P = identity.
    * α = 1 protects every direction of S, α = 0 none. A share equal to α up to 10⁻⁶ counts as equal: the code's test
      ``share > α`` then crosses later than the paper's ``share ≥ α``.
    * A fused qkv weight is three matrices (``split_qkv``), which is nearer to the published setting's separate ones.
    * Where two σ nearly coincide the diagonal is ill-conditioned by nature: float32 and float64 then agree to about
      10⁻⁷ over the relative gap. Nothing is done about it, since the operator is defined so.
    * One SVD in float32 (float64 for float64 models); half precision is widened first.

    The first task is never projected: results depend on the order, so report several. The norm is the whole model's,
    so one layer with a large update sets the scale for all. For LoRA hand over ΔW (``add_update``), never A and B. One
    thin SVD a matrix and task: O(m n min(m, n)).

    Args:
        alpha: α in [0, 1]; 0.5 is the published default.
        variant: See the table.
        split_qkv: Treat the three row blocks of fused query, key and value weights one by one.

    Slots:
        sum: S.

    Raises:
        ConfigError: An argument is out of range.
    """

    order_free = False
    matrices = True
    surveys = True

    def __init__(
        self,
        alpha: float = 0.5,
        variant: Variant = "diag_zeroed",
        split_qkv: bool = True,
        *,
        finalisers: Sequence[Finaliser] = (),
    ) -> None:
        super().__init__(finalisers)
        if not 0 <= alpha <= 1:
            raise ConfigError(f"OPCM: alpha is {alpha}; it must be in [0, 1]")
        if variant not in ("diag_zeroed", "diag_kept", "paper"):
            raise ConfigError(f"OPCM: variant is {variant!r}; it must be 'diag_zeroed', 'diag_kept' or 'paper'")
        self.alpha, self.variant, self.split_qkv = alpha, variant, split_qkv

    def update(self, entry: Entry, state: State, tau: Tensor, task: Task, stats: TaskStatistics | None) -> State:
        if not int(self.count) or not entry.linear:
            return {"sum": state["sum"] + tau}
        pairs = zip(
            row_blocks(entry, tau, self.split_qkv), row_blocks(entry, state["sum"], self.split_qkv), strict=True
        )
        return {"sum": torch.cat([s + project(d, s, self.alpha, self.variant) for d, s in pairs])}

    def survey(self, entry: Entry, state: State) -> float:
        return norm(state["sum"]) ** 2

    def read(self, entry: Entry, state: State, surveyed: float) -> Tensor:
        return state["sum"] * (self.mean_norm / math.sqrt(surveyed)) if surveyed else state["sum"]


def project(delta: Tensor, accumulated: Tensor, alpha: float, variant: Variant = "diag_zeroed") -> Tensor:
    """P(Δ) of OPCM for one matrix.

    Args:
        delta: Δ [m, n], float32 or float64.
        accumulated: S [m, n]; its scale does not matter.
        alpha: Share of the nuclear norm, in [0, 1].
        variant: See :class:`OPCM`.

    Returns:
        [m, n].
    """
    if not bool(accumulated.any()):
        return delta
    u, sigma, v = thin_svd(accumulated)
    known = rank(sigma, accumulated.shape)
    r = split(sigma[:known], alpha, inclusive=variant == "paper")
    top_u, top_v = u[:, :r], v[:, :r]
    image = delta @ v[:, : r if variant == "diag_kept" else known]  # the columns of Δ V that are looked at
    if variant == "paper":  # what is left of Δ V_r, for (I − U_rU_rᵀ) Δ goes on without it
        delta = delta - top_u @ (top_u.T @ delta)
        removed = delta @ top_v
    else:
        removed = top_u @ (top_u.T @ image[:, :r])
    if variant != "diag_kept":
        diagonal = (u[:, r:known] * image[:, r:known]).sum(0)  # C_ii
        removed = torch.cat([removed, u[:, r:known] * diagonal], dim=1)
    return torch.addmm(delta, removed, v[:, : removed.shape[1]].T, alpha=-1)


def split(sigma: Tensor, alpha: float, inclusive: bool) -> int:
    """r, the number of singular values before the one whose cumulated share crosses α.

    Args:
        sigma: Positive singular values, descending.
        alpha: In [0, 1]; 1 gives all of them.
        inclusive: Whether a share equal to α has crossed it (the paper) or not (the code).
    """
    if alpha == 1:
        return len(sigma)
    share = sigma.double().cumsum(0) / sigma.double().sum()
    return int((share < alpha - _SLACK if inclusive else share <= alpha + _SLACK).sum())
