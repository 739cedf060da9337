"""Linear algebra of symmetric float64 matrices: inverses that do not fail, and exactly symmetric Gram matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cil.errors import TrainingError

BLOCK = 1024
"""Rows or columns that are processed at once."""


def symmetric_inverse(matrix: Tensor) -> Tensor:
    """Invert a symmetric matrix [F, F] by Cholesky, or return its pseudo-inverse if it is numerically singular.

    A factorisation whose pivots span more than ten digits is not used: its smallest pivots are mostly rounding error,
    and the eigenvalues below float64 resolution have to be dropped instead.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if not int(failed) and bool(pivots.min() > 1e-10 * pivots.max()):
        return torch.cholesky_inverse(factor)
    return torch.linalg.pinv(matrix, hermitian=True)


def ridge_solve(gram: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Solve (gram + strength·I) W = targets by Cholesky, [(…,) M, M] and [(…,) M, C] → [(…,) M, C].

    If the sum is not numerically positive definite, the strength is below float64's resolution of ``gram``. It is then
    multiplied by ten until the factorisation succeeds.

    Raises:
        TrainingError: ``gram`` is not finite.
    """
    while strength < math.inf:
        shifted = _shifted(gram, strength)
        failed = torch.empty(0, dtype=torch.int32, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(shifted, out=(shifted, failed))  # in place
        if not bool(failed.any()):
            return torch.cholesky_solve(targets, factor)
        strength *= 10
    raise TrainingError("the features are too large: their squares are not finite in float64")


def _shifted(gram: Tensor, strength: float) -> Tensor:
    """gram + strength·I in LAPACK's column-major order, in which it can be factored in place without another copy."""
    shifted = gram.mT.clone(memory_format=torch.contiguous_format).mT
    shifted.diagonal(dim1=-2, dim2=-1).add_(strength)
    return shifted


def add_gram_(gram: Tensor, rows: Tensor, block: int = BLOCK) -> None:
    """Add rowsᵀ rows to ``gram`` in place; about half of the products are computed, and ``gram`` is exactly symmetric.

    Args:
        gram: Symmetric matrix [M, M].
        rows: Matrix [n, M].
        block: Number of columns per product, ≥ 1. Smaller blocks compute fewer of the products twice, larger ones
            compute each of them faster.
    """
    blocks = rows.split(block, dim=1)
    for i, left in enumerate(blocks):
        i_range = slice(i * block, i * block + left.shape[1])
        for j, right in enumerate(blocks[: i + 1]):
            j_range = slice(j * block, j * block + right.shape[1])
            product = left.T @ right
            if i == j:
                gram[i_range, i_range] += (product + product.T) / 2
            else:
                gram[i_range, j_range] += product
                gram[j_range, i_range] = gram[i_range, j_range].T


def eigh_(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues ≥ 0 [M] and eigenvectors [M, M] of a positive semi-definite matrix, which is overwritten.

    LAPACK needs memory for two more matrices of this size.
    """
    values = matrix.new_empty(0)
    values, vectors = torch.linalg.eigh(matrix.mT, out=(values, matrix.mT))
    return values.clamp(min=0), vectors  # rounding makes some eigenvalues of 0 negative
