"""Nearest class mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classifiers.base import Array, StatisticsClassifier
from cil.classifiers.drift import AffineMap
from cil.classifiers.few_shots import Calibration
from cil.errors import ConfigError
from cil.utils.precision import exact, without_autocast

Metric = Literal["cosine", "euclidean"]


@dataclass(frozen=True)
class Teen:
    """Prototypes of classes with few samples, calibrated by those with many (TEEN, Wang et al., arXiv 2312.05229).

    p ← (1 − α) p + α Σ_b w_b p_b with w = softmax_b(τ cos(p, p_b)) over the base classes b, all p of length 1, and the
    sum scaled to length 1. Here the base classes are those with more than ``shots`` samples; in few-shot streams these
    are the ones of the first task. It depends on sums alone, and so not on the order of tasks.

    Args:
        shots: Largest number of samples of a class that is calibrated.
        alpha: Share α of the base classes, in [0, 1].
        tau: Sharpness τ of their weights.
    """

    shots: int = 5
    alpha: float = 0.5
    tau: float = 16.0

    def calibrated(self, prototypes: Tensor, counts: Tensor) -> Tensor:
        """The prototypes [C, F], given at length 1, of classes with ``counts`` samples [C]."""
        few, base = (counts > 0) & (counts <= self.shots), counts > self.shots
        if not (bool(few.any()) and bool(base.any())):
            return prototypes
        novel, known = prototypes[few], prototypes[base]
        nearby = F.normalize((self.tau * novel @ known.T).softmax(1) @ known, dim=1)
        return prototypes.masked_scatter(few[:, None], (1 - self.alpha) * novel + self.alpha * nearby)


class NCM(StatisticsClassifier):
    """Nearest class mean, from sums and counts that do not depend on how the data is split over calls.

    Args:
        feature_dim: Feature width F.
        metric: ``cosine`` scores by the cosine of f and μ_c; ``euclidean`` orders classes by ‖f − μ_c‖.
        teen: Calibration of the means of few samples; None for none. TEEN's needs ``cosine``.
        blocks: Widths F_k of the parts of the features, with sum F. With several, ``cosine`` scores by
            Σ_k w_k cos(f_k, μ_{c,k}): the cosine of whole features would let the part of the largest norm decide.

    Buffers:
        sums: float64 [C, F], sum of the features of each class.
        counts: int64 [C].
        block_weights: float64 [K], w; 1/K until they are set. Only with several blocks.

    Raises:
        ConfigError: The widths do not add up to F.
    """

    per_class = ("sums", "counts")
    removed_with = "nothing"
    over_classes = ()
    sums: Tensor
    block_weights: Tensor

    def __init__(
        self,
        feature_dim: int,
        metric: Metric = "cosine",
        teen: Teen | Calibration | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__(feature_dim)
        if isinstance(teen, Teen) and metric != "cosine":
            raise ConfigError(f"NCM: calibrate teen compares class means by cosine; got metric {metric!r}")
        self.metric, self.teen, self.blocks = metric, teen, tuple(blocks or (feature_dim,))
        if min(self.blocks) < 1 or sum(self.blocks) != feature_dim:
            raise ConfigError(f"NCM: blocks are {list(self.blocks)}; give widths ≥ 1 with the sum {feature_dim}")
        if len(self.blocks) > 1:
            equal = torch.full((len(self.blocks),), 1 / len(self.blocks), dtype=torch.float64)
            self.register_buffer("block_weights", equal)
        self.register_buffer("sums", torch.zeros(0, feature_dim, dtype=torch.float64))

    @exact()
    def partial_fit(self, features: Array, labels: Array) -> NCM:
        features, labels = self.prepare_fit(features, labels)
        self.sums.index_add_(0, labels, features)
        self.counts += torch.bincount(labels, minlength=self.num_classes)
        return self

    @exact()
    def transport(self, drift: AffineMap) -> NCM:
        """Apply ``drift`` to the means, as if every sample had been mapped."""
        self.sums = drift.sums(self.sums, self.counts)
        self._forget()
        return self

    @property
    def means(self) -> Tensor:
        """Class means, float64 [C, F]; zero for a class without samples."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    def _calibrated(self) -> Tensor:
        if isinstance(self.teen, Teen):
            return self.teen.calibrated(F.normalize(self.means, dim=1), self.counts)
        return self.means if self.teen is None else self.teen.calibrated(self.means, self.counts)

    @without_autocast()
    def logits(self, features: Array) -> Tensor:
        features = self.checked(features)
        means = (self.means if self.teen is None else self.cached("calibrated", self._calibrated)).to(features.dtype)
        if self.metric == "cosine":
            scores = self._by_block(features, means)
        else:  # −‖f − μ‖²/2 without the term that is the same for every class
            scores = features @ means.T - means.square().sum(1) / 2
        return self.only_seen(scores)

    def _by_block(self, features: Tensor, means: Tensor) -> Tensor:
        """Cosines [B, C], those of several blocks by their weights."""
        cosines = [
            F.normalize(x, dim=1) @ F.normalize(mean, dim=1).T
            for x, mean in zip(features.split(self.blocks, dim=1), means.split(self.blocks, dim=1), strict=True)
        ]
        if len(cosines) == 1:
            return cosines[0]
        return torch.einsum("k,kbc->bc", self.block_weights.to(features.dtype), torch.stack(cosines))
