"""Class means of few samples, calibrated by the classes of many samples, the base classes.

All functions depend on sums and counts alone, and so neither on the order of tasks nor on how samples are split.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
