"""Computed features on disk, shared by all runs of a machine: what one run computed the next one reads.

Below the store's folder there is one folder for each *key* (:class:`Key`: everything features depend on) and in it one
file for each *unit*, the forward passes that were computed together, with the images of each in order. A file is never
changed: it is written under another name and renamed, so nobody ever waits for a lock; runs that compute the same write
the same. It is mapped into memory, after its checksum was compared. Whatever goes wrong here (a full disk, a damaged
file, one that vanished) costs time and no result: what cannot be read is computed.

Disk only: nothing here knows learners, images or devices.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cil.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from cil.config import HardwareConfig

LAYOUT = "v1"
"""Of files and folders; another one starts empty beside it."""
UNIT = re.compile(r"[0-9a-f]{32}-\d+\.safetensors")
GIB = 2**30
DAY = 24 * 3600
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """What features depend on.

    Attributes:
        parts: Everything that may change a bit of them, by name, as plain JSON values.
        about: For readers; says nothing that makes features others.
    """

    parts: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        return _digest(json.dumps(self.parts, sort_keys=True).encode())


@dataclass(frozen=True)
class Kept:
    """What the store holds under one key.

    Attributes:
        folder: Its folder.
        about: The key's parts and what was recorded beside them; empty where that file is damaged.
        files: Units.
        images: Images, summed over the units.
        size: Bytes.
        used: When one of them was written or read last, seconds since 1970.
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
        root: The folder; made when something is written.
        cap: Bytes. Above it the units used longest ago are removed; who has one mapped keeps it.
    """

    def __init__(self, root: Path, cap: float = 20 * GIB) -> None:
        self.place, self.root, self.cap = root, root / LAYOUT, cap
        self._open: dict[Path, Tensor] = {}  # verified, mapped
        self._size: float | None = None  # at the last look, and what was written since
        self._since = 0
        self._writes = True

    def read(self, key: Key, passes: Sequence[np.ndarray]) -> Tensor | None:
        """The features of a unit, float32 [N, F], mapped; None if they are not there or are damaged.

        Args:
            key: What they depend on.
            passes: Positions of the images of each forward pass, in order; N in all.
        """
        file = self._file(key, passes)
        found = self._open.get(file)
        if found is None:
            found = self._verified(file, sum(map(len, passes)))
        if found is not None:
            self._open[file] = found
            with contextlib.suppress(OSError):  # gone, or not ours to touch: it is used all the same
                os.utime(file)
        return found

    def write(self, key: Key, passes: Sequence[np.ndarray], features: Tensor) -> None:
        """Keep the features of a unit; if that fails, say so once and keep nothing more."""
        from safetensors.torch import save_file

        file = self._file(key, passes)
        content = features.contiguous()
        facts = {"checked": _checked(file, content)}  # one entry: safetensors writes several in a random order

        def put() -> None:
            self._describe(key, file.parent)
            with replacing(file) as half:
                save_file({"features": content}, half, facts)

        if self._try(put):
            self._grown(content.nbytes)

    def recall(self, key: Key) -> Any:
        """What was remembered under a key, plain JSON; None for nothing."""
        try:
            found = json.loads(self._note(key).read_text(encoding="utf-8"))
            if found["sha256"] == _digest(json.dumps(found["value"]).encode()):
                return found["value"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        log.warning("feature store: %s is damaged; found out anew", self._note(key))
        return None

    def remember(self, key: Key, value: Any) -> None:
        """Keep a plain JSON value under a key."""
        text = {"sha256": _digest(json.dumps(value).encode()), "value": value, **key.parts, **key.about}

        def put() -> None:
            self._note(key).parent.mkdir(parents=True, exist_ok=True)
            _write_json(self._note(key), text)

        self._try(put)

    def kept(self) -> list[Kept]:
        """What is there, by key, last used first."""
        found = []
        for folder in self._folders():
            files = list(_units(folder))
            try:
                about = json.loads((folder / "key.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                about = {}
            images = sum(int(path.stem.rsplit("-", 1)[1]) for path, _ in files)
            size, used = sum(stat.st_size for _, stat in files), max((stat.st_mtime for _, stat in files), default=0.0)
            found.append(Kept(folder, about, len(files), images, size, used))
        return sorted(found, key=lambda kept: -kept.used)

    def clear(self, older_than: float = 0.0) -> tuple[int, int]:
        """Remove what was used last more than ``older_than`` seconds ago, everything by default.

        Returns:
            (units removed, bytes freed).

        Raises:
            OSError: Something could not be removed.
        """
        if not older_than:
            removed = [stat.st_size for folder in self._folders() for _, stat in _units(folder)]
            if self.root.exists():
                gone = self.root.rename(self.root.with_name(f".{LAYOUT}.{os.getpid()}"))  # a run may be writing there
                shutil.rmtree(gone)
            return len(removed), sum(removed)
        before, freed = time.time() - older_than, []
        for folder in self._folders():
            for path, stat in _units(folder):
                if stat.st_mtime < before:
                    path.unlink(missing_ok=True)
                    freed.append(stat.st_size)
            _drop_if_empty(folder)
        return len(freed), sum(freed)

    # --- files ------------------------------------------------------------------------------------------------------

    def _file(self, key: Key, passes: Sequence[np.ndarray]) -> Path:
        lengths = np.array([len(part) for part in passes], dtype=np.int64)
        name = _digest(lengths.tobytes() + np.concatenate([*passes]).astype(np.int64).tobytes())
        return self.root / key.digest / f"{name[:32]}-{lengths.sum()}.safetensors"

    def _note(self, key: Key) -> Path:
        return self.root / "notes" / f"{key.digest}.json"

    def _describe(self, key: Key, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "key.json").exists():
            _write_json(folder / "key.json", {**key.parts, **key.about})

    def _verified(self, file: Path, images: int) -> Tensor | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                facts, features = opened.metadata() or {}, opened.get_tensor("features")
            if len(features) == images and facts.get("checked") == _checked(file, features):
                return features
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError):
            pass
        log.warning("feature store: %s is damaged; its features are computed again", file)
        return None

    def _try(self, put: Callable[[], None]) -> bool:
        """Write, once more if somebody cleared the folder meanwhile; a failure ends writing, not the run."""
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
                log.warning("feature store: cannot write to %s (%s); nothing more is kept there", self.place, error)
        return False

    # --- size -------------------------------------------------------------------------------------------------------

    def _folders(self) -> list[Path]:
        try:
            return [folder for folder in self.root.iterdir() if folder.is_dir() and folder.name != "notes"]
        except OSError:
            return []

    def _grown(self, size: int) -> None:
        """Count what was written, look at the whole folder now and then (others write, too), and evict."""
        self._since += size
        if self._size is None or self._since > self.cap / 50 or self._size + self._since > self.cap:
            self._size, self._since = self._evict(), 0

    def _evict(self) -> int:
        """Above the cap, remove units used longest ago until there is some room again; bytes left."""
        units = [unit for folder in self._folders() for unit in _units(folder)]
        total = sum(stat.st_size for _, stat in units)
        room = self.cap if total <= self.cap else 0.95 * self.cap  # or every further unit would look at all files again
        for path, stat in sorted(units, key=lambda unit: unit[1].st_mtime_ns):
            if total <= room:
                break
            with contextlib.suppress(OSError):  # another process was faster, or the folder is not ours to clean
                path.unlink()
                total -= stat.st_size
                _drop_if_empty(path.parent)
        return total


def open_store(hardware: HardwareConfig) -> FeatureStore | None:
    """The store a configuration names, None for ``off``."""
    if hardware.feature_store == "off":
        return None
    place = Path(hardware.feature_store).expanduser() if hardware.feature_store else default_place()
    return FeatureStore(place, hardware.feature_store_gib * GIB)


def default_place() -> Path:
    """``$CIL_CACHE/features``, else ``cil/features`` in the user's cache folder."""
    from platformdirs import user_cache_path

    given = os.environ.get("CIL_CACHE")
    return (Path(given).expanduser() if given else user_cache_path("cil", appauthor=False)) / "features"


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def _checked(file: Path, features: Tensor) -> str:
    """What a file says of itself: its name, so that no other can stand in for it, and its content's checksum."""
    return f"{file.parent.name}/{file.name} {_digest(features.numpy())}"


def _write_json(file: Path, value: Any) -> None:
    with replacing(file) as half:
        half.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _units(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Files of one key; halves that a killed process left long ago are removed on the way."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat()
                if entry.name.startswith("."):
                    if stat.st_mtime < time.time() - DAY:
                        Path(entry.path).unlink()
                elif UNIT.fullmatch(entry.name):
                    yield Path(entry.path), stat


def _drop_if_empty(folder: Path) -> None:
    if not any(_units(folder)):
        with contextlib.suppress(OSError):  # somebody is writing there again
            (folder / "key.json").unlink(missing_ok=True)
            folder.rmdir()
