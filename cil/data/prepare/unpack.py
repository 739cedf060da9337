"""Unpacks archives atomically, and refuses members that would leave the folder."""

from __future__ import annotations

import hashlib
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from cil.errors import DataError

DAMAGED = (tarfile.ReadError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)


def unpacked(archive: Path, place: Path) -> Path:
    """Unpacks a tar (compressed or not) or zip file into ``place``, which appears in one step; returns ``place``.

    The result of an earlier call is used again if the archive still has the same name, size and modification time.

    Raises:
        DataError: The file is not an archive, or is damaged or encrypted, or a member's name leads outside the folder.
    """
    fact = archive.stat()
    state = place / f".of-{archive.name}-{fact.st_size}-{fact.st_mtime_ns}"
    if state.exists():
        return place
    remove(place)
    half = _half(place)
    half.mkdir(parents=True)
    try:
        if zipfile.is_zipfile(archive):
            _unzip(archive, half)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                tar.extractall(half, filter="data")
        else:
            raise DataError(f"{archive}: neither a tar nor a zip file; give the download as it came, or its folder")
    except tarfile.FilterError as error:
        raise DataError(f"{archive}: refused, a member would leave the folder ({error})") from None
    except DAMAGED as error:
        raise DataError(f"{archive}: damaged or incomplete ({error}); download it again") from None
    except NotImplementedError as error:  # a kind of zip that Python does not know
        raise DataError(f"{archive}: cannot be unpacked here ({error}); unpack it and give the folder") from None
    else:
        (half / state.name).touch()
        half.rename(place)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return place


def remove(place: Path) -> None:
    """Delete what earlier calls unpacked into ``place``, also where they were killed."""
    for old in (_half(place), place):
        shutil.rmtree(old, ignore_errors=True)


def _half(place: Path) -> Path:
    return place.with_name(f"{place.name}.half")


def _unzip(archive: Path, place: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            path = PurePosixPath(member.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts:
                raise DataError(f"{archive}: refused, member {member.filename!r} would leave the folder")
            if member.flag_bits & 1:
                raise DataError(
                    f"{archive}: encrypted; unpack it with the password its authors give, then give that folder"
                )
        file.extractall(place)


def md5(path: Path) -> str:
    """The md5 sum of a file as hex digits; the authors of the re-splits published md5 sums."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def below(root: Path, wanted: Iterable[str], depth: int = 2) -> Path | None:
    """The first folder, ``root`` or at most ``depth`` levels under it, that holds all ``wanted`` names."""
    names = tuple(wanted)
    level = [root]
    for _ in range(depth + 1):
        for folder in level:
            if all((folder / name).exists() for name in names):
                return folder
        level = [child for folder in level for child in sorted(folder.iterdir()) if child.is_dir()]
    return None
