"""Classifier alignment: a Gaussian per class stands in for the images of old tasks (SLCA, arXiv 2303.05118)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classifiers.base import Array
from cil.classifiers.drift import AffineMap
from cil.classifiers.moments import ClassMoments
from cil.errors import ConfigError, DataError
from cil.precision import exact, without_autocast


class Gaussians(ClassMoments):
    """N(μ_c, Σ_c) per class, Σ_c = unbiased covariance + ridge · I; logits are log densities.

    A class with one sample has covariance ridge · I.

    Args:
        feature_dim: Feature width F.
        ridge: Added to every variance, > 0; the authors' 10⁻⁴.

    Buffers:
        sums: float64 [C, F]; outers: float64 [C, F, F], Σ x xᵀ (4.7 MB a class for F = 768); counts: int64 [C].

    Raises:
        ConfigError: ``ridge`` is not positive.
    """

    def __init__(self, feature_dim: int, ridge: float = 1e-4) -> None:
        super().__init__(feature_dim)
        if not 0 < ridge < math.inf:
            raise ConfigError(f"Gaussians: ridge is {ridge}; it must be positive and finite")
        self.ridge = ridge

    @exact()
    def sample(self, labels: Tensor, generator: torch.Generator, scale: Tensor | None = None) -> Tensor:
        """One feature of class labels[i] per row: scale_i · μ + L z, z ~ N(0, I), L Lᵀ = Σ.

        Args:
            labels: Classes to draw from, int64 [n].
            generator: Where z comes from.
            scale: Factor of each row's mean, [n]; SLCA shrinks the means of older tasks (:func:`mean_scales`).

        Returns:
            float32 [n, F].

        Raises:
            DataError: A label without samples.
        """
        labels = labels.to(self.device)
        known = self.counts.nonzero().flatten()
        if not bool(torch.isin(labels, known).all()):
            missing = sorted(set(labels.tolist()) - set(known.tolist()))
            raise DataError(f"Gaussians: nothing to draw classes {missing} from: they have no samples")
        z = torch.randn(len(labels), self.feature_dim, generator=generator, device=generator.device).to(self.sums)
        drawn = self.means[labels]
        if scale is not None:
            drawn *= scale.to(drawn)[:, None]
        for c in labels.unique().tolist():
            rows = labels == c
            drawn[rows] += z[rows] @ self.factor(c).T
        return drawn.float()

    @exact()
    def translate(self, shifts: Tensor) -> Gaussians:
        """μ_c ← μ_c + shifts[c], as if every sample of class c had moved by it: covariances stay.

        Args:
            shifts: [C', F], of the first C' ≤ C classes; the others stay. A class without samples has no mean to move.

        Raises:
            DataError: ``shifts`` has another shape.
        """
        if shifts.ndim != 2 or len(shifts) > self.num_classes or shifts.shape[1] != self.feature_dim:
            raise DataError(
                f"Gaussians.translate: shifts have shape {list(shifts.shape)}; expected [up to {self.num_classes}, "
                f"{self.feature_dim}]"
            )
        for c, shift in enumerate(shifts.to(self.sums)):
            n = max(1, int(self.counts[c]))
            scatter = self.covariance(c) * max(1, n - 1)
            self.sums[c] += int(self.counts[c]) * shift
            self.outers[c] = scatter + torch.outer(self.sums[c], self.sums[c]) / n
        self._forget()
        return self

    @exact()
    def transport(self, drift: AffineMap) -> Gaussians:
        """Carry means and covariances to where the features have moved."""
        for c, count in enumerate(self.counts):
            self.outers[c] = drift.outer(self.outers[c], self.sums[c], count)
        self.sums = drift.sums(self.sums, self.counts)
        self._forget()
        return self

    @without_autocast()
    def logits(self, features: Array) -> Tensor:
        """Log densities [B, C] of features [B, F] under each class's Gaussian; −∞ for a class without samples."""
        x = self.checked(features)
        scores = x.new_full((len(x), self.num_classes), float("-inf"))
        for c in self.counts.nonzero().flatten().tolist():
            factor = self.factor(c)
            z = torch.linalg.solve_triangular(factor.to(x.dtype), (x - self.means[c].to(x.dtype)).T, upper=False)
            volume = float(factor.diagonal().log().sum()) + self.feature_dim / 2 * math.log(2 * math.pi)
            scores[:, c] = -z.square().sum(0) / 2 - volume
        return scores

    def factor(self, c: int) -> Tensor:
        """Lower Cholesky factor of Σ_c, float64 [F, F]."""

        def solve() -> Tensor:
            covariance = self.covariance(c)
            covariance.diagonal().add_(self.ridge)
            return torch.linalg.cholesky(covariance)

        return self.solved((c,), solve)


def mean_scales(task_of_class: Tensor, current: int | None = None) -> Tensor:
    """Factor of each class's mean when sampled after task t: 0.9 + 0.1 · (τ(c) + 1) / (t + 1), float32 [C].

    Args:
        task_of_class: τ(c), the task each class came with, from 0, [C].
        current: t; by default the newest of these tasks.
    """
    current = int(task_of_class.max()) if current is None else current
    return 0.9 + 0.1 * (task_of_class + 1).float() / (current + 1)


def normalized_cross_entropy(
    logits: Tensor, labels: Tensor, task_of_class: Tensor, temperature: float = 0.1, reduction: str = "mean"
) -> Tensor:
    """SLCA's logit normalisation: CE(logits / (n · τ), y), n = mean over tasks of (‖logits of the task‖₂ + 10⁻⁷).

    Args:
        logits: Finite scores [B, C].
        labels: int64 [B].
        task_of_class: The task each class came with, int64 [C]; tasks count from 0, and each has a class.
        temperature: τ.
        reduction: ``mean`` over the batch, or ``none``.

    Returns:
        The loss, a scalar or [B]; the gradient also flows through n.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    tasks = int(task_of_class.max()) + 1
    squares = logits.new_zeros(len(logits), tasks).index_add(1, task_of_class.to(logits.device), logits.square())
    norms = squares.clamp(min=torch.finfo(logits.dtype).tiny).sqrt() + 1e-7  # the root has no derivative at 0
    return F.cross_entropy(logits / (norms.mean(1, keepdim=True) * temperature), labels, reduction=reduction)


Alignment = Callable[..., tuple[Tensor, Tensor]]
"""(features [B, F], labels [B], reduction="mean" or "none") → (loss, a scalar or [B]; logits [B, C])."""


def with_variation(loss: Alignment, weight: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """LCA's loss, E ℓ(z) + λ · E |ℓ(z) − ℓ(z')|: all of a class should lose alike (IM+LCA, arXiv 2603.09888).

    z and z' are independent draws of one class: ``SampledFeatures(…, pairs=True)`` puts them side by side, so that a
    pair stays together in any batch, micro-batch or share of a process. E ℓ is taken over both.

    Args:
        loss: ℓ, e.g. around cross-entropy or :func:`normalized_cross_entropy`.
        weight: λ ≥ 0; with 0 it is ``loss`` itself, on data without pairs.

    Returns:
        (z [B, F], z' [B, F], labels [B]) → (loss, a scalar; logits of z [B, C]).
    """
    if not weight:
        return loss

    def varied(features: Tensor, others: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        values, logits = loss(features, labels, reduction="none")
        twins, _ = loss(others, labels, reduction="none")
        return (values + twins).mean() / 2 + weight * (values - twins).abs().mean(), logits

    return varied


class SampledFeatures:
    """Training data drawn from Gaussians: every pass has ``per_class`` fresh vectors of each class, shuffled.

    Follows the protocol ``cil.training.Batches``.

    Args:
        gaussians: Where to draw from; every class needs samples.
        per_class: Vectors of each class and pass (SLCA: 256).
        scale: Factor of each class's mean, [C]; None: 1.
        pairs: Beside every vector another one of its class, drawn independently (:func:`with_variation`).
    """

    def __init__(
        self, gaussians: Gaussians, per_class: int = 256, scale: Tensor | None = None, pairs: bool = False
    ) -> None:
        if per_class < 1:
            raise ConfigError(f"SampledFeatures: per_class is {per_class}; it must be at least 1")
        self.gaussians, self.per_class, self.scale, self.pairs = gaussians, per_class, scale, pairs

    def __len__(self) -> int:
        return self.per_class * self.gaussians.num_classes

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None,
        augment: bool,
        device: torch.device | str,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, ...]]:
        """One pass: (float32 [b, F], int64 [b]) on ``device``; with ``pairs`` (float32 [b, F] twice, int64 [b]).

        Args:
            batch_size: Vectors a batch, over all processes.
            generator: Draws the order and the vectors; None: a fixed one, the same vectors every pass.
            augment: No effect.
            device: Where the batches go.
            part: (rank, processes): yield rows ``[rank::processes]`` of each batch, perhaps none. What is drawn does
                not depend on it.
        """
        generator = generator or torch.Generator().manual_seed(0)
        classes = torch.arange(self.gaussians.num_classes).repeat_interleave(self.per_class)
        labels = classes[torch.randperm(len(self), generator=generator, device=generator.device).to(classes.device)]
        scale = None if self.scale is None else self.scale.to(labels.device)[labels]
        drawn = [self.gaussians.sample(labels, generator, scale) for _ in range(1 + self.pairs)]
        rank, processes = part
        for batch in zip(*(rows.split(batch_size) for rows in (*drawn, labels)), strict=True):
            yield tuple(rows[rank::processes].to(device) for rows in batch)
