"""Nearest class mean."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Metric = Literal["cosine", "euclidean"]


class NCM(nn.Module):
    """Nearest class mean over sums and counts, exact under any split of the data into calls.

    Sums are kept in float64 rather than means, so partial fits (of tasks, of shards on several devices) add exactly to
    far below float32 resolution and the result does not depend on how the data was cut.

    Args:
        feature_dim: Feature width F.
        metric: ``cosine`` compares directions; ``euclidean`` orders classes by ‖f − μ_c‖.

    Buffers:
        sums: float64 [C, F], sum of the features of each class.
        counts: int64 [C].
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, feature_dim: int, metric: Metric = "cosine") -> None:
        super().__init__()
        self.metric = metric
        self.register_buffer("sums", torch.zeros(0, feature_dim, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))

    def grow(self, classes: int) -> None:
        """Make room for labels 0…classes−1."""
        new = classes - len(self.counts)
        if new > 0:
            self.sums = torch.cat([self.sums, self.sums.new_zeros(new, self.sums.shape[1])])
            self.counts = torch.cat([self.counts, self.counts.new_zeros(new)])

    def partial_fit(self, features: Tensor, labels: Tensor) -> NCM:
        """Add features [N, F] with labels [N]; grows by itself to the largest label."""
        self.grow(int(labels.max()) + 1)
        labels = labels.to(self.sums.device)
        self.sums.index_add_(0, labels, features.to(self.sums))
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        return self

    @property
    def means(self) -> Tensor:
        """Class means, float64 [C, F]; zero for a class without images."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    def logits(self, features: Tensor) -> Tensor:
        """Scores [B, C] of features [B, F]; a class that has no images yet scores −∞."""
        means = self.means.to(features.dtype)
        if self.metric == "cosine":
            scores = F.normalize(features, dim=1) @ F.normalize(means, dim=1).T
        else:  # −‖f − μ‖²/2 without the term that is the same for every class
            scores = features @ means.T - means.square().sum(1) / 2
        return scores.masked_fill(self.counts == 0, float("-inf"))
