"""FeCAM: the nearest class mean in the metric of each class's own covariance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classifiers.base import Array
from cil.classifiers.moments import ClassMoments
from cil.classifiers.quadratic import QuadraticForms
from cil.errors import ConfigError
from cil.utils.linalg import RESOLUTION, low_rank_root, symmetric_inverse
from cil.utils.precision import without_autocast

RESIDUE = 1e-10
"""Variances below this share of the variance that shrinkage adds are left out of a covariance's root."""


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

    All classes are compared in a few matrix products. A class of n ≤ F/8 samples with α₁ > 0 and α₂ = 0 has
    Σ_s = AᵀA + aI with A [n − 1, F] and a = α₁ v₁, and its inverse is I/a − KᵀK with K = (aI + AAᵀ)^−½ A / √a: nothing
    of it is lost, and an image takes F n products in place of F²/2.

    Args:
        feature_dim: Feature width F.
        shrinkage: Coefficients (α₁, α₂) ≥ 0; the authors use (1, 0) for CIFAR-100 and (10, 10) for ImageNet-R.
        normalize: Whether to do step 1, the normalisation to unit length.
        tukey: Exponent λ > 0 of Tukey's power transform sign(f)·|f|^λ, applied before step 1; 1: no transform. The
            paper transforms the non-negative features of a CNN; the sign extends it to a ViT's as an odd function.
        correlation: Whether to do step 4.
        rank: Number r ≥ 1 of directions that are kept of each Σ_c, beside its diagonal; see :class:`ClassMoments`. A
            class of any number of samples then takes r F products per image. v₁ and the scaling of step 4 are exact,
            and v₂ is that of the kept directions. If α₁ = 0, or α₂ v₂ < 0, whole inverses are needed. None: all.

    Buffers:
        sums: float64 [C, F] and triangles: float64 [C, F (F + 1) / 2], sums of u and lower triangles of those of u uᵀ
        (2.4 MB per class for F = 768); counts: int64 [C]. With a rank, see :class:`ClassMoments`.

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
        rank: int | None = None,
    ) -> None:
        super().__init__(feature_dim, rank)
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
        forms = self.cached(("forms",), lambda: QuadraticForms(self.means[self.counts > 0][:1].sum(0)))
        for c in range(self.num_classes):
            self.cached((c,), lambda c=c: self._solve(c, forms))  # type: ignore[misc]
        distances = forms(u, self.num_classes).masked_fill(self.counts == 0, float("inf"))
        return distances.to(features.dtype)

    def logits(self, features: Array) -> Tensor:
        return -self.distances(features)

    def _solve(self, c: int, forms: QuadraticForms) -> bool:
        """Put the inverse of Σ̂ of class c into the forms; whether the class has samples."""
        if not self.counts[c]:
            return False
        if self.rank is not None:
            self._solve_low_rank(c, forms)
            return True
        covariance, few = self.own_or_pooled(c), self.feature_dim // 8
        variances = covariance.diagonal()
        added, root = self.shrinkage[0] * float(variances.mean()), None
        if added > 0 and self.shrinkage[1] == 0 and self.counts[c] <= few:
            root = low_rank_root(covariance, RESIDUE * added, few)
        if root is None:
            forms.set_matrix(c, self.means[c], symmetric_inverse(self.shrunk(covariance)))
            return True
        inner = root @ root.T
        inner.diagonal().add_(added)
        taken = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), root, upper=False) / added**0.5
        scale = variances + added if self.correlation else torch.ones_like(variances)
        forms.set_low_rank(c, self.means[c], scale / added, taken * scale.sqrt())
        return True

    def _solve_low_rank(self, c: int, forms: QuadraticForms) -> None:
        """As :meth:`_solve`: Σ_s = RᵀR + D with the rows of Σ and one more for v₂, so its inverse has few rows, too."""
        kept = self.low_rank(c)
        rows, variances = kept.rows, kept.variances
        varied = variances > 0
        others = rows.sum(1).square().sum() - rows.square().sum()  # the sum off the diagonal
        count = int(varied.sum())
        off_mean = self.shrinkage[1] * float(others) / max(1, count * (count - 1))
        added = self.shrinkage[0] * float(variances.mean())
        variances = variances + added
        diagonal = torch.where(variances > 0, kept.rest + added - off_mean * varied, 1)
        variances = torch.where(variances > 0, variances, 1)
        if off_mean < 0 or not bool(diagonal.min() > RESOLUTION * variances.max()):
            forms.set_matrix(c, self.means[c], symmetric_inverse(self.shrunk(kept.dense())))
            return
        if off_mean > 0:
            rows = torch.cat([rows, off_mean**0.5 * varied[None]])
        scaled = rows / diagonal.sqrt()
        inner = scaled @ scaled.T
        inner.diagonal().add_(1)
        taken = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), scaled, upper=False)
        weights = (variances if self.correlation else torch.ones_like(variances)) / diagonal
        forms.set_low_rank(c, self.means[c], weights, taken * weights.sqrt())

    def shrunk(self, covariance: Tensor) -> Tensor:
        """Σ̂ of a covariance Σ, float64 [F, F]."""
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
