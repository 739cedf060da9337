"""The base of RanPAC's and LoRanPAC's classifiers: random features, from a projection that is drawn once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classifiers.base import StatisticsClassifier
from cil.errors import ConfigError
from cil.utils.precision import exact


class RandomFeatures(StatisticsClassifier):
    """A classifier on the random features H = ReLU(X R) of features X, with R ~ N(0, 1).

    Args:
        feature_dim: Feature width F.
        projection: Width M of the random features; None: no projection, H = X and M = F.
        settings: Attributes of a subclass that its memory depends on, for the check before R is allocated.

    Buffers:
        projection: float32 [F, M], R; zero until drawn.
        targets: float64 [C, M], YᵀH for one-hot labels Y: the sum of the random features of each class.

    Raises:
        ConfigError: An argument is out of range.
    """

    per_class: tuple[str, ...] = ("targets", "counts")
    projection: Tensor | None
    targets: Tensor

    def __init__(self, feature_dim: int, projection: int | None, **settings: Any) -> None:
        super().__init__(feature_dim)
        if projection is not None and projection < 1:
            raise ConfigError(f"{type(self).__name__}: projection is {projection}; it must be at least 1, or None")
        self._width, self._projected = projection or feature_dim, projection is not None
        for name, value in settings.items():
            setattr(self, name, value)
        self.require_memory()
        self.register_buffer("projection", torch.zeros(feature_dim, projection) if projection else None)
        self.register_buffer("targets", torch.zeros(0, self.width, dtype=torch.float64))

    @property
    def width(self) -> int:
        return self._width

    @property
    def narrower(self) -> str:
        return "set `projection` to {width} or less" if self._projected else super().narrower

    def kept_bytes(self, classes: int, width: int) -> float:
        return super().kept_bytes(classes, width) + self._projected * 4 * self.feature_dim * width

    @exact()
    def draw(self, generator: torch.Generator) -> RandomFeatures:
        """Draw the random projection, or do nothing if there is none.

        Raises:
            ConfigError: Samples were already learned under another projection.
        """
        if self.projection is not None:
            if bool(self.counts.any()):
                name = type(self).__name__
                raise ConfigError(
                    f"{name}: the projection cannot be drawn again; samples were already learned under it"
                )
            values = torch.randn(self.projection.shape, generator=generator, device=generator.device)
            self.projection = values.to(self.projection)
            self._forget()
        return self

    def ensure_drawn(self, generator: torch.Generator) -> None:
        """Draw the random projection if that has not been done yet."""
        if self.projection is not None and not bool(self.projection.any()):
            self.draw(generator)

    def expand(self, features: Tensor) -> Tensor:
        """Compute H [N, M] of features [N, F], in their dtype."""
        return features if self.projection is None else (features @ self.projection.to(features.dtype)).relu_()

    def nearest_mean(self, targets: Tensor | None = None) -> Tensor:
        """Class sums of H (default: ``targets``) at length 1, float64 [M, C]: weights for classes of one sample each.

        Regression would interpolate the samples, and classes whose features are short would win.
        """
        return F.normalize(self.targets if targets is None else targets, dim=1).T
