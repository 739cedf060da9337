"""Squared distances to many classes, each in its own metric, as matrix products over many classes at once."""

from __future__ import annotations

import torch
from torch import Tensor

from cil.classifiers.base import lazy_zeros
from cil.utils.packed import pack, packed_size

GROUP = 64
"""Classes whose triangles are one tensor."""
ROWS = 32
"""Samples whose products x_i x_j are in memory at once, as many numbers each as a class's triangle."""


class QuadraticForms:
    """d_c(x) = (x − μ_c)ᵀ P_c (x − μ_c) for classes c, which are set one by one, and may be set again.

    A whole matrix P_c is kept as its triangle. With the products x_i x_j, i ≥ j, of a sample as one row, xᵀP_c x of all
    classes is one matrix product, of half the multiplications. P_c = diag(w_c) − K_cᵀK_c with few rows K_c is kept as
    w_c and K_c. Here x and μ_c are relative to an origin amid the classes: large squares would cost digits.

    Args:
        origin: The origin, float64 [F], e.g. the mean of a class.
    """

    def __init__(self, origin: Tensor) -> None:
        self.origin = origin
        self._triangles: dict[int, Tensor] = {}  # by group: those of whole matrices, [GROUP, F (F + 1) / 2]
        self._whole: dict[int, tuple[Tensor, Tensor]] = {}  # P μ, μᵀP μ
        self._low: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # μ, w, K
        self._stacked: tuple[Tensor, ...] | None = None  # the terms of all low-rank classes

    def set_matrix(self, c: int, mean: Tensor, matrix: Tensor) -> None:
        """Set a class to its mean [F] and its symmetric matrix P_c [F, F]."""
        self._drop(c)
        group, mean = c // GROUP, mean - self.origin
        if group not in self._triangles:
            self._triangles[group] = lazy_zeros(GROUP, matrix.new_empty(1, packed_size(len(mean))))
        # an entry below the diagonal stands for both of its places
        pack(2 * matrix - matrix.diagonal().diag(), out=self._triangles[group][c % GROUP])
        linear = matrix @ mean
        self._whole[c] = linear, linear @ mean

    def set_low_rank(self, c: int, mean: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Set a class to its mean [F] and the matrix diag(``weights``) − ``rows``ᵀ ``rows``, [F] and [r, F]."""
        self._drop(c)
        self._low[c] = mean - self.origin, weights, rows
        self._stacked = None

    def _drop(self, c: int) -> None:
        self._whole.pop(c, None)
        if self._low.pop(c, None) is not None:
            self._stacked = None

    def __call__(self, x: Tensor, classes: int) -> Tensor:
        """Squared distances [B, classes] of x, float64 [B, F]; 0 for a class that is not set."""
        x = x - self.origin
        # an exported program is for any number of samples, so it cannot split them
        parts = (x,) if torch.compiler.is_exporting() else x.split(ROWS)
        return torch.cat([self._distances(part, classes) for part in parts])

    def _distances(self, x: Tensor, classes: int) -> Tensor:
        # a column for classes that are not set; len(x) would fix the batch size of an exported program
        found, order = [x.new_zeros(x.shape[0], 1)], [-1]
        if self._low:
            found.append(self._low_rank(x))
            order += sorted(self._low)
        if self._whole:
            i, j = torch.tril_indices(x.shape[1], x.shape[1], device=x.device)
            products = x[:, i] * x[:, j]
        for group, triangles in self._triangles.items():
            own = [c for c in range(group * GROUP, (group + 1) * GROUP) if c in self._whole]
            if own:
                linear, constant = (torch.stack(terms) for terms in zip(*(self._whole[c] for c in own), strict=True))
                squares = products @ triangles[: own[-1] % GROUP + 1].T
                found.append(squares[:, [c % GROUP for c in own]] - 2 * (x @ linear.T) + constant)
                order += own
        column = {c: place for place, c in enumerate(order)}
        return torch.cat(found, 1)[:, [column.get(c, 0) for c in range(classes)]]

    def _low_rank(self, x: Tensor) -> Tensor:
        """Σ_i w_i (x_i − μ_i)² − ‖K (x − μ)‖² for the low-rank classes in order, [B, their number]."""
        if self._stacked is None:
            order = sorted(self._low)
            means, weights, rows = zip(*(self._low[c] for c in order), strict=True)
            counts = torch.tensor([len(one) for one in rows], device=x.device)
            stacked = torch.cat(rows)
            for c, mean, weight, own in zip(order, means, weights, stacked.split(counts.tolist()), strict=True):
                self._low[c] = mean, weight, own  # parts of one tensor, so that it is not kept twice
            mean, weight = torch.stack(means), torch.stack(weights)
            owner = torch.arange(len(order), device=x.device).repeat_interleave(counts)
            offsets = (stacked * mean[owner]).sum(1)
            self._stacked = weight, weight * mean, (weight * mean.square()).sum(1), stacked, offsets, owner
        weight, linear, constant, stacked, offsets, owner = self._stacked
        whole = x.square() @ weight.T - 2 * (x @ linear.T) + constant
        return whole.index_add(1, owner, (x @ stacked.T - offsets).square(), alpha=-1)
