"""Linear algebra of symmetric float64 matrices: inverses and factors that do not fail, and symmetric Gram matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cil.errors import TrainingError

BLOCK = 1024
"""Rows or columns that are processed at once."""
RESOLUTION = 1e-10
"""A variance below this share of the largest one is mostly rounding error."""
TOO_LARGE = "the features are too large: their squares are not finite in float64"
FREE = 1e-4
"""If the share of free directions 1 − tr S / n is below this, the residual sum of squares is mostly rounding error."""


def symmetric_inverse(matrix: Tensor, missing: float | None = None) -> Tensor:
    """Invert a covariance matrix [F, F] by Cholesky; if it is singular, directions without variance get one.

    A factorisation whose pivots span more than ten digits is not used: its smallest pivots are mostly rounding error of
    the sums that the matrix comes from. Then all eigenvalues that are as small are replaced by ``missing``. The
    pseudo-inverse would drop these directions, or divide by their rounding error, although class means may differ in no
    other.

    Args:
        matrix: Symmetric matrix [F, F].
        missing: Variance of directions that have none, > 0; None: the mean of the diagonal, or 1 for a zero matrix.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if not int(failed) and bool(pivots.min() > RESOLUTION * pivots.max()):
        return torch.cholesky_inverse(factor)
    values, vectors = torch.linalg.eigh(matrix)
    known = values.abs() > RESOLUTION * values.abs().max()
    unit = missing or float(matrix.diagonal().mean()) or 1.0
    return (vectors / torch.where(known, values, unit)) @ vectors.T


def low_rank_root(matrix: Tensor, residue: float, most: int) -> Tensor | None:
    """R [r, F] with RᵀR = ``matrix`` up to ``residue`` on the diagonal, by pivoted Cholesky; None for r > ``most``.

    Args:
        matrix: Positive semi-definite matrix, float64 [F, F].
        residue: Variances below it are taken to be 0, > 0.
        most: Largest rank r that is wanted.
    """
    from scipy.linalg.lapack import dpstrf

    factor, pivots, rank, _ = dpstrf(matrix.cpu().numpy(), tol=residue, lower=1)
    if rank > most:
        return None
    root = np.zeros((rank, len(matrix)))
    root[:, pivots - 1] = np.tril(factor[:, :rank]).T
    return torch.from_numpy(root).to(matrix)


def ridge_solve(gram: Tensor | Callable[[], Tensor], targets: Tensor, strength: float) -> Tensor:
    """Solve (gram + strength·I) W = targets by Cholesky, [(…,) M, M] and [(…,) M, C] → [(…,) M, C].

    See :func:`shifted_cholesky` for a function in place of the matrix, and for a sum that is not numerically positive
    definite.

    Raises:
        TrainingError: ``gram`` is not finite.
    """
    factor, _ = shifted_cholesky(gram, strength)
    # torch.cholesky_solve, which does the same, copies the factor
    half = torch.linalg.solve_triangular(factor, targets, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True, out=half)


def shifted_cholesky(gram: Tensor | Callable[[], Tensor], strength: float) -> tuple[Tensor, float]:
    """Factor gram + strength·I, [(…,) M, M], and return the lower factor and the strength in use.

    A function in place of the matrix returns a new one whenever it is called, which the factor then replaces: one
    matrix [M, M] is in memory instead of two.

    If the sum is not numerically positive definite, the strength is below float64's resolution of ``gram``. It is then
    multiplied by ten until the factorisation succeeds.

    Raises:
        TrainingError: ``gram`` is not finite.
    """
    while strength < math.inf:
        shifted = _shifted(gram, strength)
        failed = torch.empty(0, dtype=torch.int32, device=shifted.device)
        factor, failed = torch.linalg.cholesky_ex(shifted, out=(shifted, failed))  # in place
        if not bool(failed.any()):
            return factor, strength
        strength *= 10
    raise TrainingError(TOO_LARGE)


def _shifted(gram: Tensor | Callable[[], Tensor], strength: float) -> Tensor:
    """gram + strength·I in LAPACK's column-major order, in which it can be factored in place without another copy."""
    # a symmetric matrix is its own transpose, so a new one is in this order already
    shifted = gram.mT.clone(memory_format=torch.contiguous_format).mT if isinstance(gram, Tensor) else gram().mT
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


def generalised_errors(
    values: Tensor, explained: Tensor, total: float, samples: int, strengths: Sequence[float], fitted: int = 0
) -> list[float]:
    """Generalised cross-validation of ridge regression (Golub, Heath, Wahba 1979): (RSS / n) / (1 − tr S / n)².

    With the Gram matrix V diag(s) Vᵀ of the regressors, RSS = ‖Y‖² − Σ_k a_k (s_k + 2λ) / (s_k + λ)² and
    tr S = ``fitted`` + Σ_k s_k / (s_k + λ).

    Args:
        values: Eigenvalues s ≥ 0 of the Gram matrix, [M].
        explained: a, the squared length of each row of VᵀXᵀY, [M].
        total: ‖Y‖², the squares of all targets.
        samples: Number n ≥ 1 of samples.
        strengths: Candidates for λ > 0.
        fitted: Directions that are fitted without a penalty, 1 for an intercept.

    Returns:
        The error of each candidate; infinite if it leaves no direction free.
    """
    errors = []
    for strength in strengths:
        free = 1 - (fitted + (values / (values + strength)).sum().item()) / samples
        rss = total - (explained * (values + 2 * strength) / (values + strength).square()).sum().item()
        errors.append(rss / samples / free**2 if free >= FREE else math.inf)
    return errors
