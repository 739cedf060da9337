"""From a decoded image to the tensor that the backbone expects.

Geometry comes from timm's ``create_transform`` with the backbone's own data configuration and ends in uint8, which
keeps images small in memory; :meth:`Transforms.normalize` does the arithmetic per batch, on the device. The overrides
exist for published protocols (many feed [0, 1] pixels without normalisation, or crop 224 out of 256).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

from cil.config import Augmentation, TransformConfig
from cil.errors import ConfigError


class Transforms:
    """Test and training transform of one backbone, PIL image → uint8 [3, S, S].

    Args:
        data_config: timm's resolved data configuration (input_size, mean, std, interpolation, crop_pct, crop_mode).
        config: Overrides.

    Attributes:
        size: Side S of the transformed images, in pixels.
        shape: Shape of a transformed image, (3, S, S).
        sides: (S,); of several backbones, the side of each.
        evaluate: The test transform.
        augment: The training transform, or None for ``transform.augment: none``.
        card: The resolved settings, as ``metrics.json`` records them.

    Raises:
        ConfigError: ``transform.resize`` is smaller than the input of the backbone.
    """

    def __init__(self, data_config: dict[str, Any], config: TransformConfig | None = None) -> None:
        config = config or TransformConfig()
        self.size: int = data_config["input_size"][-1]
        self.shape: tuple[int, ...] = (3, self.size, self.size)
        self.sides: tuple[int, ...] = (self.size,)
        if config.resize is not None and config.resize < self.size:
            raise ConfigError(
                f"transform.resize: {config.resize} is smaller than the backbone's input of {self.size}; "
                f"allowed: {self.size} and more"
            )
        # half a pixel more, because timm's floor(size / crop_pct) could be one below the requested size
        crop_pct = self.size / (config.resize + 0.5) if config.resize else data_config["crop_pct"]
        interpolation = config.interpolation or data_config["interpolation"]
        crop_mode = config.crop or ("center" if config.resize else data_config.get("crop_mode") or "center")
        if config.normalize == "none":
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        elif config.normalize == "backbone":
            mean, std = tuple(data_config["mean"]), tuple(data_config["std"])
        else:
            mean, std = config.normalize.mean, config.normalize.std
        # use_prefetcher ends the pipeline in uint8; the mean only fills the border of crop mode "border"
        common: dict[str, Any] = {
            "input_size": self.size,
            "use_prefetcher": True,
            "interpolation": interpolation,
            "mean": mean,
        }
        self.evaluate: Callable[[Image.Image], np.ndarray] = create_transform(
            **common, crop_pct=crop_pct, crop_mode=crop_mode
        )
        self.augment: Callable[[Image.Image], np.ndarray] | None = None
        if isinstance(config.augment, Augmentation):
            augment = config.augment
            self.augment = create_transform(
                **{**common, "interpolation": augment.interpolation or interpolation},
                is_training=True,
                scale=augment.scale,
                ratio=augment.ratio,
                hflip=augment.flip,
                color_jitter=augment.color_jitter,  # type: ignore[arg-type]  # timm takes None for no jitter
            )
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        self.card: dict[str, Any] = {
            "input_size": self.size,
            "crop_pct": round(crop_pct, 6),
            "crop_mode": crop_mode,
            "interpolation": interpolation,
            "mean": list(mean),
            "std": list(std),
            "augment": config.augment if config.augment == "none" else config.augment.model_dump(),
        }

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) to which the test transform resizes an image of ``size`` before it crops it."""
        if self.card["crop_mode"] == "squash":
            return self.size, self.size
        scale = self.size / self.card["crop_pct"] / min(size)
        return int(size[0] * scale), int(size[1] * scale)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, S, S] in 0…255 → float [B, 3, S, S]: (pixel / 255 − mean) / std, on the pixels' device."""
        # a blocking copy would wait for everything queued on the device
        mean, std = (value.to(pixels.device, non_blocking=True) for value in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std)
