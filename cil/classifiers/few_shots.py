"""Classes of few samples, calibrated by the classes of many samples, the base classes.

:class:`Calibration` depends on sums and counts alone, so neither on the order of tasks nor on how samples are split.
:class:`Draws` uses the base classes so far, and needs all samples of a class together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cil.classifiers.gaussians import Gaussians
from cil.errors import ConfigError


@dataclass(frozen=True)
class Calibration:
    """How the means of classes with at most ``shots`` samples are calibrated.

    * ``nearest``: μ_c ← (μ_c + Σ_b μ_b) / (k + 1) over the k base classes b with the nearest means (Yang et al., ICLR
      2021, arXiv 2101.06395, eq. 6, with the class mean in place of each sample). Their covariances, which they share
      among classes, add nothing to one covariance for all classes.
    * ``between``: μ_c ← m + B (B + Σ/n_c)⁻¹ (μ_c − m), the posterior mean if class means are drawn from N(m, B), with m
      and B the mean and the covariance of the base classes' means, and Σ the covariance within classes.

    Args:
        kind: One of these.
        shots: Largest number of samples of a class that is calibrated.
        neighbours: Number k of base classes for ``nearest``; all if there are fewer.
    """

    kind: str
    shots: int = 5
    neighbours: int = 2

    def calibrated(self, means: Tensor, counts: Tensor, covariance: Tensor | None = None) -> Tensor:
        """The means [C, F] of classes with ``counts`` samples [C]; unchanged without base classes.

        Args:
            means: Class means, float64 [C, F].
            counts: Number of samples of each class, int64 [C].
            covariance: Σ, positive definite, float64 [F, F]; for ``between``.
        """
        few, base = (counts > 0) & (counts <= self.shots), counts > self.shots
        if not (bool(few.any()) and bool(base.any())):
            return means
        novel, known = means[few], means[base]
        if self.kind == "nearest":
            k = min(self.neighbours, len(known))
            near = torch.cdist(novel, known, compute_mode="donot_use_mm_for_euclid_dist").topk(k, largest=False).indices
            moved = (novel + known[near].sum(1)) / (k + 1)
        else:
            if covariance is None:
                raise ConfigError("calibrate between needs a covariance within classes; use LDA, or calibrate nearest")
            centre = known.mean(0)
            between = (known - centre).T @ (known - centre) / len(known)
            moved = torch.empty_like(novel)
            for n in counts[few].unique():
                rows = counts[few] == n
                moved[rows] = (
                    centre + torch.linalg.solve(between + covariance / n, (novel[rows] - centre).T).T @ between
                )
        return means.masked_scatter(few[:, None], moved)


@dataclass(frozen=True)
class Draws:
    """Features drawn for classes with at most ``shots`` samples, near each of them (Yang et al., arXiv 2101.06395).

    Args:
        shots: Largest number of samples of a class that gets draws; classes with more are base classes.
        neighbours: Number k of base classes, see :meth:`~cil.classifiers.Gaussians.calibrated`.
        alpha: α there.
        draws: Number of features per class, divided equally among its samples.
    """

    shots: int = 5
    neighbours: int = 2
    alpha: float = 0.21
    draws: int = 750

    def extended(
        self, features: Tensor, labels: Tensor, base: Gaussians, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Features [N + n, F] and labels [N + n]: those given, and the draws if there is a base class.

        Args:
            features: All samples of the classes, [N, F].
            labels: int64 [N].
            base: Gaussians of the base classes so far, which get those of these samples.
            generator: Source of the draws.
        """
        many = torch.bincount(labels)[labels] > self.shots
        if bool(many.any()):
            base.partial_fit(features[many], labels[many])
        parts = [(features, labels)]
        for c in labels[~many].unique().tolist() if bool(base.counts.any()) else ():
            own = features[labels == c]
            drawn = base.sample_near(own, max(1, self.draws // len(own)), generator, self.neighbours, self.alpha)
            parts.append((drawn.to(features), labels.new_full((len(drawn),), c)))
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
