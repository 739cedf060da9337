"""Datasets that other libraries download and index: torchvision's and Hugging Face's, through timm's factory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cil.data.source import ImageSource
from cil.data.sources import from_reader
from cil.errors import DataError, nearest

TORCHVISION = (
    "cifar10",
    "cifar100",
    "mnist",
    "fashion_mnist",
    "kmnist",
    "qmnist",
    "imagenet",
    "inaturalist",
    "places365",
)
"""The torchvision sets that ``data.dataset: torch/<set>`` can name."""


def torchvision_set(name: str, root: Path | None, split: str, download: bool) -> ImageSource:
    """One split of a torchvision dataset, e.g. ``torch/cifar100``.

    Args:
        name: ``torch/`` and one of :data:`TORCHVISION`.
        root: Folder of the files; ``data`` by default.
        split: ``train`` or ``test``.
        download: Whether missing files are downloaded.

    Raises:
        DataError: The set is unknown, is not in the folder, or cannot be downloaded.
    """
    from timm.data import create_dataset

    short = name.split("/", 1)[1].lower()
    if short not in TORCHVISION:
        raise DataError(
            f"data.dataset: unknown torchvision set {name!r}{nearest(short, TORCHVISION)}; "
            f"known: torch/{', torch/'.join(TORCHVISION)}"
        )
    root = root or Path("data")
    try:
        dataset = create_dataset(
            name, root=str(root), split=split if split == "train" else "validation", download=download
        )
    except (
        Exception
    ) as error:  # torchvision raises RuntimeError, URLError, OSError … depending on the set and the network
        what = "could not be downloaded to" if download else "is not in (set data.download=true to fetch it)"
        raise DataError(f"{name} {what} {root}: {type(error).__name__}: {error}") from None
    labels = next((getattr(dataset, key) for key in ("targets", "labels", "_labels") if hasattr(dataset, key)), None)
    if labels is None and hasattr(dataset, "index"):  # iNaturalist
        labels = [target for target, _ in dataset.index]
    if labels is None:
        raise DataError(f"{name}: its labels cannot be read without decoding every image")
    names = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", None)
    labels = np.asarray(labels, dtype=np.int64)
    labels = labels[:, 0] if labels.ndim == 2 else labels  # QMNIST has more columns
    names = (
        [" / ".join(n) if isinstance(n, tuple) else str(n) for n in names]
        if names
        else [str(c) for c in range(int(labels.max()) + 1)]
    )
    if hasattr(dataset, "loader"):  # of sets of files; torchvision's own would decode them by other rules than ours
        dataset.loader = Path
    digest = hashlib.sha256(f"{name} {split}".encode() + labels.tobytes())
    pixels = getattr(dataset, "data", None)
    identify = None
    if pixels is not None:
        pixels = np.asarray(pixels)
        digest.update(np.ascontiguousarray(pixels).tobytes())
        identify = lambda i: f"{names[labels[i]]}\0".encode() + pixels[i].tobytes()  # noqa: E731  # None without pixels
    return ImageSource(
        lambda i: dataset[i][0],
        labels,
        _distinct(names),
        describe=lambda i: str(dataset[i][0]) if hasattr(dataset, "loader") else f"{name} {split} image {i}",
        fingerprint=digest.hexdigest(),
        stamp="" if pixels is not None else str(root.resolve()),
        identify=identify,
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """Class names in which equal ones are numbered; ImageNet has the bird and the machine ``crane``."""
    count = Counter(names)
    return [f"{name} (class {c})" if count[name] > 1 else name for c, name in enumerate(names)]


def huggingface_set(name: str, root: Path | None, split: str, options: dict[str, Any]) -> ImageSource:
    """One split of a Hugging Face dataset, e.g. ``hfds/uoft-cs/cifar100``; needs the extra ``hf``.

    Args:
        name: ``hfds/`` and the dataset's name on the Hub.
        root: Cache folder; None for the library's default.
        split: The dataset's own name of the split.
        options: ``input_key`` and ``target_key``: the columns of images and labels.

    Raises:
        DataError: The package ``datasets`` is missing, the dataset, split or a column cannot be loaded, the column of
            images holds none, or a row has no class.
    """
    from timm.data import create_dataset

    try:
        import datasets  # noqa: F401
    except ImportError:
        raise DataError(f"{name} needs the package datasets: pip install 'cil[hf]'") from None
    title, key = f"{name}, split {split}", options["input_key"]
    try:
        dataset = create_dataset(name, root=str(root) if root else None, split=split, **options)
    except Exception as error:  # many types: no network, unknown dataset, split or column
        columns = getattr(error, "table_column_names", [])  # of old versions' CastError for a column that is missing
        if columns and key not in columns:
            raise _no_images(title, key, columns) from None
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if "cast" in reason.lower():
            reason += f"; column {key!r} does not hold images, set data.image_key"
        raise DataError(f"{title}: {reason}") from None
    reader = dataset.reader
    labels = _targets(reader, title, options["target_key"])
    if not any(_is_image(reader, row) for row in range(min(16, len(labels)))):
        raise _no_images(title, key, reader.dataset.column_names)
    by_index = {v: k for k, v in reader.class_to_idx.items()}
    names = [str(by_index.get(c, c)) for c in range(int(labels.max()) + 1)]
    digest = hashlib.sha256(
        f"{name} {split} {getattr(reader.dataset, '_fingerprint', '')}".encode()
        + np.asarray(labels, np.int64).tobytes()
    )
    return from_reader(
        reader, labels, names, describe=lambda i: f"{name} {split} image {i}", fingerprint=digest.hexdigest()
    )


def _no_images(title: str, key: str, columns: Sequence[str]) -> DataError:
    others = ", ".join(column for column in columns if column != key)
    return DataError(f"{title}: column {key!r} holds no images; set data.image_key to another column: {others}")


def _targets(reader: Any, title: str, key: str) -> np.ndarray:
    """The class of every row, int64 [N], from the column ``key`` of a Hugging Face dataset."""
    try:
        # timm before 1.0.31 has no iterator that leaves out the images
        targets = list(reader.iter_targets() if hasattr(reader, "iter_targets") else reader.dataset[key])
    except Exception as error:  # the type depends on what the column lacks
        others = [column for column in reader.dataset.column_names if column not in (key, reader.image_key)]
        raise DataError(
            f"{title}: labels cannot be read from column {key!r} ({type(error).__name__}); set data.label_key to "
            f"another column: {', '.join(others)}"
        ) from None
    if not targets:
        raise DataError(f"{title} has no rows")
    without = [row for row, target in enumerate(targets) if target is None or target == -1]
    if without:
        raise DataError(
            f"{title}: {len(without)} of {len(targets)} rows have no label (row {without[0]}: {targets[without[0]]}); "
            "set data.train or data.test to a split with labels"
        )
    other = [target for target in targets if not isinstance(target, int) or isinstance(target, bool)]
    if other:
        raise DataError(
            f"{title}: column {key!r} holds {type(other[0]).__name__} ({str(other[0])[:40]}); labels must be a "
            "ClassLabel or whole numbers from 0; set data.label_key"
        )
    labels = np.asarray(targets, dtype=np.int64)
    if labels.min() < 0 or labels.max() >= len(labels):
        raise DataError(
            f"{title}: labels in column {key!r} are from {labels.min()} to {labels.max()} for {len(labels)} rows; "
            "classes are numbered from 0, and each has at least one image"
        )
    return labels


def _is_image(reader: Any, row: int) -> bool:
    """Whether a row of a Hugging Face dataset holds a file of a type that PIL reads."""
    try:
        file, *_ = reader[row]
        with file, Image.open(file):
            return True
    except Exception:  # timm's reader asserts, and indexes what may be None; PIL raises any type
        return False
