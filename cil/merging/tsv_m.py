"""TSV-M: the leading singular vectors of all updates, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cil.errors import BackboneError
from cil.merging.base import Rule, TaskNorms, TaskStatistics
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.numerics import rank, require_finite, row_blocks, thin_svd
from cil.merging.store import State, StateSpec


class TSVM(Rule):
    """Task singular vectors (TSV-M, Gargiulo et al., CVPR 2025, arXiv 2412.00081).

    For a linear weight with updates Δ_t = U_t diag(σ_t) V_tᵀ of T tasks, q = min(m, n) and k = ⌊q/T⌋, the first k
    directions of all tasks stand side by side, U = [U_1[:, :k] … U_T[:, :k]], σ and V alike, and are made orthogonal:

        Δ = s · polar(U) diag(σ) polar(V)ᵀ,   polar(A) = P Qᵀ of the thin SVD A = P Σ Qᵀ.

    All other tensors are averaged. The rule is exact and order-free in constant memory (our observation): k only falls
    with T, and the directions that are kept are a prefix of those kept before, at most q in all; polar commutes with a
    permutation of columns. It needs one thin SVD per matrix and task, and two per matrix when it is read.

    Two cases in which the reference takes arbitrary directions are decided here. An update of lower numerical rank than
    k (LoRA) has only as many directions as its rank: null vectors, though of weight 0, would change polar(U). If U or V
    itself lacks rank, as for two equal tasks, polar leaves the missing directions out. Δ has about the norm of the sum
    of the updates; :class:`NormMatching` gives it that of their mean.

    Args:
        scale: Factor s, finite; 1 in the reference. It scales only linear weights.
        split_qkv: Whether the three row blocks of a fused query, key and value weight are separate matrices.

    State:
        Linear weights, for each of their b blocks: u [b, m, q], s [b, q], v [b, n, q]; owner: int64 [b, q], the task of
        each column, 0 for an unused one. Others: sum.

    Raises:
        ConfigError: ``scale`` is not finite.
    """

    summary = "leading singular vectors of all updates, made orthogonal to each other"
    paper = "arXiv 2412.00081"
    state_size = "q (m + n + 2) per linear weight [m, n], q = min(m, n)"
    matrices = True

    def __init__(self, scale: float = 1.0, split_qkv: bool = True, *, finalisers: Sequence[Finaliser] = ()) -> None:
        super().__init__(finalisers)
        require_finite("TSVM", scale)
        self.scale, self.split_qkv = scale, split_qkv

    def state_spec(self, entry: Entry) -> StateSpec:
        dtype = self.layout.dtype
        if not entry.linear:
            return {"sum": (entry.shape, dtype)}
        b, m, n, q = self._sizes(entry)
        return {
            "u": ((b, m, q), dtype),
            "s": ((b, q), dtype),
            "v": ((b, n, q), dtype),
            "owner": ((b, q), torch.int64),
        }

    def inspect(self, entry: Entry, tau: Tensor, stats: TaskStatistics | None) -> None:
        if entry.linear and int(self.count) >= self._sizes(entry)[3]:
            q = self._sizes(entry)[3]
            raise BackboneError(
                f"TSVM: {entry.name} has {q} singular directions, so {q} tasks can be merged; leave the weight out "
                "with exclude, or choose another rule"
            )

    def update(self, entry: Entry, state: State, tau: Tensor, task: TaskNorms, stats: TaskStatistics | None) -> State:
        if not entry.linear:
            return {"sum": state["sum"] + tau}
        number = int(self.count) + 1
        matrices = row_blocks(entry, tau, self.split_qkv)
        found = [
            extended({slot: value[i] for slot, value in state.items()}, matrix, number)
            for i, matrix in enumerate(matrices)
        ]
        return {slot: torch.stack([one[slot] for one in found]) for slot in state}

    def read(self, entry: Entry, state: State, statistic: float) -> Tensor:
        if not entry.linear:
            return state["sum"] / int(self.count)
        blocks = []
        for u, s, v, owner in zip(state["u"], state["s"], state["v"], state["owner"], strict=True):
            used = owner > 0
            blocks.append(self.scale * (polar(u[:, used]) * s[used].double()) @ polar(v[:, used]).T)
        return torch.cat(blocks)

    def _sizes(self, entry: Entry) -> tuple[int, int, int, int]:
        """Number of blocks b, their rows m and columns n, and q = min(m, n)."""
        b = 3 if self.split_qkv and entry.fused else 1
        m, n = entry.shape[0] // b, entry.shape[1]
        return b, m, n, min(m, n)


def extended(state: State, matrix: Tensor, number: int) -> State:
    """The kept directions after task ``number``, counted from 1, with the update ``matrix`` [m, n].

    Args:
        state: u [m, q], s [q], v [n, q] and owner [q]; the columns of a task are in descending order of s.
        matrix: The update of the task.
        number: The number of tasks so far, with this one.
    """
    owner, width = state["owner"], len(state["owner"])
    k = width // number
    earlier = (owner[:, None] == owner[None]).tril(-1).sum(1)  # columns of the same task before this one
    kept = (owner > 0) & (earlier < k)
    u, sigma, v = thin_svd(matrix)
    new = min(k, rank(sigma, matrix.shape)) if bool(matrix.any()) else 0
    unused = width - int(kept.sum()) - new
    empty = {"u": u.new_zeros(len(u), unused), "s": sigma.new_zeros(unused), "v": v.new_zeros(len(v), unused)}
    fresh = {"u": u[:, :new], "s": sigma[:new], "v": v[:, :new], "owner": owner.new_full((new,), number)}
    empty["owner"] = owner.new_zeros(unused)
    return {slot: torch.cat([state[slot][..., kept], fresh[slot], empty[slot]], dim=-1) for slot in state}


def polar(matrix: Tensor) -> Tensor:
    """P Qᵀ of the thin SVD A = P Σ Qᵀ within the numerical rank, float64 [m, c]; with full rank it is the matrix with
    orthonormal columns that is nearest to A."""
    if not matrix.shape[1]:
        return matrix.double()
    left, sigma, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    known = rank(sigma.to(matrix.dtype), matrix.shape)
    return left[:, :known] @ right[:known]
