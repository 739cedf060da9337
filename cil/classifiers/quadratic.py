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


class Rows:
    """Rows [n, F] in one tensor that doubles when it is full.

    What is kept of a class is small beside the matrices [F, F] from which it is made. In memory of its own it would be
    placed where one of them was, the next one would no longer fit there, and every class would take a whole matrix.
    """

    def __init__(self, like: Tensor) -> None:
        self._all, self._count = like.new_empty(0, like.shape[-1]), 0

    def __len__(self) -> int:
        return self._count

    def append(self, rows: Tensor) -> slice:
        """Copy rows [k, F] to the end; returns where they are."""
        place = slice(self._count, self._count + len(rows))
        if place.stop > len(self._all):
            larger = self._all.new_empty(max(place.stop, 2 * len(self._all)), self._all.shape[1])
            larger[: self._count] = self._all[: self._count]
            self._all = larger
        self._all[place] = rows
        self._count = place.stop
        return place

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        return self._all[: self._count][rows]


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
        self._linear: dict[int, Tensor] = {}  # by group: P μ and μᵀP μ of its classes, [GROUP, F + 1]
        self._whole: set[int] = set()
        self._vectors, self._rows = Rows(origin), Rows(origin)
        self._low: dict[int, tuple[slice, slice]] = {}  # where μ and w are among the vectors, and K among the rows
        self._stacked: tuple[Tensor, ...] | None = None  # the terms of all low-rank classes

    def set_matrix(self, c: int, mean: Tensor, matrix: Tensor) -> None:
        """Set a class to its mean [F] and its symmetric matrix P_c [F, F]."""
        self._drop(c)
        group, mean = c // GROUP, mean - self.origin
        if group not in self._triangles:
            self._triangles[group] = lazy_zeros(GROUP, matrix.new_empty(1, packed_size(len(mean))))
            self._linear[group] = matrix.new_zeros(GROUP, len(mean) + 1)
        # an entry below the diagonal stands for both of its places
        pack(2 * matrix - matrix.diagonal().diag(), out=self._triangles[group][c % GROUP])
        linear = matrix @ mean
        self._linear[group][c % GROUP] = torch.cat([linear, (linear @ mean)[None]])
        self._whole.add(c)

    def set_low_rank(self, c: int, mean: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Set a class to its mean [F] and the matrix diag(``weights``) − ``rows``ᵀ ``rows``, [F] and [r, F]."""
        self._drop(c)
        vectors = torch.stack([mean - self.origin, weights])
        self._low[c] = self._vectors.append(vectors), self._rows.append(rows)
        self._stacked = None

    def _drop(self, c: int) -> None:
        self._whole.discard(c)
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
                places = [c % GROUP for c in own]
                linear, constant = self._linear[group][places].split([x.shape[1], 1], dim=1)
                squares = products @ triangles[: places[-1] + 1].T
                found.append(squares[:, places] - 2 * (x @ linear.T) + constant.T)
                order += own
        column = {c: place for place, c in enumerate(order)}
        return torch.cat(found, 1)[:, [column.get(c, 0) for c in range(classes)]]

    def _low_rank(self, x: Tensor) -> Tensor:
        """Σ_i w_i (x_i − μ_i)² − ‖K (x − μ)‖² for the low-rank classes in order, [B, their number]."""
        if self._stacked is None:
            self._compact()
            mean, weight = self._vectors[:].unflatten(0, (-1, 2)).unbind(1)
            counts = torch.tensor([own.stop - own.start for _, own in self._low.values()], device=x.device)
            owner = torch.arange(len(counts), device=x.device).repeat_interleave(counts)
            stacked = self._rows[:]
            offsets = (stacked * mean[owner]).sum(1)
            self._stacked = weight, weight * mean, (weight * mean.square()).sum(1), stacked, offsets, owner
        weight, linear, constant, stacked, offsets, owner = self._stacked
        whole = x.square() @ weight.T - 2 * (x @ linear.T) + constant
        return whole.index_add(1, owner, (x @ stacked.T - offsets).square(), alpha=-1)

    def _compact(self) -> None:
        """Put what is kept of low-rank classes in the order of the classes, without that of classes set again."""
        places = sorted(self._low.items())
        if places == list(self._low.items()) and len(self._vectors) == 2 * len(places):
            return
        vectors, rows, self._low = Rows(self.origin), Rows(self.origin), {}
        for c, (pair, own) in places:
            self._low[c] = vectors.append(self._vectors[pair]), rows.append(self._rows[own])
        self._vectors, self._rows = vectors, rows
