"""The one rule of which files below a folder are images, and of which class: :mod:`cil.data.classes` has the classes.

Training, ``cil predict`` and ``cil prepare-data`` follow it, and :mod:`cil.data.archive` applies it to tar files.
timm's own index is not used: it takes the innermost folder for the class, knows three endings, reads hidden folders,
follows links in circles, leaves other files out without a word, and orders names that differ only in case by chance.

Images are the files of the types in :func:`image_types`, without hidden ones. Each file is read once: a link to a
folder or an image that is read already is left out. What is left out is counted by reason, in :class:`Findings`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from cil.errors import DataError

SYSTEM_NAMES = frozenset(
    (
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"),
        *("system volume information", ".ds_store", ".ipynb_checkpoints", ".directory", ".git", ".gitkeep"),
    )
)
"""Names, in lower case, of what operating systems, file servers and tools add to folders."""

SYSTEM = "of the system"
HIDDEN = "hidden"
NO_IMAGE = "not of an image type"
OUTSIDE = "outside the class folders"
TWICE = "links to what is read already"
SPECIAL = "neither files nor folders"


@cache
def image_types() -> frozenset[str]:
    """Endings, in lower case and with the dot, of the files that are images: those that Pillow reads by itself.

    Formats that it only recognises (MPEG, HDF5, …) are excluded, and EPS, which needs Ghostscript to be installed.
    """
    from PIL import Image, ImageFile

    endings = Image.registered_extensions()

    def is_read(kind: str) -> bool:
        if kind == "MPO":  # opened by the reader of JPEG
            return True
        reader = Image.OPEN[kind][0] if kind in Image.OPEN else None
        only_recognised = isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile)
        return reader is not None and not only_recognised and kind not in ("MPEG", "EPS")

    # Pillow registers the ending of a SPIDER file when it saves one, even an empty ending
    return frozenset(ending.lower() for ending, kind in endings.items() if ending and is_read(kind))


def natural_key(name: str) -> list[int | str]:
    """Sort key by which ``img2`` comes before ``img10``, whatever the case; equal for names such as ``a1`` and ``A01``.

    It is timm's key, except that superscripts, which are no decimal digits, count as text and raise no ValueError.
    """
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))]


def in_order(names: Iterable[str]) -> list[str]:
    """Names in natural order; those of equal keys by their characters, so the order is the same in every process."""
    return sorted(names, key=lambda name: (natural_key(name), name))


def as_text(name: str | Path) -> str:
    r"""A file name as text that every file and message can hold: bytes that are not UTF-8 become ``\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def some(names: Sequence[str], most: int = 2) -> str:
    """The first names, for a message."""
    return ", ".join(as_text(name) for name in sorted(names)[:most]) + (", …" if len(names) > most else "")


def reason_to_skip(name: str) -> str | None:
    """Why a file or folder of this name, without its path, is left out whatever it holds; None if it is not."""
    if name.lower() in SYSTEM_NAMES or name.startswith("._"):
        return SYSTEM
    return HIDDEN if name.startswith(".") else None


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that its name says is an image.

    Args:
        name: Path below the top, with ``/`` between the parts.
        written: The same as an archive writes it, e.g. with ``./`` before it; it decides order and fingerprint.
        size: Bytes.
        changed: Modification time in nanoseconds.
        real: Path without links: of the folder of a file, or of the file that a link leads to; None if there is none.
        link: Whether this is a symbolic link.
        start: Position of the content in an archive, in bytes; None if there is none.
    """

    name: str
    written: str
    size: int
    changed: int
    real: str | None
    link: bool = False
    start: int | None = None

    @property
    def file(self) -> str | None:
        """Path of the file without links, the same for all links to it."""
        return self.real if self.link else f"{self.real}/{self.name.rpartition('/')[2]}"


@dataclass
class Scan:
    """What is stored below a folder or in an archive.

    Attributes:
        images: The image files, in no particular order.
        folders: Paths of all folders that are not hidden.
        left_out: For each reason, the paths that are no images.
    """

    images: list[Entry] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, *names: str) -> None:
        if names:
            self.left_out.setdefault(reason, []).extend(names)

    def add(self, entry: Entry) -> None:
        """Take a file that is not hidden for an image if its ending is that of one."""
        if PurePosixPath(entry.name).suffix.lower() in image_types():
            self.images.append(entry)
        else:
            self.leave_out(NO_IMAGE, entry.name)

    def once(self, top: str | None = None) -> Scan:
        """A copy in which each image is kept once, without links to other images.

        Args:
            top: The folder of class folders, with a ``/`` at its end: images outside its subfolders are left out, too.
        """
        scan = Scan(folders=self.folders)
        for reason, names in self.left_out.items():
            scan.leave_out(reason, *names)
        images = self.images
        if top is not None:
            images = [entry for entry in images if entry.name.startswith(top) and "/" in entry.name[len(top) :]]
        if len(images) < len(self.images):
            inside = {entry.name for entry in images}
            scan.leave_out(OUTSIDE, *(entry.name for entry in self.images if entry.name not in inside))
        links = sorted((entry for entry in images if entry.link and entry.file), key=lambda entry: entry.name)
        taken = {entry.file for entry in images if not entry.link} if links else set()
        for entry in links:
            if entry.file in taken:
                scan.leave_out(TWICE, entry.name)
            taken.add(entry.file)
        again = set(scan.left_out.get(TWICE, ()))
        scan.images = [entry for entry in images if entry.name not in again]
        return scan


def scan_folder(top: Path) -> Scan:
    """Everything below a folder. Links are followed, after all real folders, and never in a circle.

    A link that leads nowhere counts as an image if its ending is that of one; reading it then fails by name.

    Raises:
        DataError: A folder cannot be listed.
    """
    scan, links = Scan(), [""]
    seen = {_real(folder) for folder in top.resolve().parents}  # a link up to one would lead to other splits
    while links:
        names, links = sorted(links), []
        for name in names:
            real = _real(top / name)
            try:
                facts = (top / name).stat()
            except OSError:
                scan.add(Entry(name, name, 0, 0, None, link=True))
                continue
            if stat.S_ISDIR(facts.st_mode):
                links += _walk(top, name, real, scan, seen)
            else:
                _add_file(scan, name, facts, real, link=True)
    return scan


def _walk(top: Path, start: str, real: str, scan: Scan, seen: set[str]) -> list[str]:
    """Adds the files and folders below ``start`` to a scan; returns the links there."""
    links, todo = [], [(start, real)]
    while todo:
        folder, real = todo.pop()
        if real in seen:
            scan.leave_out(TWICE, folder)
            continue
        seen.add(real)
        if folder:
            scan.folders.add(folder)
        try:
            with os.scandir(top / folder) as children:
                for child in children:
                    name = f"{folder}/{child.name}" if folder else child.name
                    reason = reason_to_skip(child.name)
                    if reason is not None:
                        scan.leave_out(reason, name + "/" * child.is_dir(follow_symlinks=False))
                    elif child.is_symlink():
                        links.append(name)
                    elif child.is_dir():
                        todo.append((name, f"{real}/{child.name}"))
                    else:
                        _add_file(scan, name, child.stat(), real, link=False)
        except OSError as error:
            raise DataError(f"{as_text(top / folder)}: cannot be listed ({error.strerror})") from None
    return links


def _real(path: Path) -> str:
    return Path(os.path.realpath(path)).as_posix().rstrip("/")


def _add_file(scan: Scan, name: str, facts: os.stat_result, real: str, link: bool) -> None:
    if stat.S_ISREG(facts.st_mode):
        scan.add(Entry(name, name, facts.st_size, facts.st_mtime_ns, real, link))
    else:  # opening a pipe would wait for ever
        scan.leave_out(SPECIAL, name)


@dataclass(frozen=True)
class Findings:
    """What a folder or archive holds beside the images that are read from it.

    Args:
        where: The folder or archive, as the messages name it.
        left_out: For each reason, the paths below it that are not read.
        notes: Sentences about the classes.
        place: Name of the folder or archive below ``data.root``.
        not_taken: Further usual names of the split that are there, too.
    """

    where: str
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    place: str = ""
    not_taken: tuple[str, ...] = ()

    def card(self) -> dict[str, Any]:
        """The same for ``metrics.json``, with the number of paths and the first five of them."""
        left_out = {
            reason: {"count": len(names), "first": [as_text(name) for name in sorted(names)[:5]]}
            for reason, names in sorted(self.left_out.items())
        }
        return {"place": self.place, "not_taken": list(self.not_taken), "left_out": left_out, "notes": list(self.notes)}

    def lines(self) -> list[str]:
        """One line for each thing that a user should see; files of the system, which nobody misses, are not named."""
        lines = []
        if self.not_taken:
            lines.append(f"{self.where}: taken for this split; {' and '.join(self.not_taken)} beside it not read")
        missed = {reason: names for reason, names in sorted(self.left_out.items()) if reason != SYSTEM}
        if missed:
            reasons = "; ".join(f"{len(names)} {reason} ({some(names)})" for reason, names in missed.items())
            lines.append(f"{self.where}: left out {reasons}")
        return [*lines, *(f"{self.where}: {note}" for note in self.notes)]


def images_below(top: Path) -> tuple[list[Path], Findings]:
    """All images below a folder, whatever their class, sorted by path.

    Raises:
        DataError: The folder holds no images, or cannot be listed.
    """
    scan = scan_folder(top).once()
    if not scan.images:
        raise DataError(f"{as_text(top)}: no images in this folder; looked for {' '.join(sorted(image_types()))}")
    return sorted(top / entry.name for entry in scan.images), Findings(as_text(top), scan.left_out)


class FolderImages:
    """Position → (open file,) of the images below a folder, as readers of timm return it."""

    def __init__(self, top: Path, images: Sequence[Entry]) -> None:
        self.top, self.images = top, images

    def __getitem__(self, position: int) -> tuple[BinaryIO]:
        return ((self.top / self.images[position].name).open("rb"),)
