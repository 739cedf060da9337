"""Symmetric float64 matrices: inverses that do not fail, Gram matrices that are exactly symmetric."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cil.errors import TrainingError

BLOCK = 1024


def symmetric_inverse(matrix: Tensor) -> Tensor:
    """Inverse of a symmetric matrix [F, F] by Cholesky; the pseudo-inverse where that is not numerically possible.

    A factorisation whose pivots span more than ten digits is not trusted: what is left of them is rounding, and the
    eigenvalues below float64 resolution have to be cut instead.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if not int(failed) and bool(pivots.min() > 1e-10 * pivots.max()):
        return torch.cholesky_inverse(factor)
    return torch.linalg.pinv(matrix, hermitian=True)


def ridge_solve(gram: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Solve (gram + strength·I) W = targets by Cholesky, [(…,) M, M] and [(…,) M, C] → [(…,) M, C].

    A strength below float64's resolution of ``gram`` (their sum is then not numerically positive definite) is raised
    tenfold until it counts: the solution is the one of the smallest strength that can be told from zero.

    Raises:
        TrainingError: ``gram`` is not finite.
    """
    while strength < math.inf:
        shifted = _shifted(gram, strength)
        failed = torch.empty(0, dtype=torch.int32, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(shifted, out=(shifted, failed))  # in its place
        if not bool(failed.any()):
            return torch.cholesky_solve(targets, factor)
        strength *= 10
    raise TrainingError("the features are too large: their squares are not finite in float64")


def _shifted(gram: Tensor, strength: float) -> Tensor:
    """gram + strength·I in LAPACK's order, columns first: what is factored in place there needs no further copy."""
    shifted = gram.mT.clone(memory_format=torch.contiguous_format).mT
    shifted.diagonal(dim1=-2, dim2=-1).add_(strength)
    return shifted


def add_gram_(gram: Tensor, rows: Tensor, block: int = BLOCK) -> None:
    """gram += rowsᵀ rows in place, [M, M] and [n, M]: half the products, and symmetric to the bit.

    Args:
        block: Columns at once; smaller ones save more of the products, larger ones are faster where all are needed.
    """
    blocks = rows.split(block, dim=1)
    for i, left in enumerate(blocks):
        below = slice(i * block, i * block + left.shape[1])
        for j, right in enumerate(blocks[: i + 1]):
            beside = slice(j * block, j * block + right.shape[1])
            product = left.T @ right
            if i == j:
                gram[below, below] += (product + product.T) / 2
            else:
                gram[below, beside] += product
                gram[beside, below] = gram[below, beside].T


def eigh_(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ≥ 0 [M] and eigenvectors [M, M] of a positive semi-definite matrix, which they overwrite.

    LAPACK needs two more matrices of this size while it works.
    """
    values = matrix.new_empty(0)
    values, vectors = torch.linalg.eigh(matrix.mT, out=(values, matrix.mT))
    return values.clamp(min=0), vectors  # rounding puts eigenvalues of 0 on either side of it
