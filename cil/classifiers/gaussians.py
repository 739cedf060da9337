"""One Gaussian per class, from which features are drawn in place of the class's images (SLCA, arXiv 2303.05118)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cil.classifiers.base import Array
from cil.classifiers.drift import AffineMap
from cil.classifiers.low_rank import LowRankRoot
from cil.classifiers.moments import ClassMoments
from cil.errors import ConfigError, DataError
from cil.utils.linalg import shifted_cholesky
from cil.utils.packed import pack, unpack_lower
from cil.utils.precision import exact, without_autocast


class Gaussians(ClassMoments):
    """N(μ_c, Σ_c) per class, Σ_c = unbiased covariance + ridge · I; logits are log densities.

    A class of equal samples, e.g. a single one, has the pooled covariance of all others, and ridge · I if there is
    none. With fewer samples than features, the variance in directions that they do not span is the ridge: log densities
    of such a class are not comparable with those of a class with many samples. Heads are trained on :meth:`sample`.

    Args:
        feature_dim: Feature width F.
        ridge: Number > 0 added to every variance; 10⁻⁴ in the authors' code. It is meant for features whose squares
            are about 1: if their mean square is below ``ridge``, the ridge is multiplied by this mean square. If Σ_c is
            not numerically positive definite with it (features of norm 10⁶ and more), it is raised tenfold until it is.
        rank: Number r ≥ 1 of directions that are kept of each covariance, beside its diagonal; see
            :class:`ClassMoments`. A vector is then drawn with 2 r F products in place of F². None: all.

    Attributes:
        raised: The largest factor by which the ridge was raised, 1 if it never was; not saved.

    Buffers:
        sums: float64 [C, F]; triangles: float64 [C, F (F + 1) / 2], lower triangles of Σ x xᵀ (2.4 MB per class for
        F = 768, and as much for its factor once it is drawn from); counts: int64 [C]. With a rank, see
        :class:`ClassMoments`.

    Raises:
        ConfigError: ``ridge`` or ``rank`` is not positive.
    """

    def __init__(self, feature_dim: int, ridge: float = 1e-4, rank: int | None = None) -> None:
        super().__init__(feature_dim, rank)
        if not 0 < ridge < math.inf:
            raise ConfigError(f"Gaussians: ridge is {ridge}; it must be positive and finite")
        self.ridge, self.raised = ridge, 1.0

    @exact()
    def sample(self, labels: Tensor, generator: torch.Generator, scale: Tensor | None = None) -> Tensor:
        """Draw one feature per label: row i is scale_i · μ + L z with z ~ N(0, I) and L Lᵀ = Σ, of class labels[i].

        Args:
            labels: Classes to draw from, int64 [n].
            generator: Generator of z.
            scale: Factors on the rows' means, [n]; None: 1. SLCA shrinks the means of older tasks.

        Returns:
            Features, float32 [n, F].

        Raises:
            DataError: A label has no samples, or the labels or ``scale`` have the wrong shape or type.
        """
        labels = self.checked_labels(labels, len(labels))
        if scale is not None and scale.shape != labels.shape:
            raise DataError(f"Gaussians.sample: scale has shape {list(scale.shape)} for {len(labels)} labels")
        known = self.counts.nonzero().flatten()
        if not bool(torch.isin(labels, known).all()):
            missing = sorted(set(labels.tolist()) - set(known.tolist()))
            raise DataError(f"Gaussians: classes {missing} cannot be drawn: they have no samples")
        drawn = torch.randn(len(labels), self.feature_dim, generator=generator, device=generator.device).to(self.device)
        means = self.means
        # class by class in place: an epoch of a thousand classes has 786 MB of float32, and is never held in float64
        for rows in labels.argsort(stable=True).split(labels.bincount().tolist()):
            if not len(rows):
                continue
            c = int(labels[rows[0]])
            mean = means[c] if scale is None else means[c] * scale.to(means)[rows, None]
            drawn[rows] = (mean + self.coloured(c, drawn[rows].to(means))).float()
        return drawn

    def coloured(self, c: int, z: Tensor) -> Tensor:
        """Rows L z_i with L Lᵀ = Σ_c, of rows z_i, float64 [n, F]."""
        return z @ self.factor(c).T if self.rank is None else self.low_rank_root(c).colour(z)

    @exact()
    def calibrated(self, samples: Tensor, neighbours: int = 2, alpha: float = 0.21) -> tuple[Tensor, Tensor]:
        """Gaussians around samples of other classes, of which there are few (Yang et al., arXiv 2101.06395, eq. 6).

        With the k classes b whose means are nearest to a sample x̃ (Euclidean): μ' = (x̃ + Σ_b μ_b) / (k + 1) and
        Σ' = Σ_b Σ_b / k + α v I, v the mean variance in Σ_b Σ_b / k. The paper's code adds α to every entry of the
        matrix, in units of its own features. Its power transform is left out: it needs features ≥ 0.

        Args:
            samples: x̃, [n, F].
            neighbours: Number k of classes; all that have samples if there are fewer.
            alpha: α ≥ 0.

        Returns:
            μ', float64 [n, F], and Σ' without the ridge, float64 [n, F, F].

        Raises:
            DataError: No class here has samples.
        """
        x, known = self.checked(samples).to(self.sums), self.counts.nonzero().flatten()
        if not len(known):
            raise DataError("Gaussians: no class has samples, so none can calibrate others")
        k = min(neighbours, len(known))
        distances = torch.cdist(x, self.means[known], compute_mode="donot_use_mm_for_euclid_dist")
        near = known[distances.topk(k, largest=False).indices]
        own = {c: self.own_or_pooled(c) for c in near.unique().tolist()}
        spreads = torch.stack([torch.stack([own[c] for c in row]).mean(0) for row in near.tolist()])
        variances = spreads.diagonal(dim1=1, dim2=2)
        variances += alpha * variances.mean(1, keepdim=True)
        return (x + self.means[near].sum(1)) / (k + 1), spreads

    @exact()
    def sample_near(
        self, samples: Tensor, count: int, generator: torch.Generator, neighbours: int = 2, alpha: float = 0.21
    ) -> Tensor:
        """Draw ``count`` features from N(μ', Σ' + ridge · I) of each of ``samples`` (:meth:`calibrated`).

        Returns:
            Features, float32 [n · count, F], those of the first sample first.
        """
        means, spreads = self.calibrated(samples, neighbours, alpha)
        z = torch.randn(len(means), count, self.feature_dim, generator=generator, device=generator.device)
        factors, _ = shifted_cholesky(spreads, self.ridge * self.cached("unit", self._unit))
        return (means[:, None] + z.to(means) @ factors.mT).flatten(0, 1).float()

    @exact()
    def translate(self, shifts: Tensor, spreads: Tensor | None = None) -> Gaussians:
        """μ_c ← μ_c + shifts[c], as if every sample of class c had moved by it, and Σ_c ← Σ_c + spreads[c]ᵀ spreads[c].

        Args:
            shifts: Shifts of the first C' ≤ C classes, [C', F]; the other classes, and those without samples, stay.
            spreads: Directions in which the same classes also get wider, [C', J, F]; None: covariances do not change.
                A class without variance, which borrows that of all others, stays as it is.

        Raises:
            DataError: ``shifts`` or ``spreads`` has the wrong shape.
        """
        if shifts.ndim != 2 or len(shifts) > self.num_classes or shifts.shape[1] != self.feature_dim:
            raise DataError(
                f"Gaussians.translate: shifts have shape {list(shifts.shape)}; expected [up to {self.num_classes}, "
                f"{self.feature_dim}]"
            )
        if spreads is not None and (spreads.ndim != 3 or spreads[:, 0].shape != shifts.shape):
            raise DataError(
                f"Gaussians.translate: spreads have shape {list(spreads.shape)}; expected [{len(shifts)}, directions, "
                f"{self.feature_dim}]"
            )
        flat = self.flat
        for c, shift in enumerate(shifts.to(self.sums)):
            n = max(1, int(self.counts[c]))
            if self.rank is not None:
                if spreads is not None and not flat[c]:
                    self.widen(c, max(1, n - 1) ** 0.5 * spreads[c].to(self.rows))
                self.sums[c] += int(self.counts[c]) * shift
                continue
            scatter = self.covariance(c) * max(1, n - 1)
            if spreads is not None and bool(scatter.any()):
                directions = spreads[c].to(scatter)
                scatter += max(1, n - 1) * directions.T @ directions
            self.sums[c] += int(self.counts[c]) * shift
            self.set_outer(c, scatter + torch.outer(self.sums[c], self.sums[c]) / n)
        self._forget()
        return self

    @exact()
    def transport(self, drift: AffineMap) -> Gaussians:
        """Apply ``drift`` to means and covariances, as if every sample had been mapped."""
        for c, count in enumerate(self.counts):
            if self.rank is not None:
                kept, rest = self.rows[c] @ drift.matrix.T, self.rest[c].sqrt()[:, None] * drift.matrix.T
                self.rows[c], self.rest[c] = 0, 0
                self.widen(c, torch.cat([kept, rest]))
                continue
            self.set_outer(c, drift.outer(self.outer(c), self.sums[c], count))
        self.sums = drift.sums(self.sums, self.counts)
        self._forget()
        return self

    @without_autocast()
    def logits(self, features: Array) -> Tensor:
        """Compute log densities [B, C] of features [B, F] under the Gaussians; −∞ for a class without samples."""
        x = self.checked(features)
        scores = x.new_full((len(x), self.num_classes), float("-inf"))
        for c in self.counts.nonzero().flatten().tolist():
            if self.rank is not None:
                root, away = self.low_rank_root(c), x.double() - self.means[c]
                log_density = -root.whiten(away).square().sum(1) / 2 - root.log_volume
                scores[:, c] = (log_density - self.feature_dim / 2 * math.log(2 * math.pi)).to(x.dtype)
                continue
            factor = self.factor(c)
            z = torch.linalg.solve_triangular(factor.to(x.dtype), (x - self.means[c].to(x.dtype)).T, upper=False)
            volume = float(factor.diagonal().log().sum()) + self.feature_dim / 2 * math.log(2 * math.pi)
            scores[:, c] = -z.square().sum(0) / 2 - volume
        return scores

    def factor(self, c: int) -> Tensor:
        """Lower Cholesky factor of Σ_c, float64 [F, F]; it is computed once and kept as its triangle."""

        def solve() -> Tensor:
            ridge = self.ridge * self.cached("unit", self._unit)
            factor, used = shifted_cholesky(self.own_or_pooled(c), ridge)
            self.raised = max(self.raised, used / ridge)
            return pack(factor)

        return unpack_lower(self.cached((c,), solve), self.feature_dim)

    def low_rank_root(self, c: int) -> LowRankRoot:
        """A root of Σ_c with a rank, computed once; the ridge never has to be raised for it."""

        def solve() -> LowRankRoot:
            kept = self.low_rank(c)
            return LowRankRoot(kept.rows, kept.rest + self.ridge * self.cached("unit", self._unit))

        return self.cached((c,), solve)

    def _unit(self) -> float:
        """1, or the mean square of all features if it is below the ridge, which would then hide them."""
        square = float(self.squares.sum()) / max(1, int(self.counts.sum()) * self.feature_dim)
        return square if 0 < square < self.ridge else 1.0

    def _forget(self, labels: Tensor | None = None) -> None:
        unit = self._solved.pop("unit", 1.0)
        super()._forget(labels if unit == 1 else None)


class ShrunkGaussians(Gaussians):
    """Gaussians whose covariances are Σ + v₁ I + v₂ (1 − I), v₁ the mean variance, v₂ the mean non-zero covariance."""

    def __init__(self, feature_dim: int, ridge: float = 1e-4) -> None:
        super().__init__(feature_dim, ridge)

    def own_or_pooled(self, c: int) -> Tensor:
        covariance = super().own_or_pooled(c)
        other = covariance - torch.diag(covariance.diagonal())
        v1, v2 = covariance.diagonal().mean(), other.sum() / (other != 0).sum().clamp(min=1)
        return covariance + v2 + (v1 - v2) * torch.eye(len(covariance)).to(covariance)
