"""Where the features of old classes went: maps between feature spaces, fitted on images that are here now.

When a backbone changes, statistics of old classes were computed under an earlier one, and their images are gone. A map
fitted on the current task's images, seen before and after the change, carries sums along: exactly as if every old
sample had been mapped, because means and second moments are linear in it. Where every class has a drift of its own,
:func:`local_shifts` gives one to each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cil.errors import DataError
from cil.linalg import add_gram_, ridge_solve
from cil.precision import exact


@dataclass(frozen=True)
class AffineMap:
    """x ↦ A x + b.

    Attributes:
        matrix: A, float64 [F, F].
        offset: b, float64 [F].
    """

    matrix: Tensor
    offset: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Features [N, F] → [N, F]."""
        return features @ self.matrix.T.to(features) + self.offset.to(features)

    def sums(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Σ x of each class [C, F], of so many samples [C], after mapping every sample."""
        return sums @ self.matrix.T + torch.outer(counts.double(), self.offset)

    def outer(self, outer: Tensor, total: Tensor, count: Tensor) -> Tensor:
        """Σ x xᵀ [F, F] over ``count`` samples with Σ x = ``total`` [F], after mapping every sample."""
        moved = self.matrix @ total
        mapped = self.matrix @ outer @ self.matrix.T
        cross = torch.outer(moved, self.offset)
        mapped += cross + cross.T + count * torch.outer(self.offset, self.offset)
        return (mapped + mapped.T) / 2

    def beside(self, unchanged: int) -> AffineMap:
        """The map of features with ``unchanged`` further ones in front that stay as they are."""
        size = unchanged + len(self.offset)
        matrix = torch.eye(size, dtype=self.matrix.dtype, device=self.matrix.device)
        matrix[unchanged:, unchanged:] = self.matrix
        return AffineMap(matrix, torch.cat([self.offset.new_zeros(unchanged), self.offset]))


@exact()
def translation(before: Tensor, after: Tensor) -> AffineMap:
    """b = mean of φ_new(x) − φ_old(x), A = I: one shift for all classes, as ACMap has it (unweighted SDC).

    Args:
        before: φ_old of some images, [N, F].
        after: φ_new of the same images, [N, F].

    Raises:
        DataError: Shapes differ, or there is no image.
    """
    before, after = _paired(before, after)
    eye = torch.eye(before.shape[1], dtype=torch.float64, device=before.device)
    return AffineMap(eye, (after - before).mean(0))


@exact()
def ridge_map(before: Tensor, after: Tensor, shrinkage: float = 0.05) -> AffineMap:
    """argmin_M Σ_x ‖φ_new(x) − M [φ_old(x); 1]‖² + γ ‖M − [I 0]‖², γ = shrinkage · tr(G)/(F + 1).

    G is the Gram matrix of the [φ_old; 1]. Shrunk towards "nothing moved", so that few images do no harm.

    Args:
        before: φ_old of some images, [N, F].
        after: φ_new of the same images, [N, F].
        shrinkage: ≥ 0.

    Raises:
        DataError: Shapes differ, or there is no image.
    """
    before, after = _paired(before, after)
    x = torch.cat([before, before.new_ones(len(before), 1)], dim=1)
    gram = x.new_zeros(x.shape[1], x.shape[1])
    add_gram_(gram, x)
    gamma = max(shrinkage, 1e-12) * float(gram.diagonal().mean())  # above 0, or few images leave it undetermined
    change = ridge_solve(gram, x.T @ (after - before), gamma).T  # M − [I 0], [F, F + 1]
    return AffineMap(change[:, :-1] + torch.eye(len(change), dtype=x.dtype, device=x.device), change[:, -1])


@exact()
def local_shifts(points: Tensor, before: Tensor, after: Tensor, sigma: float = 4.0) -> Tensor:
    """Σ_i w_ci (φ_new(x_i) − φ_old(x_i)) / Σ_i w_ci, w_ci = exp(−‖φ_old(x_i) − p_c‖² / 2σ²) + 10⁻⁵: one shift a point.

    Semantic drift compensation (Yu et al., CVPR 2020, arXiv 2004.00440) with SSIAT's floor under the weights
    (arXiv 2403.19979): a point far from every image, as σ goes, takes the mean shift of them all.

    Args:
        points: p_c in the old space, for instance class means, [C, F].
        before: φ_old of some images, [N, F].
        after: φ_new of the same images, [N, F].
        sigma: σ > 0, in units of the features.

    Returns:
        float64 [C, F].

    Raises:
        DataError: Shapes differ, or there is no image.
    """
    before, after = _paired(before, after)
    apart = torch.cdist(points.to(before), before, compute_mode="donot_use_mm_for_euclid_dist")
    weights = torch.exp(-apart.square() / (2 * sigma**2)) + 1e-5
    return (weights / weights.sum(1, keepdim=True)) @ (after - before)


def _paired(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    if before.shape != after.shape or before.ndim != 2 or not len(before):
        raise DataError(
            f"a map needs the same images seen before and after, [N, F] each; got {list(before.shape)} and "
            f"{list(after.shape)}"
        )
    return before.double(), after.double()
