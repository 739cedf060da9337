"""Labelled pictures by dataset name: folders, tar files, torchvision, Hugging Face, scikit-learn's digits, arrays.

Every source answers the same four questions: how many, which label, which bytes, and which fingerprint. Labels are the
dataset's own class positions here; a stream turns them into its order of appearance.

timm's factory finds and indexes the files. Its ``ImageDataset`` is not used to read them: on a broken file it silently
returns the *next* image, and its tar reader is not safe across forked workers. We read through its index instead.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from cil.errors import DataError, nearest

SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "validation", "eval")}
UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError)
"""What PIL raises on files that are no images, or broken ones; SyntaxError on PNG chunks."""
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


class ImageSource:
    """Labelled pictures, decoded one at a time.

    Args:
        read: Position → RGB picture. May raise OSError or UnidentifiedImageError; must be thread-safe.
        labels: Class position of every picture, int64 [N].
        class_names: Names in the order of the class positions.
        describe: Position → what to call the picture in a message (its path where it has one).
        fingerprint: Hex digest that changes when pictures or labels do.
        domains: Domain of every picture, int64 [N], for domain-incremental streams.
        stamp: Changes when the files may have changed where the fingerprint, made from names and sizes, would not show
            it. It is of this machine and takes no part in a run's identity.
    """

    def __init__(
        self,
        read: Callable[[int], Image.Image],
        labels: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        *,
        describe: Callable[[int], str],
        fingerprint: str,
        domains: np.ndarray | None = None,
        stamp: str = "",
    ) -> None:
        self._read, self.describe, self.fingerprint, self.domains = read, describe, fingerprint, domains
        self.stamp = stamp
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = tuple(str(name) for name in class_names)
        empty = sorted(set(range(len(self.class_names))) - set(self.labels.tolist()))
        if empty:
            raise DataError(f"class {self.class_names[empty[0]]!r} has no images; add some or remove the class")

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        """The RGB picture at a position.

        Raises:
            DataError: The file is truncated or not an image; the message names it.
        """
        try:
            return self._read(index)
        except UNREADABLE as error:
            raise DataError(
                f"{self.describe(index)}: not a readable image ({type(error).__name__}); "
                "repair or remove it, or set data.on_error=skip"
            ) from None

    def read_or_none(self, index: int) -> Image.Image | None:
        """The picture at a position, or None where :meth:`read` would raise."""
        try:
            return self.read(index)
        except DataError:
            return None


def from_arrays(images: np.ndarray, labels: Sequence[int] | np.ndarray, class_names: Sequence[str]) -> ImageSource:
    """A source from uint8 arrays.

    Args:
        images: uint8 [N, H, W] (grey) or [N, H, W, 3] (RGB).
        labels: Class positions, [N].
        class_names: One name a class.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels):
        raise DataError(
            "images must be uint8 [N, H, W] or [N, H, W, 3] with N labels; "
            f"got {images.dtype} {images.shape} and {len(labels)} labels"
        )
    digest = hashlib.sha256(
        images.tobytes() + np.asarray(labels, np.int64).tobytes() + repr(list(class_names)).encode()
    )
    return ImageSource(
        lambda i: Image.fromarray(images[i]).convert("RGB"),
        labels,
        class_names,
        describe=lambda i: f"image {i}",
        fingerprint=digest.hexdigest(),
    )


def rank_in_class(labels: np.ndarray) -> np.ndarray:
    """How many items of the same class come before each item, int64 [N]."""
    rank = np.zeros(len(labels), dtype=np.int64)
    for c in np.unique(labels):
        rank[labels == c] = np.arange((labels == c).sum())
    return rank


def digits(split: str) -> ImageSource:
    """scikit-learn's 1,797 handwritten digits (8×8, ten classes), the embedded dataset.

    It comes without a split: in each class every fourth image is a test image.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    members = np.flatnonzero((rank_in_class(labels) % 4 == 3) == (split == "test"))
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return from_arrays(images[members], labels[members], names)


def torchvision_set(name: str, root: Path | None, split: str, download: bool) -> ImageSource:
    """A torchvision dataset through timm's factory, e.g. ``torch/cifar100``."""
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
    labels = labels[:, 0] if labels.ndim == 2 else labels  # QMNIST keeps more columns
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
    """A Hugging Face dataset through timm's factory, e.g. ``hfds/uoft-cs/cifar100`` (extra ``hf``)."""
    from timm.data import create_dataset

    try:
        import datasets  # noqa: F401
    except ImportError:
        raise DataError(f"{name} needs the package datasets: pip install 'cil[hf]'") from None
    try:
        dataset = create_dataset(name, root=str(root) if root else None, split=split, **options)
    except Exception as error:  # many kinds: no network, no such set, no such split, no such column
        raise DataError(f"{name}, split {split}: {type(error).__name__}: {str(error).splitlines()[0]}") from None
    reader = dataset.reader
    labels = list(reader.iter_targets())
    by_index = {v: k for k, v in reader.class_to_idx.items()}
    names = [str(by_index.get(c, c)) for c in range(max(labels) + 1)]
    digest = hashlib.sha256(
        f"{name} {split} {getattr(reader.dataset, '_fingerprint', '')}".encode()
        + np.asarray(labels, np.int64).tobytes()
    )
    return _from_reader(
        reader, labels, names, describe=lambda i: f"{name} {split} image {i}", fingerprint=digest.hexdigest()
    )


def folder(path: Path) -> ImageSource:
    """One split from a folder of class folders, or from a tar file laid out the same way.

    Raises:
        DataError: Nothing there, no images, or an empty class folder (named).
    """
    from timm.data.readers import create_reader

    if not path.exists():
        raise DataError(f"{path}: no such folder or tar file")
    is_tar = path.is_file()
    facts = [path.stat()] if is_tar else []
    try:
        reader: Any
        if is_tar:
            reader, listed = _tar(path, facts[0].st_mtime_ns, facts[0].st_size)
        else:
            reader = create_reader("", str(path))
    except Exception as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from None
    if is_tar:
        samples = [
            (info.name, info.size, target) for (info, _, _), target in zip(reader.samples, reader.targets, strict=True)
        ]
        class_to_idx = reader.class_name_to_idx
    else:
        facts = [Path(file).stat() for file, _ in reader.samples]
        samples = [
            (str(Path(file).relative_to(path)), fact.st_size, target)
            for (file, target), fact in zip(reader.samples, facts, strict=True)
        ]
        class_to_idx = reader.class_to_idx
        listed = {child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")}
    if not samples or (len(class_to_idx) < 2 and not listed):
        raise DataError(
            f"{path}: found {len(samples)} images in {len(class_to_idx)} class folders; expected <class>/<image>"
        )
    held = {part for name, _, _ in samples for part in Path(name).parts[:-1]}
    empty = sorted(listed - held)
    if empty:
        raise DataError(f"{path}: class folder {empty[0]!r} holds no images; fill or remove it")
    digest = hashlib.sha256()
    for name, size, target in samples:
        digest.update(f"{name}\0{size}\0{target}\n".encode())
    names = [name for name, _ in sorted(class_to_idx.items(), key=lambda item: item[1])]
    return _from_reader(
        reader,
        [target for _, _, target in samples],
        names,
        describe=lambda i: f"{path}: {samples[i][0]}" if is_tar else str(path / samples[i][0]),
        fingerprint=digest.hexdigest(),
        stamp=hashlib.sha256(np.array([fact.st_mtime_ns for fact in facts]).tobytes()).hexdigest(),
    )


@lru_cache(maxsize=4)
def _tar(path: Path, mtime_ns: int, size: int) -> tuple[Any, set[str]]:
    """timm's reader of a tar file in the state these two tell, and the class folders it lists as members of their own.

    A second run in this process does not read through the whole file again.
    """
    import tarfile

    from timm.data.readers import create_reader

    # The file is opened anew for each read (one cheap header): a kept file position would be shared by threads and by
    # forked workers. And without cache_tarinfo=False timm reads and writes a pickle beside large tars.
    options: dict[str, Any] = {"cache_tarfiles": False, "cache_tarinfo": False}
    reader = create_reader("", str(path), **options)
    with tarfile.open(path) as tar:
        listed = {Path(m.name).name for m in tar.getmembers() if m.isdir() and Path(m.name).name not in ("", ".")}
    return reader, listed


def _from_reader(reader: Any, labels: Sequence[int], names: Sequence[str], **facts: Any) -> ImageSource:
    def read(index: int) -> Image.Image:
        file, *_ = reader[index]
        with file:
            return Image.open(io.BytesIO(file.read())).convert("RGB")

    return ImageSource(read, labels, names, **facts)


def combine_domains(parts: Sequence[ImageSource]) -> ImageSource:
    """Sources of the same classes, one a domain, as one source that knows each picture's domain."""
    names = parts[0].class_names
    for part in parts[1:]:
        if set(part.class_names) != set(names):
            odd = sorted(set(part.class_names) ^ set(names))
            raise DataError(f"domains must have the same classes; {odd[:5]} are not in all of them")
    labels = [np.array([names.index(n) for n in p.class_names], dtype=np.int64)[p.labels] for p in parts]
    starts = np.cumsum([0, *[len(p) for p in parts]])

    def locate(index: int) -> tuple[ImageSource, int]:
        d = int(np.searchsorted(starts, index, side="right")) - 1
        return parts[d], index - int(starts[d])

    def read(index: int) -> Image.Image:
        part, inner = locate(index)
        return part._read(inner)

    def describe(index: int) -> str:
        part, inner = locate(index)
        return part.describe(inner)

    return ImageSource(
        read,
        np.concatenate(labels),
        names,
        describe=describe,
        fingerprint=hashlib.sha256("".join(p.fingerprint for p in parts).encode()).hexdigest(),
        domains=np.repeat(np.arange(len(parts)), [len(p) for p in parts]),
        stamp=" ".join(p.stamp for p in parts),
    )


def find_split(root: Path, given: str | None, split: str) -> Path:
    """The folder or tar of a split below ``root``: the one named, or the first of the usual names that exists.

    Raises:
        DataError: With the names that were tried.
    """
    candidates: Iterable[str] = [given] if given else [n + e for n in SPLIT_FOLDERS[split] for e in ("", ".tar")]
    for name in candidates:
        if (root / name).exists():
            return root / name
    raise DataError(f"data.{split}: {root} holds none of {', '.join(candidates)}; set data.root and data.{split}")
