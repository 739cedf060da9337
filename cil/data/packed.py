"""Transforms of several backbones at once: every image is packed into one tensor, a slice for each backbone.

Backbones differ in image size, cropping, interpolation and normalisation. Resampling one tensor for all of them would
give other features than those of each backbone's own runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from cil.config import TransformConfig
from cil.data.transforms import Transforms
from cil.utils.randomness import isolated


class PackedTransforms(Transforms):
    """Test and training transforms of several backbones, PIL image → uint8 [3, N], N = Σ S_k².

    The training transform of every member draws the same random numbers: its crop is the same box of the image, and the
    image is flipped for all members or for none.

    Args:
        data_config: The data configuration of :class:`~cil.backbone.ensemble.Backbones`.
        config: Overrides, for every member.

    Attributes:
        members: The members' own transforms.
        shape: (3, N).
        card: ``members`` has the settings of each member; those of augmentation are the same for all.

    Raises:
        ConfigError: ``transform.resize`` is smaller than the input of a member.
    """

    def __init__(self, data_config: Mapping[str, Any], config: TransformConfig | None = None) -> None:
        self.members = tuple(Transforms(member, config) for member in data_config["members"])
        self.sides = tuple(member.size for member in self.members)
        self.size = sum(side**2 for side in self.sides)
        self.shape = (3, self.size)
        self.evaluate = _Packed([member.evaluate for member in self.members])
        augment = [member.augment for member in self.members if member.augment is not None]
        self.augment = _Packed(augment) if augment else None
        cards = [{key: value for key, value in member.card.items() if key != "augment"} for member in self.members]
        self.card = {"members": cards, "augment": self.members[0].card["augment"]}

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the largest image to which a member resizes one of ``size``."""
        return max((member.resized(size) for member in self.members), key=np.prod)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, N] → float [B, 3, N], each slice with its member's mean and standard deviation."""
        slices = pixels.split([side**2 for side in self.sides], dim=2)
        parts = [
            member.normalize(part.unflatten(2, (member.size, member.size))).flatten(2)
            for member, part in zip(self.members, slices, strict=True)
        ]
        return torch.cat(parts, dim=2)


class _Packed:
    """The transforms of several backbones as one, PIL image → uint8 [3, N]; a class, so that worker processes get it.

    Every member but the last restores the global random state, so that all of them draw the same numbers.
    """

    def __init__(self, members: Sequence[Callable[[Image.Image], np.ndarray]]) -> None:
        self.members = members

    def __call__(self, image: Image.Image) -> np.ndarray:
        parts = []
        for transform in self.members[:-1]:
            with isolated():
                parts.append(transform(image))
        parts.append(self.members[-1](image))
        return np.concatenate([np.asarray(part).reshape(3, -1) for part in parts], axis=1)


def make_transforms(data_config: Mapping[str, Any], config: TransformConfig | None = None) -> Transforms:
    """The transforms of a backbone, or of several, from its ``data_config``.

    Raises:
        ConfigError: ``transform.resize`` is smaller than the input of a backbone.
    """
    if "members" in data_config:
        return PackedTransforms(data_config, config)
    return Transforms(dict(data_config), config)
