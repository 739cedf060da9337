"""How far features are from all known classes, by one covariance for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from cil.classifiers.base import Array
from cil.classifiers.lda import LDA, shrink_
from cil.classifiers.moments import zero_constant_
from cil.utils.linalg import symmetric_inverse
from cil.utils.precision import exact, without_autocast


class ClassDistances(LDA):
    """Mahalanobis distances to the nearest class mean, and to the mean of all samples.

    d_c(x) = (x − μ_c)ᵀ Σ⁻¹ (x − μ_c) with the shrunk within-class covariance Σ of :class:`LDA` (Lee et al., NeurIPS
    2018, arXiv 1807.03888), and d_0(x) = (x − μ)ᵀ Σ_0⁻¹ (x − μ) with mean and covariance of all samples, shrunk alike,
    which takes out what all images have in common (Ren et al., arXiv 2106.09022). All of it follows from LDA's sums.

    Args:
        feature_dim: Feature width F.
        shrinkage: Shrinkage of both covariances, in [0, 1].
    """

    def __init__(self, feature_dim: int, shrinkage: float = 1e-4) -> None:
        super().__init__(feature_dim, shrinkage, priors="uniform")
        self._share = shrinkage

    @without_autocast()
    def distances(self, features: Array) -> tuple[Tensor, Tensor]:
        """(min_c d_c, d_0) of features [B, F], both float64 [B], ≥ 0 up to rounding."""
        x = self.checked(features).double()
        within, means, total, mean = self.cached("distances", self._inverses)
        known = means[self.counts > 0]
        # centred on the mean of all samples, so that squares that cancel are small
        centred, known = x - mean, known - mean
        projected = centred @ within
        to_means = (projected * centred).sum(1, keepdim=True) - 2 * projected @ known.T
        nearest = (to_means + ((known @ within) * known).sum(1)).min(1).values
        return nearest, ((centred @ total) * centred).sum(1)

    @exact()
    def _inverses(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count = self.counts.sum().clamp(min=1)
        mean = self.sums.sum(0) / count
        total = self.outer - count * torch.outer(mean, mean)
        total = zero_constant_(total, self.outer) / count
        return self._inverse(self.covariance), self.means, self._inverse(total), mean

    def _inverse(self, covariance: Tensor) -> Tensor:
        scale = self.scale_of(covariance)
        return symmetric_inverse(shrink_(covariance, self._share, scale), scale)
