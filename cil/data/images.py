"""Pictures as batches of tensors: decoded once into memory where they fit, streamed by worker processes where not."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from cil.config import DataConfig, HardwareConfig, TransformConfig
from cil.data.held import Held
from cil.data.opening import open_source
from cil.data.sources import UNREADABLE, ImageSource, rank_in_class
from cil.data.transforms import Transforms
from cil.errors import DataError
from cil.randomness import isolated, seed_everything
from cil.store import FeatureStore, Key

if TYPE_CHECKING:
    from cil.backbone import Backbone

GIB = 2**30
VERSIONS = {package: version(package) for package in ("timm", "pillow")}
"""Of what turns files into pixels."""
Item = tuple[int, int | None]
"""A picture's position, and the seed of its augmentation or None."""


class ImageSet:
    """A source seen through one backbone's transforms.

    Args:
        source: Labelled pictures.
        transforms: Test and training transform.
        in_memory: Decoding is cheap because the pictures lie in memory; otherwise batches come from worker processes.
            By default what the source says, if it is a :class:`Held` one.
        memory_bytes: Keep transformed test pictures (uint8) if all of them fit.
        workers: Worker processes when streaming, and where a GPU would wait for augmented pictures.
        title: What to call the images where what was made of them is listed.
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
        shape = (len(source), 3, transforms.size, transforms.size)
        keep = float(np.prod(shape)) <= memory_bytes
        self._pixels = torch.empty(shape, dtype=torch.uint8) if keep else None  # pages are touched as they fill
        self._ready = np.zeros(len(source), dtype=bool)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def in_memory(self) -> bool:
        if self._in_memory is None:
            return self.source.fits if isinstance(self.source, Held) else True
        return self._in_memory

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these images, as the test transform shows them, from others: part of a feature store's key."""
        card = {key: value for key, value in self.transforms.card.items() if key != "augment"}
        return {"data": f"{self.source.fingerprint} {self.source.stamp}", "transform": card, **VERSIONS}

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
            raise ValueError("augmented batches need a generator: they may not draw from the global random state")
        order, seeds = np.arange(len(indices)), None
        if generator is not None:
            order = torch.randperm(len(indices), generator=generator).numpy()
            if augment and self.transforms.augment is not None:
                seeds = torch.randint(2**62, (len(indices),), generator=generator).numpy()
        rank, processes = part
        chunks = [order[start : start + batch_size][rank::processes] for start in range(0, len(order), batch_size)]
        filled = [chunk for chunk in chunks if len(chunk)]
        gpu = torch.device(device).type == "cuda"
        wanted = [indices[chunk] for chunk in filled]
        if seeds is None:
            pixels = self._plain(wanted, gpu)
        else:  # each picture has its own seed, so workers and batches change nothing
            pixels = self._load([_items(indices[chunk], seeds[chunk]) for chunk in filled], gpu)
        nothing = torch.empty(0, 3, self.transforms.size, self.transforms.size, dtype=torch.uint8)
        for chunk in chunks:
            batch, targets = next(pixels) if len(chunk) else nothing, torch.as_tensor(labels[chunk])
            if gpu:  # from pinned memory alone does a copy run beside what the device computes
                batch, targets = batch.pin_memory(), targets.pin_memory()
            yield (
                self.transforms.normalize(batch.to(device, non_blocking=True)),
                targets.to(device, non_blocking=True),
            )

    def _plain(self, wanted: list[np.ndarray], gpu: bool) -> Iterator[torch.Tensor]:
        """Test-transformed uint8 batches, each picture transformed once if memory allows."""
        if self._pixels is None:
            yield from self._load([_items(part) for part in wanted], gpu)
            return
        # batch by batch: what comes later is decoded, by worker processes, while the earlier is computed on
        ready = self._ready.copy()
        missing = []
        for part in wanted:
            missing.append(np.unique(part[~ready[part]]))
            ready[part] = True
        loaded = self._load([_items(part) for part in missing if len(part)], gpu)
        for part, lacking in zip(wanted, missing, strict=True):
            if len(lacking):
                self._pixels[torch.from_numpy(lacking)] = next(loaded)
                self._ready[lacking] = True
            yield self._pixels[torch.from_numpy(part)]

    def _load(self, batches: list[list[Item]], gpu: bool) -> Iterator[torch.Tensor]:
        reader = _Pictures(self.source, self.transforms)
        # starting processes takes as long as these many pictures; on the CPU they would only take turns with the model
        few = 64 if not self.in_memory else 512 if gpu else math.inf
        if not self.workers or sum(map(len, batches)) < few:
            for batch in batches:
                with isolated():
                    loaded = [reader[item] for item in batch]
                yield torch.from_numpy(np.stack(loaded))
            return
        loader: DataLoader[Any] = DataLoader(
            _Worker(self.source, self.transforms),
            batch_sampler=batches,
            num_workers=min(self.workers, len(batches)),
            collate_fn=_stack,
            generator=torch.Generator().manual_seed(0),  # otherwise the loader draws a seed from the global state
            pin_memory=gpu,
        )
        for loaded in loader:
            if isinstance(loaded, DataError):
                raise loaded
            yield loaded


def _items(indices: np.ndarray, seeds: np.ndarray | None = None) -> list[Item]:
    if seeds is None:
        return [(index, None) for index in indices.tolist()]
    return list(zip(indices.tolist(), seeds.tolist(), strict=True))


class _Pictures(Dataset[np.ndarray]):
    """(position, augmentation seed or None) → uint8 [3, S, S]. Seeds global state: run it isolated or in a worker."""

    def __init__(self, source: ImageSource, transforms: Transforms) -> None:
        self.source, self.transforms = source, transforms

    def __getitem__(self, item: Item) -> np.ndarray:
        index, seed = item
        picture = self.source.read(index)
        if seed is None or self.transforms.augment is None:
            return np.asarray(self.transforms.evaluate(picture))
        seed_everything(seed)
        return np.asarray(self.transforms.augment(picture))


class _Worker(_Pictures):
    """The same in a worker process: an unreadable file comes back as a value, or it would arrive as a traceback."""

    def __getitem__(self, item: Item) -> np.ndarray | DataError:  # type: ignore[override]
        try:
            return super().__getitem__(item)
        except DataError as error:
            return error


def _stack(pictures: list[np.ndarray | DataError]) -> torch.Tensor | DataError:
    broken = [p for p in pictures if isinstance(p, DataError)]
    return broken[0] if broken else torch.from_numpy(np.stack(pictures))  # type: ignore[arg-type]


def subset(source: ImageSource, keep: np.ndarray, extra: str) -> ImageSource:
    """The pictures at positions ``keep``; ``extra`` goes into the fingerprint."""
    return ImageSource(
        lambda i: source._read(int(keep[i])),
        source.labels[keep],
        source.class_names,
        describe=lambda i: source.describe(int(keep[i])),
        fingerprint=hashlib.sha256(f"{source.fingerprint} {extra}".encode() + keep.tobytes()).hexdigest(),
        domains=None if source.domains is None else source.domains[keep],
        stamp=source.stamp,
    )


def training_part(source: ImageSource, config: DataConfig) -> ImageSource:
    """The training pictures a configuration uses: all, or the first ``per_class`` of each class."""
    if not config.per_class:
        return source
    first = np.flatnonzero(rank_in_class(source.labels) < config.per_class)
    return subset(source, first, f"first {config.per_class}")


class LoadedSplit:
    """A split ready for any backbone: its source, where it lies, and what was skipped.

    Args:
        config: The data.
        split: ``train`` or ``test``.
        hardware: Memory and workers.
        store: Remembers which files are not readable, where these are to be skipped.
    """

    def __init__(
        self, config: DataConfig, split: str, hardware: HardwareConfig, store: FeatureStore | None = None
    ) -> None:
        self._memory, self._workers = hardware.memory_gib * GIB, hardware.workers
        source = open_source(config, split)
        if split == "train":
            source = training_part(source, config)
        given = (config.train if split == "train" else config.test) or split
        self.title = str(config.root / given) if config.root else f"{config.dataset} {given}"
        self.source, self.skipped = Held(source, self._memory, hardware.workers), []
        if config.on_error == "skip":
            broken = self._unreadable(source, store)
            self.skipped = [source.describe(i) for i in broken]
            if broken:
                good = np.setdiff1d(np.arange(len(source)), broken)
                self.source = self.source.only(good, subset(source, good, "readable"))

    def _unreadable(self, source: ImageSource, store: FeatureStore | None) -> list[int]:
        key = Key({"unreadable": f"{source.fingerprint} {source.stamp}", **VERSIONS}, {"data_name": self.title})
        known = store.recall(key) if store is not None else None
        if known is None:
            known = self.source.unreadable()
            if store is not None:
                store.remember(key, known)
        return known

    @property
    def in_memory(self) -> bool:
        """Whether the decoded pictures fit in memory."""
        return self.source.fits

    def images(self, transforms: Transforms) -> ImageSet:
        return ImageSet(self.source, transforms, memory_bytes=self._memory, workers=self._workers, title=self.title)


def load_images(
    data: DataConfig | ImageSource | str, split: str, backbone: Backbone, transform: TransformConfig | None = None
) -> ImageSet:
    """One split as a backbone sees it; two of them and the rules of the tasks make a ``Stream``.

    Args:
        data: A dataset as ``data.dataset`` names it, the full configuration, or a source of one's own.
        split: ``train`` or ``test``.
        backbone: Whose transforms are used.
        transform: Overrides of them.

    Raises:
        DataError: See :func:`open_source`; a file that is no readable image.
    """
    transforms = Transforms(backbone.data_config, transform)
    if isinstance(data, ImageSource):
        return ImageSet(data, transforms)
    config = DataConfig(dataset=data) if isinstance(data, str) else data
    return LoadedSplit(config, split, HardwareConfig()).images(transforms)


def read_image(path: Path, transforms: Transforms) -> torch.Tensor:
    """One picture from disk as the backbone wants it, float [1, 3, S, S].

    Raises:
        DataError: No such file, or not an image.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        picture = Image.open(path).convert("RGB")
    except UNREADABLE as error:
        raise DataError(f"{path}: not a readable image ({type(error).__name__})") from None
    with isolated():
        pixels = torch.from_numpy(np.asarray(transforms.evaluate(picture)))
    return transforms.normalize(pixels[None])
