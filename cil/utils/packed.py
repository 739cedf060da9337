"""Symmetric and lower-triangular matrices as their lower triangle, row by row: F (F + 1) / 2 numbers in place of F².

This is the packed storage of LAPACK (with ``uplo='U'`` in its column-major order). Sums of squares and Cholesky factors
are kept in it, one per class or of thousands of features, because it halves what they occupy in memory and on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from scipy.linalg.lapack import dpftrf, dpftrs, dtpttf
from threadpoolctl import ThreadpoolController
from torch import Tensor

from cil.errors import TrainingError
from cil.utils.linalg import BLOCK, TOO_LARGE, ridge_solve


def packed_size(width: int) -> int:
    """Numbers of the lower triangle of a matrix [F, F], with its diagonal."""
    return width * (width + 1) // 2


def pack(matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """The lower triangle of a matrix [F, F], [F (F + 1) / 2]; what is above the diagonal is not read.

    Args:
        matrix: The matrix.
        out: Where the triangle is written; None: a new tensor.
    """
    width = len(matrix)
    out = matrix.new_empty(packed_size(width)) if out is None else out
    for rows, part, mask in _blocks(width, matrix.device):
        torch.masked_select(matrix[rows, : rows.stop], mask, out=out[part])
    return out


def unpack_lower(packed: Tensor, width: int) -> Tensor:
    """The matrix [F, F] with this lower triangle [F (F + 1) / 2], and zeros above."""
    if width <= BLOCK:
        return unpack(packed, width).tril_()
    matrix = packed.new_zeros(width, width)
    for rows, part, mask in _blocks(width, packed.device):
        matrix[rows, : rows.stop].masked_scatter_(mask, packed[part])
    return matrix


def unpack(packed: Tensor, width: int) -> Tensor:
    """The symmetric matrix [F, F] with this lower triangle [F (F + 1) / 2]; a new tensor."""
    if width <= BLOCK:
        return packed.index_select(0, _places(width, packed.device)).view(width, width)
    matrix = unpack_lower(packed, width)
    starts = range(0, width, BLOCK)
    for i in starts:
        rows = matrix[i : i + BLOCK]
        for j in starts[: i // BLOCK]:
            matrix[j : j + BLOCK, i : i + BLOCK] = rows[:, j : j + BLOCK].T
        own = rows[:, i : i + BLOCK]
        own += own.tril(-1).T
    return matrix


def add_packed_gram_(packed: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows to a matrix [M, M] in packed form, in place; ``rows`` are [n, M].

    Products and sums are those of :func:`cil.utils.linalg.add_gram_`, bit for bit.
    """
    columns = rows.split(BLOCK, dim=1)
    for i, (_, part, mask) in enumerate(_blocks(rows.shape[1], rows.device)):
        strip = torch.cat([columns[i].T @ other for other in columns[: i + 1]], dim=1)
        own = strip[:, i * BLOCK :]
        own.copy_((own + own.T) / 2)
        packed[part] += strip.masked_select(mask)


def packed_ridge_solve(packed: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Solve (G + strength·I) Wᵀ = targetsᵀ by Cholesky for a matrix G in packed form, [C, M] → [C, M].

    The factor is as large as the packed form (LAPACK's rectangular full packed form, LAWN 199): half of what
    :func:`cil.utils.linalg.ridge_solve` needs, which does the same on a GPU, where there is no such routine. If the sum
    is not numerically positive definite, ``strength`` is multiplied by ten until the factorisation succeeds.

    Args:
        packed: G, float64 [M (M + 1) / 2]; it is not changed.
        targets: Right-hand sides, float64 [C, M]; they are not changed.
        strength: Number > 0.

    Raises:
        TrainingError: G is not finite.
    """
    width = targets.shape[1]
    if packed.device.type != "cpu":
        return ridge_solve(lambda: unpack(packed, width), targets.T, strength).T
    if not bool(packed.isfinite().all()):
        raise TrainingError(TOO_LARGE)
    failed = 1
    with ThreadpoolController().limit(limits=torch.get_num_threads(), user_api="blas"):  # scipy has a BLAS of its own
        while failed:
            if strength == math.inf:
                raise TrainingError(TOO_LARGE)
            factor, _ = dtpttf(width, packed.numpy(), uplo="U")
            factor[_rectangular_diagonal(width)] += strength
            factor, failed = dpftrf(width, factor, uplo="U", overwrite_a=1)
            strength *= 10
        solved, _ = dpftrs(width, factor, targets.clone().numpy().T, uplo="U", overwrite_b=1)
    return torch.from_numpy(solved.T)


def _rectangular_diagonal(width: int) -> np.ndarray:
    """Where the diagonal [M] is in LAPACK's rectangular full packed form with ``uplo='U'``, ``transr='N'``.

    Its columns, of M numbers or M + 1 for an even M, are those of the upper triangle from column M // 2 on. Below them
    lies the transpose of the triangle before.
    """
    half, length = width // 2, width + (width % 2 == 0)
    first, second = np.arange(half), np.arange(half, width)
    return np.concatenate([half + 1 + first + first * length, second + (second - half) * length])


def diagonals(packed: Tensor, width: int) -> Tensor:
    """The diagonals [..., F] of matrices in packed form [..., F (F + 1) / 2]; a copy."""
    rows = torch.arange(width, device=packed.device)
    return packed[..., rows * (rows + 3) // 2]


@lru_cache(maxsize=4)
def _places(width: int, device: torch.device) -> Tensor:
    """Where each entry of a symmetric matrix is in its packed form, int32 [F²]."""
    rows = torch.arange(width, dtype=torch.int32, device=device)
    higher, lower = torch.maximum(rows[:, None], rows), torch.minimum(rows[:, None], rows)
    return (higher * (higher + 1) // 2 + lower).flatten()


def _blocks(width: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of rows, the part of the packed form that holds each, and which entries [rows, stop] they contain."""
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        mask = torch.ones(stop - start, stop, dtype=torch.bool, device=device).tril_(start)
        yield slice(start, stop), slice(packed_size(start), packed_size(stop)), mask
