"""Covariances as few directions plus a diagonal: r F numbers per class in place of F²/2, and as many products."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cil.utils.linalg import eigh_


class LowRank(NamedTuple):
    """The matrix RᵀR + diag(d) [F, F] with few rows R [r, F] and a diagonal d ≥ 0 [F]."""

    rows: Tensor
    rest: Tensor

    @property
    def variances(self) -> Tensor:
        """The diagonal of the matrix, [F]."""
        return self.rows.square().sum(0) + self.rest

    def __truediv__(self, number: float) -> LowRank:
        return LowRank(self.rows / number**0.5, self.rest / number)

    def dense(self) -> Tensor:
        """The matrix, [F, F], exactly symmetric."""
        matrix = self.rows.T @ self.rows
        matrix = (matrix + matrix.T) / 2
        matrix.diagonal().add_(self.rest)
        return matrix


def leading(rows: Tensor, rest: Tensor, rank: int) -> LowRank:
    """The matrix RᵀR + diag(d) with at most ``rank`` rows; it has the same diagonal.

    The leading eigenvectors of RᵀR are kept, and what the others have on the diagonal is added to d. Rows whose matrix
    has ``rank`` directions or fewer lose nothing.

    Args:
        rows: R, float64 [n, F].
        rest: d, float64 [F].
        rank: Number of rows that are kept; fewer if n or F is smaller.
    """
    n, width = rows.shape
    if n <= rank:
        return LowRank(rows, rest)
    if n <= width:
        _, vectors = eigh_(rows @ rows.T)
        turned = vectors.T @ rows
    else:
        values, vectors = eigh_(rows.T @ rows)
        turned = values.sqrt()[:, None] * vectors.T
    lost, kept = turned.split([len(turned) - rank, rank])  # eigenvalues ascend
    return LowRank(kept, rest + lost.square().sum(0))


class LowRankRoot:
    """L with L Lᵀ = RᵀR + D, D = diag(d) > 0, applied without any matrix [F, F]: 2 r F products per vector.

    With M = R D^−½ = U N, N Nᵀ = diag(s), and q = √(1 + s):
    L = D^½ (I + Nᵀ diag(1 / (1 + q)) N), L⁻¹ = (I − Nᵀ diag(1 / (q (1 + q))) N) D^−½.

    Attributes:
        log_volume: log |L|.
    """

    def __init__(self, rows: Tensor, diagonal: Tensor) -> None:
        self._deviations = diagonal.sqrt()
        scaled = rows / self._deviations
        values, vectors = eigh_(scaled @ scaled.T)
        self._directions = vectors.T @ scaled
        roots = (1 + values).sqrt()
        self._gains, self._losses = 1 / (1 + roots), 1 / (roots * (1 + roots))
        self.log_volume = float(roots.log().sum() + self._deviations.log().sum())

    def colour(self, z: Tensor) -> Tensor:
        """The vectors L z_i, from rows z_i [n, F]: of N(0, RᵀR + D) if those are of N(0, I)."""
        return (z + (z @ self._directions.T * self._gains) @ self._directions) * self._deviations

    def whiten(self, x: Tensor) -> Tensor:
        """The vectors L⁻¹ x_i, from rows x_i [n, F]."""
        z = x / self._deviations
        return z - (z @ self._directions.T * self._losses) @ self._directions
