"""Singular values of updates: what OPCM and isotropic merging share, and isotropic merging itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cil.errors import ConfigError
from cil.linalg import add_gram_
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.linear import SumRule
from cil.merging.store import State


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, q], σ [q] descending, V [n, q] with matrix = U diag(σ) Vᵀ, q = min(m, n).

    Always of the tall orientation: LAPACK takes about one and a half times as long for a wide one. A float32 matrix
    goes through the eigenvectors of its Gram matrix in float64, which is faster. Directions up to :func:`rank` are as
    good as those of an SVD in float32; the others are arbitrary in either.
    """
    m, n = matrix.shape
    if m < n:
        v, sigma, u = thin_svd(matrix.T)
        return u, sigma, v
    if matrix.dtype == torch.float32:
        gram = matrix.new_zeros(n, n, dtype=torch.float64)
        add_gram_(gram, matrix.double(), block=192)
        values, vectors = torch.linalg.eigh(gram)
        sigma = values.flip(0).clamp(min=0).sqrt().to(matrix)
        v = vectors.flip(1).to(matrix)
        return matrix @ v / sigma.clamp(min=torch.finfo(sigma.dtype).tiny), sigma, v
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, sigma, vh.T


def rank(sigma: Tensor, shape: Sequence[int]) -> int:
    """Numerical rank: singular values above max(m, n) ε σ_0. The directions of the others are arbitrary."""
    return int((sigma > max(shape) * torch.finfo(sigma.dtype).eps * sigma[0]).sum())


def row_blocks(entry: Entry, matrix: Tensor, split_qkv: bool) -> tuple[Tensor, ...]:
    """The matrices that stand in a linear weight: query, key and value of a fused one, else the weight itself."""
    return matrix.chunk(3) if split_qkv and entry.fused else (matrix,)


class IsoC(SumRule):
    """Isotropic merging in the common space (Iso-C, arXiv 2502.04959): every singular value becomes their mean.

    For the mean update Δ = U diag(σ) Vᵀ of a linear weight: Δ ← s · mean(σ) U Vᵀ; all other tensors: the plain mean.
    As in mammoth's code. Exact and order-free; one SVD a matrix at read-out. A mean update without full numerical rank
    (LoRA) has arbitrary directions: only those with σ_i > max(m, n) ε σ_0 are used, and the mean is over them (our
    decision).

    Args:
        scale: s, finite; 1.0 to 1.5 in the literature. It scales linear weights only.
        split_qkv: Treat the three row blocks of fused query, key and value weights one by one.

    Slots:
        sum: Σ τ.

    Raises:
        ConfigError: ``scale`` is not finite.
    """

    matrices = True

    def __init__(self, scale: float = 1.0, split_qkv: bool = True, *, finalisers: Sequence[Finaliser] = ()) -> None:
        super().__init__(finalisers)
        if not math.isfinite(scale):
            raise ConfigError(f"IsoC: scale is {scale}; it must be finite")
        self.scale, self.split_qkv = scale, split_qkv

    def read(self, entry: Entry, state: State, surveyed: float) -> Tensor:
        mean = state["sum"] / int(self.count)
        if not entry.linear:
            return mean
        return torch.cat([self.scale * isotropic(block) for block in row_blocks(entry, mean, self.split_qkv)])


def isotropic(matrix: Tensor) -> Tensor:
    """mean(σ) U Vᵀ over the directions of full numerical rank, [m, n]; zero for zero."""
    if not bool(matrix.any()):
        return matrix
    u, sigma, v = thin_svd(matrix)
    known = rank(sigma, matrix.shape)
    return sigma[:known].mean() * (u[:, :known] @ v[:, :known].T)
