"""Nearest class mean."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classifiers.base import Array, StatisticsClassifier
from cil.classifiers.drift import AffineMap
from cil.utils.precision import exact, without_autocast

Metric = Literal["cosine", "euclidean"]


class NCM(StatisticsClassifier):
    """Nearest class mean, from sums and counts that do not depend on how the data is split over calls.

    Args:
        feature_dim: Feature width F.
        metric: ``cosine`` scores by the cosine of f and μ_c; ``euclidean`` orders classes by ‖f − μ_c‖.

    Buffers:
        sums: float64 [C, F], sum of the features of each class.
        counts: int64 [C].
    """

    per_class = ("sums", "counts")
    removed_with = "nothing"
    sums: Tensor

    def __init__(self, feature_dim: int, metric: Metric = "cosine") -> None:
        super().__init__(feature_dim)
        self.metric = metric
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

    @without_autocast()
    def logits(self, features: Array) -> Tensor:
        features = self.checked(features)
        means = self.means.to(features.dtype)
        if self.metric == "cosine":
            scores = F.normalize(features, dim=1) @ F.normalize(means, dim=1).T
        else:  # −‖f − μ‖²/2 without the term that is the same for every class
            scores = features @ means.T - means.square().sum(1) / 2
        return self.only_seen(scores)
