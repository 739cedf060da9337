"""OPCM: orthogonal projection-based continual merging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cil.errors import ConfigError
from cil.merging.base import TaskNorms, TaskStatistics
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.linear import SumRule
from cil.merging.numerics import norm, rank, row_blocks, thin_svd
from cil.merging.store import State

Variant = Literal["diag_zeroed", "diag_kept", "paper"]

_SLACK = 1e-6
"""Shares of the nuclear norm this close to α count as equal to it, so that float32 and float64 split alike."""


class OPCM(SumRule):
    """OPCM (arXiv 2501.09522): each update is projected away from the merged one, and the norm is kept constant.

    For a linear weight [m, n] with accumulated update S and new update Δ, S = U diag(σ) Vᵀ, C = UᵀΔV:

        S ← S + P(Δ),   P(Δ) = Σ_{i,j kept} C_ij u_i v_jᵀ,   θ = θ_0 + S · n̄ / ‖S‖₂,

    where n̄ is the mean of ‖τ_t‖₂ over the tasks. All other tensors are summed (P = identity). The first r directions
    are protected: those before the one at which the cumulative sum of σ, as a share of the nuclear norm Σσ, crosses α.
    Three operators have this name; they differ in the pairs (i, j) that they keep:

    ============== ============================================ =======================================================
    variant        removed                                      source
    ============== ============================================ =======================================================
    diag_zeroed    i, j < r, and i = j                          FusionBench since March 2025
    diag_kept      i, j < r                                     tanganke/opcm and MINGLE's copy, where filling
                                                                ``Tensor.diag()`` changes a copy
    paper          i < r or j < r, and i = j                    the paper's formula, as a third party quotes it
    ============== ============================================ =======================================================

    The published rule keeps θ^(t−1) and a factor λ with λ (θ^(t−1) − θ_0) = S; keeping S is equivalent and
    avoids cancellation. Full bases are not needed either; with the thin ones

        P(Δ) = Δ − U_r(U_rᵀΔV_r)V_rᵀ − Σ_{i≥r} C_ii u_i v_iᵀ,    paper: (I − U_rU_rᵀ) Δ (I − V_rV_rᵀ) − the same sum

    (both are our observations, checked by tests; there is no sum for ``diag_kept``). Removing the diagonal makes
    ⟨P(Δ), S⟩ = 0, so adding a task a second time does not change linear weights; ``diag_kept`` has neither property.

    The reference leaves these points open; they are decided as follows:

    * Every floating point tensor is merged, not only those of modules without children; norms are over exactly these.
    * The diagonal is removed only where σ_i > max(m, n) ε σ_0, with the ε of the dtype: elsewhere the basis is
      arbitrary. For S = 0, P = identity.
    * α = 1 protects every direction of S, α = 0 none. A share equal to α up to 10⁻⁶ counts as equal: the code's test
      ``share > α`` then crosses later than the paper's ``share ≥ α``.
    * A fused qkv weight is three matrices (``split_qkv``), which is closer to the separate ones of the publication.
    * If two σ nearly coincide, the diagonal is ill-conditioned: float32 and float64 then agree to about 10⁻⁷ divided by
      the relative gap. This is not corrected, since it follows from the definition of the operator.
    * The SVD is computed in float32 (float64 for float64 models); half precision is widened first.

    The first task is never projected, so results depend on the order of the tasks: report several orders. The norm is
    that of the whole model, so one layer with a large update sets the scale for all. For LoRA, pass ΔW
    (``add_update``), never A and B. The cost is one thin SVD per matrix and task, O(m n min(m, n)).

    Args:
        alpha: Share α of the nuclear norm that is protected, in [0, 1]; 0.5 is the published default.
        variant: Projection operator, see the table.
        split_qkv: Whether the three row blocks of a fused query, key and value weight are separate matrices.

    State:
        sum: S.

    Raises:
        ConfigError: An argument is out of range.
    """

    summary = "updates projected away from the merged one, at the mean norm"
    paper = "arXiv 2501.09522"
    order_free = False
    matrices = True
    needs_global_statistic = True

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

    def update(self, entry: Entry, state: State, tau: Tensor, task: TaskNorms, stats: TaskStatistics | None) -> State:
        if not int(self.count) or not entry.linear:
            return {"sum": state["sum"] + tau}
        pairs = zip(
            row_blocks(entry, tau, self.split_qkv), row_blocks(entry, state["sum"], self.split_qkv), strict=True
        )
        return {"sum": torch.cat([s + project(d, s, self.alpha, self.variant) for d, s in pairs])}

    def global_statistic(self, entry: Entry, state: State) -> float:
        return norm(state["sum"]) ** 2

    def read(self, entry: Entry, state: State, statistic: float) -> Tensor:
        return state["sum"] * (self.mean_norm / math.sqrt(statistic)) if statistic else state["sum"]


def project(delta: Tensor, accumulated: Tensor, alpha: float, variant: Variant = "diag_zeroed") -> Tensor:
    """Compute P(Δ) of OPCM for one matrix.

    Args:
        delta: Δ [m, n], float32 or float64.
        accumulated: S [m, n]; its scale does not matter.
        alpha: Protected share of the nuclear norm, in [0, 1].
        variant: Projection operator, see :class:`OPCM`.

    Returns:
        P(Δ), [m, n].
    """
    if not bool(accumulated.any()):
        return delta
    u, sigma, v = thin_svd(accumulated)
    known = rank(sigma, accumulated.shape)
    r = split(sigma[:known], alpha, inclusive=variant == "paper")
    top_u, top_v = u[:, :r], v[:, :r]
    mapped = delta @ v[:, : r if variant == "diag_kept" else known]  # the columns of Δ V that are needed
    if variant == "paper":  # first (I − U_rU_rᵀ) Δ, from which the part on V_r is then removed
        delta = delta - top_u @ (top_u.T @ delta)
        removed = delta @ top_v
    else:
        removed = top_u @ (top_u.T @ mapped[:, :r])
    if variant != "diag_kept":
        diagonal = (u[:, r:known] * mapped[:, r:known]).sum(0)  # C_ii
        removed = torch.cat([removed, u[:, r:known] * diagonal], dim=1)
    return torch.addmm(delta, removed, v[:, : removed.shape[1]].T, alpha=-1)


def split(sigma: Tensor, alpha: float, inclusive: bool) -> int:
    """Return r, the number of singular values before the one at which the cumulative share crosses α.

    Args:
        sigma: Positive singular values, descending.
        alpha: Protected share, in [0, 1]; 1 gives all of them.
        inclusive: Whether a share equal to α has crossed it (the paper) or not (the code).
    """
    if alpha == 1:
        return len(sigma)
    share = sigma.double().cumsum(0) / sigma.double().sum()
    return int((share < alpha - _SLACK if inclusive else share <= alpha + _SLACK).sum())
