"""Features, each computed once per image and view.

A learner sees through one or several *views*, each with a version of its own, side by side in its features. A view that
stays frozen sends every image through the backbone once over all stages; one that changes is recomputed, and only it.
What a view of the backbone (and a tuner) says of an image lasts longer than the run: with a store it is kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from cil.identity import backbone_digest, seen_through, tuner_digest
from cil.store import FeatureStore, Key

if TYPE_CHECKING:
    from cil.backbone import Backbone
    from cil.data.images import ImageSet

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
View = Callable[[Tensor], Tensor]
Unit = Sequence[np.ndarray]
"""Positions of the images of each of some forward passes: what is computed, kept and read together."""


@dataclass(frozen=True)
class Queried:
    """A view that also wants its images' frozen features; the cache, which has them, hands them over.

    Attributes:
        see: (images [B, 3, H, W], frozen features [B, F]) → [B, F'].
        query: Images → their frozen features, for who has only images.
        backbone: Whose features these are.
    """

    see: Callable[[Tensor, Tensor], Tensor]
    query: View
    backbone: Backbone

    def __call__(self, images: Tensor) -> Tensor:
        return self.see(images, self.query(images))


class Eyes(Protocol):
    """What this file needs of a learner, and of the backbone itself: through what it sees, and when that changes."""

    training: bool

    def views(self) -> Mapping[Hashable, View]: ...
    def train(self, mode: bool = True) -> Any: ...


class FeatureCache:
    """Features of one run, in memory or mapped from disk, for the views that learner and backbone have now.

    The frozen backbone computes in batches that depend on the data alone: the images of one class (and domain) in the
    order of the data set. So every bit is the same in whatever order classes come, computed here or by an earlier run.
    A view with code of the learner's in it computes the batches it is asked for.

    With several processes each computes every so many-th batch, whole, and all end with all features: the batches, and
    with them the bits, are those of a single process, and no image is counted twice. The main process alone writes.

    Args:
        accelerator: Device, mixed precision and processes of the forward passes.
        batch_size: Images a forward pass.
        track: Progress bar, as in ``Context``.
        store: Features on disk; None keeps them in memory only.

    Attributes:
        spared: Forward passes that what was asked for so far needs, less those that were made: read from the store, or
            (negative) made early for images nobody has asked for yet. ``backbone.passes + cache.spared`` is what a
            method costs, whatever lay on disk; like ``passes``, to be summed over the processes.
        read: Images asked for so far whose features came from the store, each once a view.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        batch_size: int = 128,
        track: Track | None = None,
        store: FeatureStore | None = None,
    ) -> None:
        self.accelerator, self.batch_size, self._track, self._store = accelerator, batch_size, track, store
        self.spared = self.read = 0
        self._views: WeakKeyDictionary[Any, set[Hashable]] = WeakKeyDictionary()  # versions each pair of eyes asked for
        self._digests: WeakKeyDictionary[Backbone, str | None] = WeakKeyDictionary()
        # (version, image set, in the data's own batches) → features; what is kept keeps its image set and so its id
        self._kept: dict[tuple[Hashable, int, bool], _Kept] = {}

    def get(self, eyes: Eyes, images: ImageSet, indices: np.ndarray) -> Tensor:
        """Features of ``indices``, all views side by side, float32 [N, F] on the CPU; what is missing is computed."""
        views = eyes.views()
        self.fill(eyes, images, {version: [indices] for version in views})
        return torch.cat([self._of(version, view, images).rows(indices) for version, view in views.items()], dim=1)

    def fill(self, eyes: Eyes, images: ImageSet, groups: Mapping[Hashable, Sequence[np.ndarray]]) -> None:
        """Compute what is missing of each view's groups of images; views these eyes had and have no more are dropped.

        A forward pass never mixes groups. The grouping decides the batches, and with them the last bits of the
        floating-point results: a resumed run that asks in the same groups gets the same bits. (Where a view is the
        frozen backbone alone, the data decide, and the grouping changes nothing.)
        """
        views = eyes.views()
        gone = self._views.get(eyes, set()) - views.keys()
        self._views[eyes] = set(views)
        self._kept = {key: entry for key, entry in self._kept.items() if key[0] not in gone}
        for version, parts in groups.items():
            view = views[version]
            kept = self._of(version, view, images)
            if kept.groups is None:
                for indices in parts:
                    missing = indices[kept.unit[indices] < 0]
                    if len(missing):
                        self._provide(eyes, view, kept, [self._cut(missing)])
                continue
            asked = np.unique(np.concatenate([np.zeros(0, np.int64), *parts]))
            wanted = np.unique(kept.group[asked[kept.unit[asked] < 0]])
            self._provide(eyes, view, kept, [self._cut(kept.groups[group]) for group in wanted])
            new = asked[~kept.asked[asked]]
            kept.asked[new] = True
            if self.accelerator.is_main_process:
                self.spared += len(new)
                self.read += int(np.array(kept.from_store, dtype=bool)[kept.unit[new]].sum()) if len(new) else 0

    def _of(self, version: Hashable, view: View, images: ImageSet) -> _Kept:
        seen = seen_through(view)
        # images of somebody else's (an Avalanche experience) may not know their classes
        natural = seen is not None and seen[1] is None and hasattr(images, "labels")
        key = (version, id(images), natural)
        if key not in self._kept:
            self._kept[key] = _Kept(images, natural)
        return self._kept[key]

    def _cut(self, indices: np.ndarray) -> Unit:
        return np.split(indices, range(self.batch_size, len(indices), self.batch_size))

    def _provide(self, eyes: Eyes, view: View, kept: _Kept, units: Sequence[Unit]) -> None:
        """Read units from the store, compute the others, and keep them here and there."""
        key = self._key(view, kept.images) if self._store is not None and units else None
        missing = []
        for unit, found in zip(units, self._stored(key, units), strict=True):
            if found is None:
                missing.append(unit)
                continue
            kept.add(unit, found, from_store=True)
            if kept.groups is None and self.accelerator.is_main_process:
                self.spared += len(found)
                self.read += len(found)
        if kept.groups is not None:
            self.spared -= sum(map(len, self._share(missing)))
        for unit, features in zip(missing, self._computed(eyes, view, kept.images, missing), strict=True):
            kept.add(unit, features, from_store=False)
            if key is not None and self._store is not None and self.accelerator.is_main_process:
                self._store.write(key, unit, features)

    def _stored(self, key: Key | None, units: Sequence[Unit]) -> list[Tensor | None]:
        """What the store has of units; the same on every process."""
        if key is None or self._store is None:
            return [None] * len(units)
        found = [self._store.read(key, unit) for unit in units]
        if self.accelerator.num_processes > 1:  # another run may write or evict between one process's look and the next
            there = torch.tensor([features is not None for features in found], device=self.accelerator.device)
            everywhere = self.accelerator.reduce(there.long(), "sum") == self.accelerator.num_processes
            found = [features if all_have else None for features, all_have in zip(found, everywhere, strict=True)]
        return found

    def _key(self, view: View, images: ImageSet) -> Key | None:
        """What the view's features of these images depend on; None where that cannot be told."""
        seen = seen_through(view)
        if seen is None or not hasattr(images, "source"):
            return None
        backbone, tuner = seen
        if backbone not in self._digests:
            self._digests[backbone] = backbone_digest(backbone)
        digests = self._digests[backbone], tuner_digest(tuner, backbone)
        if None in digests:
            return None
        parts = {
            **images.identity,
            "backbone": digests[0],
            "tuner": digests[1],
            "precision": self.accelerator.mixed_precision,
            "matmul_precision": torch.get_float32_matmul_precision(),
            "device": self.accelerator.device.type,
            "torch": torch.__version__,
        }
        about = {
            "data_name": images.title,
            "backbone_name": backbone.name,
            "weights": backbone.fingerprint,
            "feature_dim": backbone.feature_dim,
            "tuner_name": "" if tuner is None else type(tuner).__name__,
        }
        return Key(parts, about)

    def _share(self, units: Sequence[Unit]) -> list[np.ndarray]:
        """The forward passes of units that fall to this process."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        return [part for unit in units for part in unit][rank::processes]

    def _computed(self, eyes: Eyes, view: View, images: ImageSet, units: Sequence[Unit]) -> Iterator[Tensor]:
        """float32 [N, F] on the CPU for each unit, the same on every process."""
        if not units:
            return
        device, processes = self.accelerator.device, self.accelerator.num_processes
        mine = self._share(units)
        order = np.concatenate([np.zeros(0, np.int64), *mine])
        if isinstance(view, Queried):
            every = np.concatenate([part for unit in units for part in unit])
            self.fill(view.backbone, images, {version: [every] for version in view.backbone.views()})
        loaded = images.batches(order, order, self.batch_size, device=device)
        batches: Iterable[Any] = _recut((pixels for pixels, _ in loaded), list(map(len, mine)))
        if self._track is not None:
            batches = self._track(batches, "features", len(mine))
        waiting, first = iter(batches), 0
        was_training = eyes.training
        eyes.train(False)
        for unit in units:
            own = range((self.accelerator.process_index - first) % processes, len(unit), processes)
            first += len(unit)
            with torch.inference_mode(), self.accelerator.autocast():
                parts = [self._seen(view, images, next(waiting), unit[i]) for i in own]
            if processes == 1:
                yield torch.cat(parts).cpu()
                continue
            width = torch.tensor([parts[0].shape[1] if parts else 0], device=device)
            whole = torch.zeros(sum(map(len, unit)), int(self.accelerator.gather(width).max()), device=device)
            starts = np.cumsum([0, *map(len, unit)])
            for i, part in zip(own, parts, strict=True):
                whole[int(starts[i]) : int(starts[i + 1])] = part
            yield self.accelerator.reduce(whole, "sum").cpu()
        eyes.train(was_training)
        for _ in waiting:  # nothing is left, but the progress bar learns so only when asked
            pass

    def _seen(self, view: View, images: ImageSet, pixels: Tensor, indices: np.ndarray) -> Tensor:
        if isinstance(view, Queried):
            return view.see(pixels, self.get(view.backbone, images, indices).to(pixels.device)).float()
        return view(pixels).float()


class _Kept:
    """Features of one image set through one view.

    Args:
        images: The image set; kept alive here, so that its id stays its own.
        natural: Computed in the data's own groups.

    Attributes:
        groups: Positions of the images of each class and domain, in order; None where groups come with the request.
        group: Group of each image, int64 [N].
        unit: Which of ``parts`` has an image, int64 [N]; −1: none yet.
        asked: Images that were asked for, bool [N].
    """

    def __init__(self, images: ImageSet, natural: bool) -> None:
        self.images = images
        self.unit, self.row = np.full(len(images), -1), np.zeros(len(images), dtype=np.int64)
        self.asked = np.zeros(len(images), dtype=bool)
        self.parts: list[Tensor] = []
        self.from_store: list[bool] = []
        self.groups: list[np.ndarray] | None = None
        if natural:
            facts = [images.labels] if images.domains is None else [images.labels, images.domains]
            self.group = np.unique(np.stack(facts), axis=1, return_inverse=True)[1].reshape(-1)
            self.groups = np.split(np.argsort(self.group, kind="stable"), np.cumsum(np.bincount(self.group))[:-1])

    def add(self, unit: Unit, features: Tensor, *, from_store: bool) -> None:
        indices = np.concatenate([*unit])
        self.unit[indices], self.row[indices] = len(self.parts), np.arange(len(indices))
        self.parts.append(features)
        self.from_store.append(from_store)

    def rows(self, indices: np.ndarray) -> Tensor:
        """A copy, float32 [N, F]."""
        order = np.argsort(self.unit[indices], kind="stable")
        used, starts = np.unique(self.unit[indices][order], return_index=True)
        found = torch.empty(len(indices), self.parts[0].shape[1])
        for unit, places in zip(used, np.split(order, starts[1:]), strict=True):
            found[torch.from_numpy(places)] = self.parts[unit][torch.from_numpy(self.row[indices[places]])]
        return found


def _recut(batches: Iterator[Tensor], sizes: Sequence[int]) -> Iterator[Tensor]:
    """The same images in batches of the given sizes, each in memory of its own: kernels may round by alignment."""
    rest: list[Tensor] = []
    for size in sizes:
        while sum(map(len, rest)) < size:
            rest.append(next(batches))
        together = torch.cat(rest)
        yield together if len(together) == size else together[:size].clone()
        rest = [together[size:]] if len(together) > size else []
