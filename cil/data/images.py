"""Images as batches of tensors, decoded once if they fit in memory and otherwise streamed by worker processes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from cil.config import DataConfig, HardwareConfig, TransformConfig
from cil.data.decoded import DecodedSource
from cil.data.folder import as_text
from cil.data.opening import open_source
from cil.data.packed import PackedTransforms, make_transforms
from cil.data.pixels import VERSION as PIXELS
from cil.data.reading import ImageReader, Item, WorkerReader, stack
from cil.data.reading import read_image as read_image
from cil.data.source import ADVICE, ImageSource
from cil.data.sources import rank_in_class
from cil.data.transforms import Transforms
from cil.errors import CilError, DataError
from cil.store import FeatureStore, Key
from cil.utils.randomness import isolated

if TYPE_CHECKING:
    from cil.backbone import Backbone

GIB = 2**30
VERSIONS = {**{package: version(package) for package in ("timm", "pillow")}, "pixels": str(PIXELS)}
"""Versions of what turns files into pixels: two packages and :mod:`cil.data.pixels`."""


class ImageSet:
    """An image source with a backbone's transforms applied.

    Args:
        source: Labelled images.
        transforms: Test and training transform.
        in_memory: True if decoding is cheap because the images are in memory; if False, worker processes load the
            batches. By default ``fits`` of a :class:`~cil.data.decoded.DecodedSource`, and True for other sources.
        memory_bytes: Transformed test images (uint8) are kept if all of them fit into this many bytes.
        workers: Worker processes for streaming, and for augmentation that a GPU would otherwise wait for.
        title: Name of the images in listings of the feature store.
    """

    def __init__(
        self,
        source: ImageSource,
        transforms: Transforms,
        *,
        in_memory: bool | None = None,
        memory_bytes: float = 4 * GIB,
        workers: int = 2,
        title: str = "",
    ) -> None:
        self.source, self.transforms, self.workers, self.title = source, transforms, workers, title
        self._in_memory = in_memory
        self.labels, self.class_names, self.domains = source.labels, source.class_names, source.domains
        self._memory, self._members = memory_bytes, dict[int, ImageSet]()
        shape = (len(source), *transforms.shape)
        keep = float(np.prod(shape)) <= memory_bytes
        self._pixels = (
            torch.empty(shape, dtype=torch.uint8) if keep else None
        )  # the operating system provides pages as they are written
        self._ready = np.zeros(len(source), dtype=bool)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def in_memory(self) -> bool:
        if self._in_memory is None:
            return self.source.fits if isinstance(self.source, DecodedSource) else True
        return self._in_memory

    @property
    def repeated_bytes(self) -> float:
        """Bytes for what is computed of the training images and is the same in every pass; 0 with augmentation."""
        return self._memory if self.transforms.augment is None else 0.0

    @property
    def identity(self) -> dict[str, Any]:
        """Identifies the images after the test transform; part of the feature store's key."""
        card = {key: value for key, value in self.transforms.card.items() if key != "augment"}
        return {"data": f"{self.source.fingerprint} {self.source.stamp}", "transform": card, **VERSIONS}

    def through(self, member: int) -> ImageSet:
        """The images as one of several backbones sees them, with its own transforms; always the same object.

        Args:
            member: The place of the backbone; the transforms of this set are
                :class:`~cil.data.packed.PackedTransforms`.
        """
        if member not in self._members:
            assert isinstance(self.transforms, PackedTransforms)  # only several backbones have members
            self._members[member] = ImageSet(
                self.source,
                self.transforms.members[member],
                in_memory=self._in_memory,
                memory_bytes=self._memory,
                workers=self.workers,
                title=self.title,
            )
        return self._members[member]

    def batches(
        self,
        indices: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(normalised images float [B, 3, S, S], labels int64 [B]) over ``indices``; see ``TaskData.batches``."""
        if augment and generator is None:
            raise ValueError("augmented batches need a generator: they must not draw from the global random state")
        order, seeds = np.arange(len(indices)), None
        if generator is not None:
            order = torch.randperm(len(indices), generator=generator).numpy()
            if augment and self.transforms.augment is not None:
                seeds = torch.randint(2**62, (len(indices),), generator=generator).numpy()
        rank, processes = part
        chunks = [order[start : start + batch_size][rank::processes] for start in range(0, len(order), batch_size)]
        filled = [chunk for chunk in chunks if len(chunk)]
        gpu = torch.device(device).type == "cuda"
        positions = [indices[chunk] for chunk in filled]
        if seeds is None:
            pixels = self._test_pixels(positions, gpu)
        else:  # each image has its own seed, so the number of workers and the batch size change nothing
            pixels = self.load([_items(indices[chunk], seeds[chunk]) for chunk in filled], gpu)
        nothing = torch.empty(0, *self.transforms.shape, dtype=torch.uint8)
        for chunk in chunks:
            batch, targets = next(pixels) if len(chunk) else nothing, torch.as_tensor(labels[chunk])
            if gpu:  # only a copy from pinned memory runs in parallel with the computation on the device
                batch, targets = batch.pin_memory(), targets.pin_memory()
            yield (
                self.transforms.normalize(batch.to(device, non_blocking=True)),
                targets.to(device, non_blocking=True),
            )

    def _test_pixels(self, batches: list[np.ndarray], gpu: bool) -> Iterator[torch.Tensor]:
        """Batches under the test transform, uint8 [B, 3, S, S]; each image is transformed once if memory allows."""
        if self._pixels is None:
            yield from self.load([_items(batch) for batch in batches], gpu)
            return
        # batch by batch, so that worker processes decode later batches while the model computes on earlier ones
        ready = self._ready.copy()
        missing = []
        for batch in batches:
            missing.append(np.unique(batch[~ready[batch]]))
            ready[batch] = True
        loaded = self.load([_items(positions) for positions in missing if len(positions)], gpu)
        for batch, positions in zip(batches, missing, strict=True):
            if len(positions):
                self._pixels[torch.from_numpy(positions)] = next(loaded)
                self._ready[positions] = True
            yield self._pixels[torch.from_numpy(batch)]

    def load(self, batches: list[list[Item]], gpu: bool) -> Iterator[torch.Tensor]:
        """Batches of transformed images, uint8 [B, 3, S, S]; worker processes load many images, pinned for a GPU."""
        reader = ImageReader(self.source, self.transforms)
        # starting processes takes as long as loading this many images; on a CPU, workers in memory only slow the model
        few = 64 if not self.in_memory else 512 if gpu else math.inf
        if not self.workers or sum(map(len, batches)) < few:
            for batch in batches:
                with isolated():
                    images = [reader[item] for item in batch]
                yield torch.from_numpy(np.stack(images))
            return
        loader: DataLoader[Any] = DataLoader(
            WorkerReader(self.source, self.transforms),
            batch_sampler=batches,
            num_workers=min(self.workers, len(batches)),
            collate_fn=stack,
            generator=torch.Generator().manual_seed(0),  # without it the loader draws a seed from the global state
            pin_memory=gpu,
        )
        for pixels in loader:
            if isinstance(pixels, CilError):
                raise pixels
            yield pixels


def _items(indices: np.ndarray, seeds: np.ndarray | None = None) -> list[Item]:
    if seeds is None:
        return [(index, None) for index in indices.tolist()]
    return list(zip(indices.tolist(), seeds.tolist(), strict=True))


def subset(source: ImageSource, keep: np.ndarray, extra: str) -> ImageSource:
    """The images at positions ``keep`` of a source; ``extra`` goes into the fingerprint."""
    identify = source.identify
    return ImageSource(
        lambda i: source._read(int(keep[i])),
        source.labels[keep],
        source.class_names,
        describe=lambda i: source.describe(int(keep[i])),
        fingerprint=hashlib.sha256(f"{source.fingerprint} {extra}".encode() + keep.tobytes()).hexdigest(),
        domains=None if source.domains is None else source.domains[keep],
        stamp=source.stamp,
        max_pixels=source.max_pixels,
        identify=None if identify is None else lambda i: identify(int(keep[i])),
    )


def training_part(source: ImageSource, config: DataConfig) -> ImageSource:
    """The training images a configuration uses: all, or the first ``per_class`` of each class."""
    if not config.per_class:
        return source
    first = np.flatnonzero(rank_in_class(source.labels) < config.per_class)
    return subset(source, first, f"first {config.per_class}")


class LoadedSplit:
    """A split ready for any backbone: its source, its title, and the files that were skipped.

    Args:
        config: The section ``data`` of a configuration.
        split: ``train`` or ``test``.
        hardware: Memory and number of workers.
        store: Remembers which files are not readable, if ``data.on_error`` is ``skip``.
        source: The images, if they are open already.

    Attributes:
        source: The readable images.
        skipped: Descriptions of the unreadable ones.
        findings: What its folders or archives hold beside the images.
        title: Path or name of the split, for listings.
    """

    def __init__(
        self,
        config: DataConfig,
        split: str,
        hardware: HardwareConfig,
        store: FeatureStore | None = None,
        source: ImageSource | None = None,
    ) -> None:
        self._memory, self._workers = hardware.memory_gib * GIB, hardware.workers
        source = open_source(config, split) if source is None else source
        self.findings = source.findings
        if split == "train":
            source = training_part(source, config)
        name = (config.train if split == "train" else config.test) or split
        self.title = as_text(config.root / name) if config.root else f"{config.dataset} {name}"
        self.source, self.skipped = DecodedSource(source, self._memory, hardware.workers), []
        if config.on_error == "skip":
            broken = self._unreadable(source, store)
            self.skipped = [source.describe(i) for i in broken]
            if len(broken) == len(source):  # the reason says more than that the first class has no images
                try:
                    source.read(0)
                except DataError as error:
                    reason = str(error).removesuffix(ADVICE)
                    raise DataError(f"{self.title}: none of the {len(source)} images can be read: {reason}") from None
            if broken:
                good = np.setdiff1d(np.arange(len(source)), broken)
                self.source = self.source.restricted_to(good, subset(source, good, "readable"))

    def _unreadable(self, source: ImageSource, store: FeatureStore | None) -> list[int]:
        what = {"unreadable": f"{source.fingerprint} {source.stamp}", "max_pixels": source.max_pixels, **VERSIONS}
        key = Key(what, {"data_name": self.title})
        positions = store.recall(key) if store is not None else None
        if positions is None:
            positions = self.source.unreadable()
            if store is not None:
                store.remember(key, positions)
        return positions

    @property
    def facts(self) -> dict[str, Any]:
        """The split as ``metrics.json`` records it."""
        found = [finding.card() for finding in self.findings]
        facts = {"sha256": self.source.fingerprint, "images": len(self.source), "skipped": self.skipped}
        return {**facts, "folders": found} if found else facts

    def lines(self) -> list[str]:
        """What a user should see about the split's folders, in one line each."""
        return [line for finding in self.findings for line in finding.lines()]

    @property
    def in_memory(self) -> bool:
        """Whether the decoded images fit in memory."""
        return self.source.fits

    def images(self, transforms: Transforms, source: ImageSource | None = None) -> ImageSet:
        """The split, or ``source`` that is made of its images, with a backbone's transforms applied."""
        return ImageSet(
            self.source if source is None else source,
            transforms,
            in_memory=None if source is None else self.in_memory,
            memory_bytes=self._memory,
            workers=self._workers,
            title=self.title,
        )


def load_images(
    data: DataConfig | ImageSource | str, split: str, backbone: Backbone, transform: TransformConfig | None = None
) -> ImageSet:
    """One split with a backbone's transforms applied; two splits and a task protocol make a ``Stream``.

    Args:
        data: A dataset as ``data.dataset`` names it, the full section ``data``, or your own image source.
        split: ``train`` or ``test``.
        backbone: The backbone whose transforms are used.
        transform: Overrides of these transforms.

    Raises:
        DataError: ``data`` is something else, or as :func:`open_source` raises it.
    """
    if not isinstance(data, DataConfig | ImageSource | str):
        raise DataError(
            f"data is a {type(data).__name__}; allowed: the name of a dataset, a DataConfig, or an ImageSource "
            "(cil.data.sources.from_arrays makes one)"
        )
    transforms = make_transforms(backbone.data_config, transform)
    if isinstance(data, ImageSource):
        return ImageSet(data, transforms)
    config = DataConfig(dataset=data) if isinstance(data, str) else data
    return LoadedSplit(config, split, HardwareConfig()).images(transforms)
