"""The keys of Tip-Adapter: normalised features of images, as one key per class or one per image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classifiers.base import Array, Classifier
from cil.classifiers.ncm import NCM
from cil.utils.precision import exact, without_autocast


class MeanKeys(NCM):
    """One key per class, the normalised mean of its images' features; buffers and logits are those of ``NCM``."""

    def affinities(self, features: Tensor, sharpness: Tensor | float) -> Tensor:
        """exp(−β (1 − f̂ · k_c)) of features [B, d], [B, C]; 0 for a class without images."""
        return torch.exp(-sharpness * (1 - self.logits(features)))


class ImageKeys(Classifier):
    """One key per image, its normalised feature. This is a memory of samples.

    Buffers:
        counts: int64 [C], number of images of each class.
        rows: float32 [K, d], keys of length 1, in the order in which they came.
        labels: int64 [K], their classes.
    """

    counts: Tensor
    rows: Tensor
    labels: Tensor

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim)
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("rows", torch.zeros(0, feature_dim))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    def grow(self, classes: int) -> None:
        self.counts = F.pad(self.counts, (0, max(0, classes - len(self.counts))))

    @exact()
    def partial_fit(self, features: Array, labels: Array) -> ImageKeys:
        features, labels = self.prepare_fit(features, labels)
        self.counts = self.counts + torch.bincount(labels, minlength=self.num_classes)
        self.rows = torch.cat([self.rows, F.normalize(features, dim=1).float()])
        self.labels = torch.cat([self.labels, labels])
        return self

    @without_autocast()
    def logits(self, features: Array) -> Tensor:
        """Largest cosine with a key of each class: the limit of :meth:`affinities` for β → ∞."""
        near = self._cosines(features)
        least = near.new_full((near.shape[0], self.num_classes), float("-inf"))
        return least.scatter_reduce(1, self.labels.expand_as(near), near, "amax")

    @without_autocast()
    def affinities(self, features: Tensor, sharpness: Tensor | float) -> Tensor:
        """Σ_{i: y_i = c} exp(−β (1 − f̂ · k_i)) of features [B, d], [B, C]; 0 for a class without images."""
        near = torch.exp(-sharpness * (1 - self._cosines(features)))
        return near @ F.one_hot(self.labels, self.num_classes).to(near.dtype)

    def _cosines(self, features: Array) -> Tensor:
        features = self.checked(features)
        return F.normalize(features, dim=1) @ self.rows.to(features.dtype).T
