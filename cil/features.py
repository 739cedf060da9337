"""Features, each computed once per image and view.

A learner sees through one or several *views*, each with a version of its own, side by side in its features. A view that
stays frozen sends every image through the backbone once over all stages; one that changes is recomputed, and only it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

if TYPE_CHECKING:
    from cil.data.images import ImageSet

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
View = Callable[[Tensor], Tensor]


class Eyes(Protocol):
    """What this file needs of a learner, and of the backbone itself: through what it sees, and when that changes."""

    training: bool

    def views(self) -> Mapping[Hashable, View]: ...
    def train(self, mode: bool = True) -> Any: ...


class FeatureCache:
    """Features of one run, in memory, for the views that learner and backbone have now.

    With several processes each computes every so many-th batch, whole, and all end with all features: the batches, and
    with them the bits, are those of a single process, and no image is counted twice.

    Args:
        accelerator: Device, mixed precision and processes of the forward passes.
        batch_size: Images a forward pass.
        track: Progress bar, as in ``Context``.
    """

    def __init__(self, accelerator: Accelerator, batch_size: int = 128, track: Track | None = None) -> None:
        self.accelerator, self.batch_size, self._track = accelerator, batch_size, track
        self._views: WeakKeyDictionary[Any, set[Hashable]] = WeakKeyDictionary()  # versions each pair of eyes asked for
        # (version, image set) → (the image set, kept alive so that its id stays its own; which are there; [N, F])
        self._kept: dict[tuple[Hashable, int], tuple[ImageSet, np.ndarray, Tensor]] = {}

    def get(self, eyes: Eyes, images: ImageSet, indices: np.ndarray) -> Tensor:
        """Features of ``indices``, all views side by side, float32 [N, F] on the CPU; what is missing is computed."""
        views = eyes.views()
        self.fill(eyes, images, {version: [indices] for version in views})
        rows = torch.from_numpy(indices)
        return torch.cat([self._kept[version, id(images)][2][rows] for version in views], dim=1)

    def fill(self, eyes: Eyes, images: ImageSet, groups: Mapping[Hashable, Sequence[np.ndarray]]) -> None:
        """Compute what is missing of each view's groups of images; views these eyes had and have no more are dropped.

        A forward pass never mixes groups. The grouping decides the batches, and with them the last bits of the
        floating-point results: a resumed run that asks in the same groups gets the same bits.
        """
        views = eyes.views()
        gone = self._views.get(eyes, set()) - views.keys()
        self._views[eyes] = set(views)
        self._kept = {key: entry for key, entry in self._kept.items() if key[0] not in gone}
        for version, parts in groups.items():
            for indices in parts:
                entry = self._kept.get((version, id(images)))
                missing = indices if entry is None else indices[~entry[1][indices]]
                if not len(missing):
                    continue
                computed = self._compute(eyes, views[version], images, missing)
                if entry is None:
                    entry = (images, np.zeros(len(images), dtype=bool), torch.zeros(len(images), computed.shape[1]))
                    self._kept[version, id(images)] = entry
                entry[2][torch.from_numpy(missing)] = computed
                entry[1][missing] = True

    def _compute(self, eyes: Eyes, view: View, images: ImageSet, indices: np.ndarray) -> Tensor:
        """float32 [N, F] on the CPU, the same on every process."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        cuts = np.split(np.arange(len(indices)), range(self.batch_size, len(indices), self.batch_size))[rank::processes]
        mine = np.concatenate([np.zeros(0, np.int64), *cuts])
        batches: Iterable[Any] = images.batches(
            indices[mine], indices[mine], self.batch_size, device=self.accelerator.device
        )
        if self._track is not None:
            batches = self._track(batches, "features", len(cuts))
        was_training = eyes.training
        eyes.train(False)
        with torch.inference_mode(), self.accelerator.autocast():
            parts = [view(pixels).float() for pixels, _ in batches]
        eyes.train(was_training)
        if processes == 1:
            return torch.cat(parts).cpu()
        width = torch.tensor([parts[0].shape[1] if parts else 0], device=self.accelerator.device)
        whole = torch.zeros(len(indices), int(self.accelerator.gather(width).max()), device=self.accelerator.device)
        for rows, part in zip(cuts, parts, strict=True):
            whole[torch.from_numpy(rows)] = part
        return self.accelerator.reduce(whole, "sum").cpu()
