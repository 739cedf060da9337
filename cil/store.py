"""The feature store: computed features on disk, shared by all runs of a machine.

The store's folder has one folder per *key* (:class:`Key`: everything that features depend on), and each of these has
one file per *unit*: the forward passes that were computed together, with their images in order. A file is written under
another name, renamed, and never changed, so no locks are needed; concurrent runs write identical files. Its checksum is
verified before it is mapped into memory. Any failure here (a full disk, a damaged or deleted file) only costs time:
features that cannot be read are recomputed.

This module only handles files: it knows no learners, images or devices.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cil.utils.files import replacing
from cil.utils.paths import expand
from cil.utils.stored import digest
from cil.utils.units import remove_if_empty, unit_files

if TYPE_CHECKING:
    from torch import Tensor

    from cil.config import HardwareConfig

LAYOUT = "v1"
"""Version of the layout of files and folders. Another version starts empty, beside this one."""
GIB = 2**30
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """Everything that features depend on.

    Attributes:
        parts: Everything that could change the value of a feature, by name, as plain JSON values.
        about: Names for human readers, as plain JSON values; not part of the digest.
    """

    parts: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of ``parts``, hexadecimal; the name of the key's folder."""
        return digest(json.dumps(self.parts, sort_keys=True).encode())


@dataclass(frozen=True)
class StoreEntry:
    """What the store contains under one key.

    Attributes:
        folder: The key's folder.
        about: The key's parts and names; empty if the file that records them is damaged.
        files: Number of units.
        images: Number of images, summed over the units.
        size: Bytes of all units.
        used: Time at which a unit was last written or read, in seconds since 1970.
    """

    folder: Path
    about: Mapping[str, Any]
    files: int
    images: int
    size: int
    used: float


class FeatureStore:
    """Features by key and unit in a folder of bounded size.

    Args:
        root: The folder; created when something is first written.
        cap: Limit in bytes. Above it the least recently used units are removed; processes that have one mapped can
            still read it.
    """

    def __init__(self, root: Path, cap: float = 20 * GIB) -> None:
        self.place, self.root, self.cap = root, root / LAYOUT, cap
        self._open: dict[Path, Tensor] = {}  # verified and mapped
        self._size: float | None = None  # bytes when the folder was last scanned
        self._since = 0  # bytes written since that scan
        self._writes = True

    def read(self, key: Key, passes: Sequence[np.ndarray]) -> Tensor | None:
        """The features of a unit, float32 [N, F], mapped into memory; None if they are missing or damaged.

        Args:
            key: Everything the features depend on.
            passes: Positions of the images of each forward pass, in order; N in total.
        """
        file = self._file(key, passes)
        features = self._open.get(file)
        if features is None:
            features = self._verified(file, sum(map(len, passes)))
        if features is not None:
            self._open[file] = features
            with contextlib.suppress(OSError):  # deleted or read-only: the mapped features remain usable
                os.utime(file)
        return features

    def write(self, key: Key, passes: Sequence[np.ndarray], features: Tensor) -> None:
        """Store the features of a unit, float32 [N, F]. After a failure, one warning is logged and writing stops."""
        from safetensors.torch import save_file

        file = self._file(key, passes)
        content = features.contiguous()
        facts = {"checked": _check_line(file, content)}  # one entry only: safetensors writes several in a random order

        def put() -> None:
            self._describe(key, file.parent)
            with replacing(file) as half:
                save_file({"features": content}, half, facts)

        if self._try(put):
            self._account(content.nbytes)

    def recall(self, key: Key) -> Any:
        """The JSON value stored under a key by :meth:`remember`; None if there is none, or a damaged one."""
        try:
            note = json.loads(self._note(key).read_text(encoding="utf-8"))
            # the checksum is of the value alone, so the key is compared: the note may be another one under this name
            parts = json.loads(json.dumps({name: key.parts[name] for name in key.parts if name not in key.about}))
            if note["sha256"] == digest(json.dumps(note["value"]).encode()) and parts.items() <= note.items():
                return note["value"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        log.warning("feature store: %s is damaged; rebuilding it", self._note(key))
        return None

    def remember(self, key: Key, value: Any) -> None:
        """Store a plain JSON value under a key."""
        text = {"sha256": digest(json.dumps(value).encode()), "value": value, **key.parts, **key.about}

        def put() -> None:
            self._note(key).parent.mkdir(parents=True, exist_ok=True)
            _write_json(self._note(key), text)

        self._try(put)

    def entries(self) -> list[StoreEntry]:
        """The contents by key, the most recently used first."""
        entries = []
        for folder in self._folders():
            files = list(unit_files(folder))
            try:
                about = json.loads((folder / "key.json").read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                about = {}
            about = about if isinstance(about, dict) else {}
            images = sum(int(path.stem.rsplit("-", 1)[1]) for path, _ in files)
            size, used = sum(stat.st_size for _, stat in files), max((stat.st_mtime for _, stat in files), default=0.0)
            entries.append(StoreEntry(folder, about, len(files), images, size, used))
        return sorted(entries, key=lambda entry: -entry.used)

    def clear(self, older_than: float = 0.0) -> tuple[int, int]:
        """Delete the units last used more than ``older_than`` seconds ago; by default, everything.

        Returns:
            (number of units deleted, bytes freed).

        Raises:
            OSError: A file could not be deleted.
        """
        if not older_than:
            removed = [stat.st_size for folder in self._folders() for _, stat in unit_files(folder)]
            if self.root.exists():
                # renamed first, because a run may be writing there
                renamed = self.root.rename(self.root.with_name(f".{LAYOUT}.{os.getpid()}"))
                shutil.rmtree(renamed)
            return len(removed), sum(removed)
        before, sizes = time.time() - older_than, []
        for folder in self._folders():
            for path, stat in unit_files(folder):
                if stat.st_mtime < before:
                    path.unlink(missing_ok=True)
                    sizes.append(stat.st_size)
            remove_if_empty(folder)
        return len(sizes), sum(sizes)

    # --- files ------------------------------------------------------------------------------------------------------

    def _file(self, key: Key, passes: Sequence[np.ndarray]) -> Path:
        lengths = np.array([len(part) for part in passes], dtype=np.int64)
        name = digest(lengths.tobytes() + np.concatenate([*passes]).astype(np.int64).tobytes())
        return self.root / key.digest / f"{name[:32]}-{lengths.sum()}.safetensors"

    def _note(self, key: Key) -> Path:
        return self.root / "notes" / f"{key.digest}.json"

    def _describe(self, key: Key, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "key.json").exists():
            _write_json(folder / "key.json", {**key.parts, **key.about})

    def _verified(self, file: Path, images: int) -> Tensor | None:
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                facts, features = opened.metadata() or {}, opened.get_tensor("features")
            # the checksum is of bytes alone, so the type and shape are checked as well
            fits = features.dtype == torch.float32 and features.ndim == 2 and len(features) == images
            if fits and facts.get("checked") == _check_line(file, features):
                return features
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError):
            pass
        log.warning("feature store: %s is damaged; its features are computed again", file)
        return None

    def _try(self, put: Callable[[], None]) -> bool:
        """Write, and retry once if another process has cleared the folder. A failure ends writing, not the run."""
        from safetensors import SafetensorError

        for again in (True, False):
            if not self._writes:
                break
            try:
                put()
                return True
            except (OSError, SafetensorError) as error:
                if again and isinstance(error, FileNotFoundError):
                    continue
                self._writes = False
                log.warning("feature store: cannot write to %s (%s); nothing more is stored there", self.place, error)
        return False

    # --- size -------------------------------------------------------------------------------------------------------

    def _folders(self) -> list[Path]:
        try:
            return [folder for folder in self.root.iterdir() if folder.is_dir() and folder.name != "notes"]
        except OSError:
            return []

    def _account(self, size: int) -> None:
        """Add up what was written; scan the folder now and then, because other processes write, too, and evict."""
        self._since += size
        if self._size is None or self._since > self.cap / 50 or self._size + self._since > self.cap:
            self._size, self._since = self._evict(), 0

    def _evict(self) -> int:
        """If the size exceeds the cap, delete the least recently used units. Returns the bytes that remain."""
        units = [unit for folder in self._folders() for unit in unit_files(folder)]
        total = sum(stat.st_size for _, stat in units)
        # 5 % below the cap, because at the cap every further unit would cause a scan
        limit = self.cap if total <= self.cap else 0.95 * self.cap
        for path, stat in sorted(units, key=lambda unit: unit[1].st_mtime_ns):
            if total <= limit:
                break
            with contextlib.suppress(OSError):  # deleted by another process, or not permitted
                path.unlink()
                total -= stat.st_size
                remove_if_empty(path.parent)
        return total


def open_store(hardware: HardwareConfig) -> FeatureStore | None:
    """The store that a configuration names; None for ``off``."""
    if hardware.feature_store == "off":
        return None
    place = Path(hardware.feature_store) if hardware.feature_store else default_place()
    return FeatureStore(place, hardware.feature_store_gib * GIB)


def default_place() -> Path:
    """``$CIL_CACHE/features`` if that variable is set, else ``cil/features`` in the user's cache folder."""
    from platformdirs import user_cache_path

    cache = os.environ.get("CIL_CACHE")
    return (expand(cache) if cache else user_cache_path("cil", appauthor=False)) / "features"


def _check_line(file: Path, features: Tensor) -> str:
    """The check recorded in a file: its name, so that no other file can replace it, and its content's checksum."""
    return f"{file.parent.name}/{file.name} {digest(features.numpy())}"


def _write_json(file: Path, value: Any) -> None:
    with replacing(file) as half:
        half.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
