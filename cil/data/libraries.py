"""Datasets that other libraries download and index: torchvision's and Hugging Face's, through timm's factory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from cil.data.sources import ImageSource, from_reader
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
    digest = hashlib.sha256(f"{name} {split}".encode() + labels.tobytes())
    pixels = getattr(dataset, "data", None)
    if pixels is not None:
        digest.update(np.ascontiguousarray(np.asarray(pixels)).tobytes())
    return ImageSource(
        lambda i: dataset[i][0].convert("RGB"),
        labels,
        names,
        describe=lambda i: f"{name} {split} image {i}",
        fingerprint=digest.hexdigest(),
        stamp="" if pixels is not None else str(root.resolve()),
    )


def huggingface_set(name: str, root: Path | None, split: str, options: dict[str, Any]) -> ImageSource:
    """One split of a Hugging Face dataset, e.g. ``hfds/uoft-cs/cifar100``; needs the extra ``hf``.

    Args:
        name: ``hfds/`` and the dataset's name on the Hub.
        root: Cache folder; None for the library's default.
        split: The dataset's own name of the split.
        options: ``input_key`` and ``target_key``: the columns of images and labels.

    Raises:
        DataError: The package ``datasets`` is missing, or the dataset, split or column cannot be loaded.
    """
    from timm.data import create_dataset

    try:
        import datasets  # noqa: F401
    except ImportError:
        raise DataError(f"{name} needs the package datasets: pip install 'cil[hf]'") from None
    try:
        dataset = create_dataset(name, root=str(root) if root else None, split=split, **options)
    except Exception as error:  # many types: no network, unknown dataset, split or column
        raise DataError(f"{name}, split {split}: {type(error).__name__}: {str(error).splitlines()[0]}") from None
    reader = dataset.reader
    labels = list(reader.iter_targets())
    by_index = {v: k for k, v in reader.class_to_idx.items()}
    names = [str(by_index.get(c, c)) for c in range(max(labels) + 1)]
    digest = hashlib.sha256(
        f"{name} {split} {getattr(reader.dataset, '_fingerprint', '')}".encode()
        + np.asarray(labels, np.int64).tobytes()
    )
    return from_reader(
        reader, labels, names, describe=lambda i: f"{name} {split} image {i}", fingerprint=digest.hexdigest()
    )
