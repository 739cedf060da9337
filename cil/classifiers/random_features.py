"""What RanPAC's and LoRanPAC's classifiers share: random features of the features, drawn once and kept."""

from __future__ import annotations

import torch
from torch import Tensor

from cil.classifiers.base import StatisticsClassifier
from cil.errors import ConfigError
from cil.precision import exact


class RandomFeatures(StatisticsClassifier):
    """A classifier on H = ReLU(F R), R ~ N(0, 1).

    Args:
        feature_dim: Feature width F.
        projection: Width M of the random features; None: H = F, M = feature_dim.

    Buffers:
        projection: float32 [F, M], R; zero until drawn.
        targets: float64 [C, M], Σ YᵀH: the sums of each class's random features.

    Raises:
        ConfigError: An argument is out of range.
    """

    per_class = ("targets", "counts")
    projection: Tensor | None
    targets: Tensor

    def __init__(self, feature_dim: int, projection: int | None) -> None:
        super().__init__(feature_dim)
        if projection is not None and projection < 1:
            raise ConfigError(f"{type(self).__name__}: projection is {projection}; it must be at least 1, or None")
        self.width = projection or feature_dim
        self.register_buffer("projection", torch.zeros(feature_dim, projection) if projection else None)
        self.register_buffer("targets", torch.zeros(0, self.width, dtype=torch.float64))

    @exact()
    def draw(self, generator: torch.Generator) -> RandomFeatures:
        """Draw the random projection; it is kept for ever. Nothing happens without a projection.

        Raises:
            ConfigError: There already are statistics under another projection.
        """
        if self.projection is not None:
            if bool(self.counts.any()):
                name = type(self).__name__
                raise ConfigError(
                    f"{name}: the projection cannot be drawn again; samples were already learned under it"
                )
            drawn = torch.randn(self.projection.shape, generator=generator, device=generator.device)
            self.projection = drawn.to(self.projection)
            self._forget()
        return self

    def drawn(self, generator: torch.Generator) -> None:
        """Draw the projection unless that was done."""
        if self.projection is not None and not bool(self.projection.any()):
            self.draw(generator)

    def expand(self, features: Tensor) -> Tensor:
        """Features [N, F] → H [N, M], in the features' dtype."""
        return features if self.projection is None else (features @ self.projection.to(features.dtype)).relu_()
