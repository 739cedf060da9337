"""Scales of blocks of features, for features that several layers or several backbones compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cil.errors import ConfigError, DataError
from cil.utils.precision import exact, without_autocast

Scale = Literal["rms", "unit", "none"]


class BlockScales(nn.Module):
    """Brings the blocks x_1 … x_K of concatenated features to comparable scales: [√w_1 x_1/r_1, …, √w_K x_K/r_K].

    * ``rms``: r_k = (mean of ‖x_k‖²/F_k over the images given to :meth:`fit`)^½, so that a feature of every block has
      mean square w_k there. A block that is zero on all of them keeps r_k = 1.
    * ``unit``: r_k = ‖x_k‖ of each image, so that block k of every image has length √w_k.
    * ``none``: r_k = 1.

    A learner calls :meth:`fit` once, with the features of its first task. The factors then stay as they are, because
    the sums of a classifier hold features that were scaled with them.

    Args:
        widths: Width F_k ≥ 1 of every block, in the order of the features.
        scale: Kind of scale.

    Buffers:
        factors: float64 [K], √w_k / r_k, or √w_k for ``unit``; 1 before :meth:`fit`.

    Raises:
        ConfigError: There is no block, or a width is below 1.
    """

    factors: Tensor
    block_of: Tensor

    def __init__(self, widths: Sequence[int], scale: Scale = "rms") -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ConfigError(f"BlockScales: widths are {list(widths)}; give one or more widths ≥ 1")
        self.widths, self.scale = tuple(widths), scale
        self.register_buffer("factors", torch.ones(len(self.widths), dtype=torch.float64))
        every = torch.arange(len(self.widths)).repeat_interleave(torch.tensor(self.widths))
        self.register_buffer("block_of", every, persistent=False)

    @property
    def from_images(self) -> bool:
        """Whether the factors depend on the images given to :meth:`fit`."""
        return self.scale == "rms"

    @exact()
    def fit(self, features: Tensor, weights: Tensor | Sequence[float] | None = None) -> BlockScales:
        """Set the factors from features [N, ΣF_k] of the first task.

        Args:
            features: Features before scaling, float32 or float64; ``unit`` and ``none`` do not read them.
            weights: Weight w_k ≥ 0 of every block, [K]; None: 1.

        Raises:
            DataError: There is no image.
            ConfigError: The number of weights is not K, or a weight is negative or not finite.
        """
        if not len(features):
            raise DataError("BlockScales: there are no features to take the scales from")
        factors = torch.ones_like(self.factors)
        if self.scale == "rms":
            for k, block in enumerate(features.split(self.widths, dim=1)):
                rms = float(torch.linalg.vector_norm(block, dtype=torch.float64)) / block.numel() ** 0.5
                factors[k] = 1 / rms if rms else 1.0
        if weights is not None:
            given = torch.as_tensor(weights, dtype=torch.float64, device=factors.device)
            if given.shape != factors.shape or not bool(((given >= 0) & given.isfinite()).all()):
                raise ConfigError(
                    f"BlockScales: weights are {given.tolist()}; give {len(factors)} finite weights ≥ 0, one per block"
                )
            factors *= given.sqrt()
        self.factors = factors
        return self

    @without_autocast()
    def forward(self, features: Tensor) -> Tensor:
        """Scale features [B, ΣF_k], in their dtype; every image by itself."""
        if self.scale == "unit":
            features = torch.cat([F.normalize(block, dim=1) for block in features.split(self.widths, dim=1)], dim=1)
        return features * self.factors[self.block_of].to(features.dtype)
