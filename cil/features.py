"""Features, each computed once per image and feature version.

A learner whose eyes stay frozen sends every image through the backbone once over all stages; one whose eyes change is
recomputed, and only it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

if TYPE_CHECKING:
    from cil.data.images import ImageSet

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


class Eyes(Protocol):
    """The half of a learner this file needs: how it sees, and when that changed."""

    training: bool

    @property
    def feature_version(self) -> Hashable: ...
    def features(self, images: Tensor) -> Tensor: ...
    def train(self, mode: bool = True) -> Any: ...


class FeatureCache:
    """Features of one run, in memory, for the newest version only.

    Args:
        accelerator: Device and mixed precision of the forward passes.
        batch_size: Images a forward pass.
        track: Progress bar, as in ``Context``.
    """

    def __init__(self, accelerator: Accelerator, batch_size: int = 128, track: Track | None = None) -> None:
        self.accelerator, self.batch_size, self._track = accelerator, batch_size, track
        self._version: Hashable = None
        self._kept: dict[int, tuple[ImageSet, np.ndarray, Tensor]] = {}  # image set → (itself, which are there, [N, F])

    def get(self, eyes: Eyes, images: ImageSet, groups: Sequence[np.ndarray]) -> Tensor:
        """Features of the images in ``groups``, float32 [sum of group sizes, F] on the CPU, in order.

        A forward pass never mixes groups. The grouping decides the batches, and with them the last bits of the
        floating-point results: a resumed run that asks in the same groups gets the same bits.
        """
        if self._version != eyes.feature_version:
            self._kept.clear()
            self._version = eyes.feature_version
        for indices in groups:
            entry = self._kept.get(id(images))
            missing = indices if entry is None else indices[~entry[1][indices]]
            if not len(missing):
                continue
            computed = self._compute(eyes, images, missing)
            if entry is None:
                entry = (images, np.zeros(len(images), dtype=bool), torch.zeros(len(images), computed.shape[1]))
                self._kept[id(images)] = entry
            entry[2][torch.from_numpy(missing)] = computed
            entry[1][missing] = True
        return self._kept[id(images)][2][torch.from_numpy(np.concatenate(groups))]

    def _compute(self, eyes: Eyes, images: ImageSet, indices: np.ndarray) -> Tensor:
        batches: Iterable[Any] = images.batches(indices, indices, self.batch_size, device=self.accelerator.device)
        if self._track is not None:
            batches = self._track(batches, "features", -(-len(indices) // self.batch_size))
        was_training = eyes.training
        eyes.train(False)
        with torch.inference_mode(), self.accelerator.autocast():
            parts = [eyes.features(pixels).float().cpu() for pixels, _ in batches]
        eyes.train(was_training)
        return torch.cat(parts)
