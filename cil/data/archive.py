"""Reads the images of a plain tar file where they are, under the same rule as those of a folder.

Nothing is unpacked. An image is a range of bytes of the file, which threads and forked workers read independently.
timm's reader shares one position in the file between them, or reads and writes a pickle beside it.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from cil.data.folder import SPECIAL, Entry, Scan, as_text, reason_to_skip
from cil.errors import CilError, DataError

REPLACED = "replaced by a later member of the same name"
SPARSE = "stored with holes, which only unpacking fills"
LINKED = "links to folders in the archive"
NAMES: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}
"""Decoding of members' names, the same on every machine."""
LONGEST = 255
"""Bytes of a file name that file systems take; a longer one cannot be unpacked either."""


@dataclass(frozen=True)
class Member:
    """A member of an archive: its header, and the position at which the archive that it is in begins."""

    info: tarfile.TarInfo
    origin: int


@lru_cache(maxsize=4)
def scan_tar(path: Path, changed: int, size: int) -> Scan:
    """Everything in a plain tar file; tar files in it count as folders, one level deep.

    Modification time and size are part of the cache's key. Thanks to the cache a second run in this process does not
    read through the whole file again.

    Raises:
        DataError: The file is no plain tar file, is damaged, or has a member whose name leads out of the folder.
    """
    scan, members = Scan(), dict[str, Member]()
    shown = as_text(path)
    try:
        with tarfile.open(path, "r:", **NAMES) as tar:
            for name, member in _members(shown, tar):
                if name in members:
                    scan.leave_out(REPLACED, name)
                    del members[name]
                members[name] = member
    except CilError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{shown}: {_what_it_is(path, error)}") from None
    skipped = dict[str, str]()
    for name, member in members.items():
        parts = name.split("/")
        bad = next((i for i, part in enumerate(parts) if reason_to_skip(part)), None)
        folders = len(parts) - (not member.info.isdir()) if bad is None else bad
        scan.folders.update("/".join(parts[:n]) for n in range(1, folders + 1))
        if bad is not None:
            is_folder = bad < len(parts) - 1 or member.info.isdir()
            skipped["/".join(parts[: bad + 1]) + "/" * is_folder] = reason_to_skip(parts[bad]) or ""
        elif not member.info.isdir():
            _add(scan, name, member, members)
    for name, reason in skipped.items():
        scan.leave_out(reason, name)
    return scan


def _add(scan: Scan, name: str, member: Member, members: dict[str, Member]) -> None:
    info, parent = member.info, posixpath.dirname(name)
    if info.issym() or info.islnk():
        target = _target(name, members)
        found = members.get(target)
        if (found is not None and found.info.isdir()) or target in scan.folders:
            scan.leave_out(LINKED, name)
            return
        is_file = found is not None and found.info.isreg()
        size, start = (found.info.size, found.origin + found.info.offset_data) if found and is_file else (0, None)
        real = (target if info.issym() else parent) if is_file else None
        scan.add(Entry(name, info.name, size, 0, real, link=info.issym() or not is_file, start=start))
    elif not info.isreg():
        scan.leave_out(SPECIAL, name)
    elif info.issparse():
        scan.leave_out(SPARSE, name)
    else:
        start = member.origin + info.offset_data
        scan.add(Entry(name, info.name, info.size, 0, parent, start=start))


def _members(shown: str, tar: tarfile.TarFile, folder: str = "", origin: int = 0) -> Iterator[tuple[str, Member]]:
    """(path in the outermost archive, member) of every member, those of tar files in it included."""
    for info in tar:
        name = "/".join([*([folder] if folder else []), *_parts(shown, info.name)])
        inner = info.isreg() and not folder and name.lower().endswith(".tar")
        if inner and not any(map(reason_to_skip, name.split("/"))):
            with tarfile.open(fileobj=tar.extractfile(info), mode="r:", **NAMES) as sub:
                yield from _members(shown, sub, name[: -len(".tar")], origin + info.offset_data)
        elif name != folder:  # "." is the folder itself
            yield name, Member(info, origin)
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {origin + tar.offset}")  # where tarfile stops as if it were the end


def _parts(shown: str, name: str) -> list[str]:
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise DataError(f"{shown}: refused, because its member {as_text(name)!r} would leave the folder")
    if any(len(part.encode("utf-8", "surrogateescape")) > LONGEST for part in parts):
        raise DataError(f"{shown}: refused, because the name of member {as_text(name)[:40]!r}… is too long to unpack")
    return [part for part in parts if part not in ("", ".")]


def _target(name: str, members: dict[str, Member]) -> str:
    """Path of what a link leads to, which need not exist; links to links are followed, and a circle leads nowhere."""
    passed = set()
    while name not in passed and name in members:
        passed.add(name)
        info = members[name].info
        if info.issym():
            name = posixpath.normpath(posixpath.join(posixpath.dirname(name), info.linkname))
        elif info.islnk():
            inside = name[: len(name) - len(posixpath.normpath(info.name))]  # of a tar file in the archive
            name = inside + posixpath.normpath(info.linkname)
    return name


def _what_it_is(path: Path, error: Exception) -> str:
    """What is wrong with a file that cannot be read as a plain tar file."""
    if zipfile.is_zipfile(path):
        return "a zip file; only folders and plain tar files are read, so unpack it"
    try:
        with tarfile.open(path) as tar:
            packed = not isinstance(tar.fileobj, io.BufferedReader)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError):
        packed = False
    if packed:
        return "a compressed tar file; only folders and plain tar files are read, so unpack it (tar -xf) or gunzip it"
    return f"not a tar file, or a damaged one ({error}); only folders and plain tar files are read"


class TarImages:
    """Position → (open file,) of the images of a plain tar file, as readers of timm return it."""

    def __init__(self, path: Path, images: Sequence[Entry]) -> None:
        self.path, self.images = path, images

    def __getitem__(self, index: int) -> tuple[BinaryIO]:
        entry = self.images[index]
        if entry.start is None:
            raise FileNotFoundError(f"{entry.name} is a link that leads nowhere")
        with self.path.open("rb") as file:
            file.seek(entry.start)
            return (io.BytesIO(file.read(entry.size)),)
