"""Maps from the features before a change of the backbone to those after it, fitted on the current images.

The statistics of old classes were computed with an earlier backbone, and the images of these classes are gone. A map is
fitted to the current task's features before and after the change, and applied to the stored sums. For an affine map the
result is exact: the sums that would follow from mapping every old sample are determined by the stored ones. If classes
drift differently, :func:`local_shifts` estimates one shift per class from images near it, and :func:`similarities`
weighs the shifts of the current classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.errors import DataError
from cil.utils.linalg import add_gram_, ridge_solve
from cil.utils.precision import exact


@dataclass(frozen=True)
class AffineMap:
    """x ↦ A x + b.

    Attributes:
        matrix: A, float64 [F, F]; [F', F] for a map to other features.
        offset: b, float64 [F], or [F'].
    """

    matrix: Tensor
    offset: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Map features [N, F] → [N, F], or [N, F']."""
        return features @ self.matrix.T.to(features) + self.offset.to(features)

    def sums(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Return Σ x of each class [C, F] after mapping every sample, given Σ x before it and sample counts [C].

        Raises:
            DataError: The map is for features of another width.
        """
        if sums.shape[1] != self.matrix.shape[1]:
            raise DataError(f"a map of features of width {self.matrix.shape[1]} cannot map width {sums.shape[1]}")
        return sums @ self.matrix.T + torch.outer(counts.double(), self.offset)

    def outer(self, outer: Tensor, total: Tensor, count: Tensor) -> Tensor:
        """Return Σ x xᵀ [F, F] after mapping all ``count`` samples, given Σ x xᵀ and Σ x = ``total`` [F] before it.

        Raises:
            DataError: As :meth:`sums`.
        """
        if len(total) != self.matrix.shape[1]:
            raise DataError(f"a map of features of width {self.matrix.shape[1]} cannot map width {len(total)}")
        moved = self.matrix @ total
        mapped = self.matrix @ outer @ self.matrix.T
        cross = torch.outer(moved, self.offset)
        mapped += cross + cross.T + count * torch.outer(self.offset, self.offset)
        return (mapped + mapped.T) / 2

    def beside(self, unchanged: int) -> AffineMap:
        """Return the map for features with ``unchanged`` more dimensions in front, which it leaves as they are."""
        size = unchanged + len(self.offset)
        matrix = torch.eye(size, dtype=self.matrix.dtype, device=self.matrix.device)
        matrix[unchanged:, unchanged:] = self.matrix
        return AffineMap(matrix, torch.cat([self.offset.new_zeros(unchanged), self.offset]))


@exact()
def translation(before: Tensor, after: Tensor) -> AffineMap:
    """Fit A = I, b = mean of φ_new(x) − φ_old(x): one shift for all classes, as in ACMap (unweighted SDC).

    Args:
        before: Features φ_old of N images, [N, F].
        after: Features φ_new of the same images, [N, F].

    Raises:
        DataError: The shapes differ, or there is no image.
    """
    before, after = _paired(before, after)
    eye = torch.eye(before.shape[1], dtype=torch.float64, device=before.device)
    return AffineMap(eye, (after - before).mean(0))


@exact()
def ridge_map(before: Tensor, after: Tensor, shrinkage: float = 0.05) -> AffineMap:
    """Fit [A b] = argmin_M Σ_x ‖φ_new(x) − M [φ_old(x); 1]‖² + γ ‖M − [I 0]‖², γ = shrinkage · tr(G)/(F + 1).

    G is the Gram matrix of the vectors [φ_old(x); 1]. The penalty pulls the map towards the identity, so that a fit to
    few images does no harm.

    Args:
        before: Features φ_old of N images, [N, F].
        after: Features φ_new of the same images, [N, F].
        shrinkage: Strength of the penalty as a multiple of the mean diagonal of G, ≥ 0.

    Raises:
        DataError: The shapes differ, or there is no image.
    """
    before, after = _paired(before, after)
    change = _regression(before, after - before, shrinkage)  # M − [I 0]
    eye = torch.eye(len(change), dtype=change.dtype, device=change.device)
    return AffineMap(change[:, :-1] + eye, change[:, -1])


@exact()
def read_out(features: Tensor, others: Tensor, shrinkage: float = 0.05) -> AffineMap:
    """Fit the map from features to those of another model, as :func:`ridge_map` where their widths are equal.

    Otherwise there is no identity, and the penalty is γ ‖M‖².

    Args:
        features: [N, F].
        others: Features of the same images, [N, F'].
        shrinkage: As for :func:`ridge_map`.

    Raises:
        DataError: The numbers of images differ, or there is none.
    """
    if features.shape[1:] == others.shape[1:] or len(features) != len(others) or not len(features):
        return ridge_map(features, others, shrinkage)
    found = _regression(features.double(), others.double(), shrinkage)
    return AffineMap(found[:, :-1], found[:, -1])


def _regression(x: Tensor, y: Tensor, shrinkage: float) -> Tensor:
    """argmin_M Σ ‖y − M [x; 1]‖² + γ ‖M‖², [F', F + 1], of x [N, F] and y [N, F'], with the γ of :func:`ridge_map`."""
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    gram = x.new_zeros(x.shape[1], x.shape[1])
    add_gram_(gram, x)
    gamma = max(shrinkage, 1e-12) * float(gram.diagonal().mean())  # few images leave M undetermined at γ = 0
    return ridge_solve(gram, x.T @ y, gamma).T


@exact()
def local_shifts(points: Tensor, before: Tensor, after: Tensor, sigma: float = 4.0) -> Tensor:
    """Σ_i w_ci (φ_new(x_i) − φ_old(x_i)) / Σ_i w_ci, w_ci = exp(−‖φ_old(x_i) − p_c‖² / 2σ²) + 10⁻⁵, for each point c.

    This is semantic drift compensation (Yu et al., CVPR 2020, arXiv 2004.00440) with the lower bound of 10⁻⁵ on the
    weights from SSIAT (arXiv 2403.19979): a point that is many σ away from every image gets the mean shift of them all.

    Args:
        points: Points p_c before the change, for instance class means, [C, F].
        before: Features φ_old of N images, [N, F].
        after: Features φ_new of the same images, [N, F].
        sigma: Bandwidth σ > 0, in units of the features.

    Returns:
        Shifts, float64 [C, F].

    Raises:
        DataError: The shapes differ, or there is no image.
    """
    before, after = _paired(before, after)
    distances = torch.cdist(points.to(before), before, compute_mode="donot_use_mm_for_euclid_dist")
    weights = torch.exp(-distances.square() / (2 * sigma**2)) + 1e-5
    return (weights / weights.sum(1, keepdim=True)) @ (after - before)


@exact()
def similarities(points: Tensor, prototypes: Tensor, sharpness: float = 10.0) -> Tensor:
    """softmax_j(γ · cos(p_c, q_j)): how much point p_c takes part in what happens to prototype q_j (CDS, CVPR 2026).

    Args:
        points: Points p_c, for instance means of old classes, [C, F].
        prototypes: Prototypes q_j, for instance means of new classes, [J, F], J ≥ 1.
        sharpness: γ > 0; for large γ only the most similar prototype counts.

    Returns:
        Weights, float64 [C, J]; each row sums to 1.
    """
    directions = F.normalize(points.double(), dim=1) @ F.normalize(prototypes.double(), dim=1).T
    return (sharpness * directions).softmax(1)


def _paired(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    if before.shape != after.shape or before.ndim != 2 or not len(before):
        raise DataError(
            "a map needs features of the same images before and after the change, [N, F] each; got "
            f"{list(before.shape)} and {list(after.shape)}"
        )
    return before.double(), after.double()
