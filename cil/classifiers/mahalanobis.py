"""FeCAM: the nearest class mean in the metric of each class's own covariance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classifiers.base import Array
from cil.classifiers.moments import ClassMoments
from cil.errors import ConfigError
from cil.utils.linalg import symmetric_inverse
from cil.utils.precision import without_autocast


class Mahalanobis(ClassMoments):
    """logit_c = −(u − μ_c)ᵀ Σ̂_c⁺ (u − μ_c): FeCAM (arXiv 2309.14062), with the steps in the order of the ViT scripts.

    1. u = f/‖f‖ (after the power transform, if any);
    2. μ_c = mean of u, Σ_c = unbiased covariance of u, per class;
    3. shrinkage Σ_s = Σ + α₁ v₁ I + α₂ v₂ (1 − I), v₁ = mean of the diagonal of Σ, v₂ = mean of its off-diagonal
       entries that are not zero;
    4. correlation normalisation Σ̂_ij = Σ_s,ij / √(Σ_s,ii Σ_s,jj);
    5. the squared Mahalanobis distance under the inverse of Σ̂.

    A class of equal samples, e.g. a single one, has no covariance of its own and uses the pooled covariance of all
    others. With a metric without correlations its distances would not be comparable with theirs, and it would win every
    image. A feature without variance after shrinkage gets variance 1 and no correlations. If Σ̂ is singular, e.g. for
    fewer samples than features without shrinkage, directions without variance get the mean variance; the authors'
    pseudo-inverse ignores them.

    Args:
        feature_dim: Feature width F.
        shrinkage: Coefficients (α₁, α₂) ≥ 0; the authors use (1, 0) for CIFAR-100 and (10, 10) for ImageNet-R.
        normalize: Whether to do step 1, the normalisation to unit length.
        tukey: Exponent λ > 0 of Tukey's power transform sign(f)·|f|^λ, applied before step 1; 1: no transform. The
            paper transforms the non-negative features of a CNN; the sign extends it to a ViT's as an odd function.
        correlation: Whether to do step 4.

    Buffers:
        sums: float64 [C, F] and triangles: float64 [C, F (F + 1) / 2], sums of u and lower triangles of those of u uᵀ
        (2.4 MB per class for F = 768); counts: int64 [C].

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        feature_dim: int,
        shrinkage: tuple[float, float] = (1.0, 0.0),
        normalize: bool = True,
        tukey: float = 1.0,
        correlation: bool = True,
    ) -> None:
        super().__init__(feature_dim)
        if len(shrinkage) != 2 or not min(shrinkage) >= 0:
            raise ConfigError(f"Mahalanobis: shrinkage is {shrinkage}; it must be two numbers that are not negative")
        if not tukey > 0:
            raise ConfigError(f"Mahalanobis: tukey is {tukey}; it must be positive")
        self.shrinkage, self.normalize, self.tukey, self.correlation = shrinkage, normalize, tukey, correlation

    def transform(self, features: Tensor) -> Tensor:
        if self.tukey != 1:
            features = features.sign() * features.abs() ** self.tukey
        return F.normalize(features, dim=1) if self.normalize else features

    @without_autocast()
    def distances(self, features: Array) -> Tensor:
        """Compute squared distances [B, C] of features [B, F]; +∞ for a class without samples.

        They are computed in float64: Σ̂ may be nearly singular, and the rounding of float32 would then depend on the
        size of the batch.
        """
        features = self.checked(features)
        u = self.transform(features.double())
        distances = u.new_full((u.shape[0], self.num_classes), float("inf"))
        for c in range(self.num_classes):
            solution = self.cached((c,), lambda c=c: self._solve(c))  # type: ignore[misc]
            if solution is None:
                continue
            mean, precision = solution
            centred = u - mean
            distances[:, c] = ((centred @ precision) * centred).sum(1)
        return distances.to(features.dtype)

    def logits(self, features: Array) -> Tensor:
        return -self.distances(features)

    def _solve(self, c: int) -> tuple[Tensor, Tensor] | None:
        """Mean [F] and inverse covariance [F, F] of class c, float64; None for a class without samples."""
        return (self.means[c].clone(), symmetric_inverse(self.shrunk(c))) if self.counts[c] else None

    def shrunk(self, c: int) -> Tensor:
        """Σ̂ of class c, float64 [F, F]."""
        covariance = self.own_or_pooled(c)
        varied = covariance.diagonal() > 0
        off = covariance - covariance.diagonal().diag()
        diagonal_mean = covariance.diagonal().mean()
        off_mean = off.sum() / off.count_nonzero().clamp(min=1)
        covariance = covariance + self.shrinkage[1] * off_mean * torch.outer(varied, varied)
        covariance.diagonal().add_(self.shrinkage[0] * diagonal_mean - self.shrinkage[1] * off_mean * varied)
        variance = covariance.diagonal()
        variance[variance <= 0] = 1
        if self.correlation:
            deviation = variance.sqrt()
            covariance = covariance / deviation[:, None] / deviation
        return covariance
