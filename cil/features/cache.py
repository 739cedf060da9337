"""Features, each computed once per image and view.

A learner's features are the concatenation of one or several *views*, each with its own version. A frozen view sends
every image through the backbone once over all stages; when a view changes, only that view is recomputed. With a feature
store, the features of a view that consists of the backbone and a tuner are kept on disk for later runs.
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

from cil.backbone import Member
from cil.features.digest import about_tuner, backbone_digest, is_frozen, seen_through, tuner_digest
from cil.features.texts import encoded
from cil.store import FeatureStore, Key

if TYPE_CHECKING:
    from cil.backbone import Backbone, TextSide
    from cil.data.images import ImageSet

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
View = Callable[[Tensor], Tensor]
Unit = Sequence[np.ndarray]
"""The positions of the images of each of several forward passes, which are computed, kept and read together."""


@dataclass(frozen=True)
class Queried:
    """A view that also needs the frozen features of its images, which the cache passes to it.

    Attributes:
        see: (images [B, 3, H, W], frozen features [B, F]) → [B, F'].
        query: Computes the frozen features, for callers that have only images.
        backbone: The backbone that computes these features.
    """

    see: Callable[[Tensor, Tensor], Tensor]
    query: View
    backbone: Backbone

    def __call__(self, images: Tensor) -> Tensor:
        return self.see(images, self.query(images))


class Viewer(Protocol):
    """What the cache needs from a learner or a backbone: its views, by version."""

    training: bool

    def views(self) -> Mapping[Hashable, View]: ...
    def train(self, mode: bool = True) -> Any: ...


class FeatureCache:
    """Features of one run, in memory or mapped from disk, for the current views of the learner and the backbone.

    The frozen backbone computes in batches that depend only on the data: the images of one class (and domain), in the
    order of the data set. The features are therefore bit-identical for every class order, whether this run or an
    earlier one computed them. A view that runs learner code is computed in the requested batches instead.

    With several processes, process i of n computes every n-th batch, and all processes end with all features. The
    batches, and therefore the bits, are those of a single process, and no image is counted twice. Only the main process
    writes to the store.

    Args:
        accelerator: Device, mixed precision and processes of the forward passes.
        batch_size: Images per forward pass.
        track: Progress bar, as in ``Context``.
        store: Feature store on disk; None keeps features only in memory.

    Attributes:
        passes_saved: Forward passes saved so far: those the requested features need, minus those actually made.
            Negative while features have been computed ahead of a request. ``backbone.passes + cache.passes_saved`` is
            what a method costs, whatever was on disk; like ``passes``, to be summed over the processes.
        read: Images requested so far whose features came from the store, counted once per view.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        batch_size: int = 128,
        track: Track | None = None,
        store: FeatureStore | None = None,
    ) -> None:
        self.accelerator, self.batch_size, self._track, self._store = accelerator, batch_size, track, store
        self.passes_saved = self.read = 0
        self._views: WeakKeyDictionary[Any, set[Hashable]] = WeakKeyDictionary()  # versions that each viewer asked for
        self._digests: WeakKeyDictionary[Backbone, str | None] = WeakKeyDictionary()
        # (version, image set, in the data's own batches) → features; what is kept keeps its image set and so its id
        self._kept: dict[tuple[Hashable, int, bool], _Kept] = {}

    def get(self, viewer: Viewer, images: ImageSet, indices: np.ndarray) -> Tensor:
        """Features of ``indices``, all views concatenated, float32 [N, F] on the CPU; missing ones are computed."""
        return torch.cat(list(self.parts(viewer, images, indices).values()), dim=1)

    def parts(self, viewer: Viewer, images: ImageSet, indices: np.ndarray) -> dict[Hashable, Tensor]:
        """The same by version of the view, float32 [N, F_v] each."""
        views = viewer.views()
        self.fill(viewer, images, {version: [indices] for version in views})
        return {v: self._of(v, *as_seen(view, images)).rows(indices) for v, view in views.items()}

    def put(self, viewer: Viewer, version: Hashable, images: ImageSet, indices: np.ndarray, features: Tensor) -> None:
        """Take features of ``indices`` that were computed earlier, float32 [N, F_v], for a current view."""
        kept = self._of(version, *as_seen(viewer.views()[version], images))
        if len(indices):
            kept.add([indices], features, from_store=False)
            kept.asked[indices] = True

    def fill(self, viewer: Viewer, images: ImageSet, groups: Mapping[Hashable, Sequence[np.ndarray]]) -> None:
        """Compute the missing features of each view's groups of images, and drop views that ``viewer`` no longer has.

        A forward pass never mixes groups. The grouping decides the batches, and therefore the last bits of the
        results: a resumed run that requests the same groups gets the same bits. (For a view that is the frozen backbone
        alone, the batches depend on the data, and the grouping changes nothing.)
        """
        views = viewer.views()
        gone = self._views.get(viewer, set()) - views.keys()
        self._views[viewer] = set(views)
        self._kept = {key: entry for key, entry in self._kept.items() if key[0] not in gone}
        for version, parts in groups.items():
            view, seen = as_seen(views[version], images)
            kept = self._of(version, view, seen)
            if kept.groups is None:
                for indices in parts:
                    missing = indices[kept.unit[indices] < 0]
                    if len(missing):
                        self._provide(viewer, view, kept, [self._cut(missing)])
                continue
            asked = np.unique(np.concatenate([np.zeros(0, np.int64), *parts]))
            wanted = np.unique(kept.group[asked[kept.unit[asked] < 0]])
            self._provide(viewer, view, kept, [self._cut(kept.groups[group]) for group in wanted])
            new = asked[~kept.asked[asked]]
            kept.asked[new] = True
            if self.accelerator.is_main_process:
                self.passes_saved += len(new)
                self.read += int(np.array(kept.from_store, dtype=bool)[kept.unit[new]].sum()) if len(new) else 0

    def texts(self, side: TextSide, texts: Sequence[str]) -> Tensor:
        """Vectors of texts in the joint space, float32 [n, d] on the CPU; see :func:`cil.features.texts.encoded`."""
        return encoded(side, texts, self.accelerator, self._store)

    def _of(self, version: Hashable, view: View, images: ImageSet) -> _Kept:
        seen = seen_through(view)
        # images from elsewhere (an Avalanche experience) may not know their classes
        natural = seen is not None and is_frozen(seen[1]) and hasattr(images, "labels")
        key = (version, id(images), natural)
        if key not in self._kept:
            self._kept[key] = _Kept(images, natural)
        return self._kept[key]

    def _cut(self, indices: np.ndarray) -> Unit:
        return np.split(indices, range(self.batch_size, len(indices), self.batch_size))

    def _provide(self, viewer: Viewer, view: View, kept: _Kept, units: Sequence[Unit]) -> None:
        """Read units from the store and compute the others; keep all in memory, and new ones also in the store."""
        key = self.key(view, kept.images) if self._store is not None and units else None
        missing = []
        for unit, stored in zip(units, self._stored(key, units), strict=True):
            if stored is None:
                missing.append(unit)
                continue
            kept.add(unit, stored, from_store=True)
            if kept.groups is None and self.accelerator.is_main_process:
                self.passes_saved += len(stored)
                self.read += len(stored)
        if kept.groups is not None:
            self.passes_saved -= sum(map(len, self._share(missing)))
        for unit, features in zip(missing, self._computed(viewer, view, kept.images, missing), strict=True):
            kept.add(unit, features, from_store=False)
            if key is not None and self._store is not None and self.accelerator.is_main_process:
                self._store.write(key, unit, features)

    def _stored(self, key: Key | None, units: Sequence[Unit]) -> list[Tensor | None]:
        """The stored features of each unit, or None; the same on every process."""
        if key is None or self._store is None:
            return [None] * len(units)
        stored = [self._store.read(key, unit) for unit in units]
        if self.accelerator.num_processes > 1:  # another run may write or evict between one process's look and the next
            there = torch.tensor([features is not None for features in stored], device=self.accelerator.device)
            everywhere = self.accelerator.reduce(there.long(), "sum") == self.accelerator.num_processes
            stored = [features if all_have else None for features, all_have in zip(stored, everywhere, strict=True)]
        return stored

    def key(self, view: View, images: ImageSet) -> Key | None:
        """Everything the view's features of these images depend on; None if it cannot be determined."""
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
            **about_tuner(tuner, backbone),
        }
        return Key(parts, about)

    def _share(self, units: Sequence[Unit]) -> list[np.ndarray]:
        """The forward passes of ``units`` that this process computes."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        return [part for unit in units for part in unit][rank::processes]

    def _computed(self, viewer: Viewer, view: View, images: ImageSet, units: Sequence[Unit]) -> Iterator[Tensor]:
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
        was_training = viewer.training
        viewer.train(False)
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
        viewer.train(was_training)
        for _ in waiting:  # nothing is left, but the progress bar learns so only when asked
            pass

    def _seen(self, view: View, images: ImageSet, pixels: Tensor, indices: np.ndarray) -> Tensor:
        if isinstance(view, Queried):
            return view.see(pixels, self.get(view.backbone, images, indices).to(pixels.device)).float()
        return view(pixels).float()


def as_seen(view: View, images: ImageSet) -> tuple[View, ImageSet]:
    """A view and the images that it is asked about; for one of several backbones, it and the images it sees."""
    return (view.view, images.through(view.index)) if isinstance(view, Member) else (view, images)


class _Kept:
    """Features of one image set through one view.

    Args:
        images: The image set; it is kept alive here, so that its id stays unique.
        natural: Whether the features are computed in groups that depend only on the data.

    Attributes:
        groups: Positions of the images of each class and domain, in order; None if the request gives the groups.
        group: ParamGroup of each image, int64 [N].
        unit: Index into ``parts`` of each image's features, int64 [N]; −1 if there are none yet.
        asked: Images that have been requested, bool [N].
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
        features = torch.empty(len(indices), self.parts[0].shape[1])
        for unit, places in zip(used, np.split(order, starts[1:]), strict=True):
            features[torch.from_numpy(places)] = self.parts[unit][torch.from_numpy(self.row[indices[places]])]
        return features


def _recut(batches: Iterator[Tensor], sizes: Sequence[int]) -> Iterator[Tensor]:
    """The same images in batches of the given sizes, each in its own memory, because kernels may round by alignment."""
    rest: list[Tensor] = []
    for size in sizes:
        while sum(map(len, rest)) < size:
            rest.append(next(batches))
        together = torch.cat(rest)
        yield together if len(together) == size else together[:size].clone()
        rest = [together[size:]] if len(together) > size else []
