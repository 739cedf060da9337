"""Iso-CTS: directions that tasks share, and directions of each task alone, all with one singular value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cil.errors import ConfigError
from cil.merging.bank import ExpertBank, StoredDtype
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.numerics import norm, rank, require_finite, row_blocks, thin_svd
from cil.merging.tsv_m import polar


class IsoCTS(ExpertBank):
    """Isotropic merging in common and task-specific subspaces (Iso-CTS, arXiv 2502.04959), exact from a bank.

    For a linear weight with updates Δ_t of T tasks, M = Σ Δ_t, q = min(m, n) and a share f of common directions,
    K = round((q − ⌊f q⌋) / T) directions belong to each task and c = q − K T are common:

    1. U_c, σ_c, V_c are the first c directions of M.
    2. U_t, σ_t, V_t are the first K directions of (I − U_c U_cᵀ) Δ_t.
    3. Δ = s · mean(σ) polar(U) polar(V)ᵀ with U = [U_1 … U_T, U_c], σ and V alike.

    All other tensors are averaged. With K = 0, as for T > 2 (q − ⌊f q⌋), it is Iso-C of the sum. Three cases are
    decided here: M and the remainders have only as many directions as their numerical rank (LoRA), as in
    :class:`IsoC`; a remainder is compared with Δ_t, so that rounding is no direction; and K is at most ⌊q/T⌋.

    Args:
        scale: Factor s, finite; 1.0 to 1.5 in the literature. It scales only linear weights.
        fraction: Share f of common directions, in [0, 1].
        split_qkv: Whether the three row blocks of a fused query, key and value weight are separate matrices.
        max_rank, dtype: See :class:`ExpertBank`.

    Raises:
        ConfigError: An argument is out of range.
    """

    summary = "common and task-specific directions with equal singular values"
    paper = "arXiv 2502.04959"
    matrices = True

    def __init__(
        self,
        scale: float = 1.0,
        fraction: float = 0.8,
        split_qkv: bool = True,
        max_rank: int | None = None,
        dtype: StoredDtype | None = None,
        *,
        finalisers: Sequence[Finaliser] = (),
    ) -> None:
        super().__init__(max_rank, dtype, finalisers=finalisers)
        require_finite("IsoCTS", scale)
        if not 0 <= fraction <= 1:
            raise ConfigError(f"IsoCTS: fraction is {fraction}; it must be in [0, 1]")
        self.scale, self.fraction, self.split_qkv = scale, fraction, split_qkv

    def merge(self, entry: Entry, updates: Sequence[Tensor]) -> Tensor:
        if not entry.linear:
            return super().merge(entry, updates)
        blocks = zip(*(row_blocks(entry, update, self.split_qkv) for update in updates), strict=True)
        return torch.cat([self.scale * common_and_specific(block, self.fraction) for block in blocks])


def common_and_specific(updates: Sequence[Tensor], fraction: float) -> Tensor:
    """The update of a matrix, [m, n], from those of all tasks; see :class:`IsoCTS`. Zero if their sum is zero."""
    total = sum(updates[1:], updates[0])
    if not bool(total.any()):
        return torch.zeros_like(total)
    q, tasks = min(total.shape), len(updates)
    specific = min(round((q - int(fraction * q)) / tasks), q // tasks)
    u, sigma, v = thin_svd(total)
    c = min(q - specific * tasks, rank(sigma, total.shape))
    parts = [(u[:, :c], sigma[:c], v[:, :c])]
    for update in updates if specific else ():
        left, kept, right = thin_svd(update - u[:, :c] @ (u[:, :c].T @ update))
        noise = max(total.shape) * torch.finfo(kept.dtype).eps * norm(update)
        k = min(specific, int((kept > noise).sum()))
        parts.append((left[:, :k], kept[:k], right[:, :k]))
    us, sigmas, vs = (torch.cat(each, dim=-1) for each in zip(*parts, strict=True))
    return sigmas.double().mean() * polar(us) @ polar(vs).T
