"""Symmetric and lower-triangular matrices as their lower triangle, row by row: F (F + 1) / 2 numbers in place of F².

This is the packed storage of LAPACK (with ``uplo='U'`` in its column-major order). Sums of squares and Cholesky factors
are kept in it, one per class or of thousands of features, because it halves what they occupy in memory and on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from cil.utils.linalg import BLOCK


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
