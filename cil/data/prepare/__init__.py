"""Turns a benchmark's original download into ``train/<class>/…`` and ``test/<class>/…``, for the dataset ``folder``.

Images keep their bytes (hard links, or copies across disks). Only CIFAR-100, which has no image files, is written as
PNG. ``split.json`` beside the two folders says which split this is and hashes its list of files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cil.data.prepare import layouts
from cil.data.prepare.known import BENCHMARKS, CUB_OFFICIAL, Benchmark
from cil.data.prepare.layouts import SplitWanted
from cil.data.prepare.split import Split, check, listed, placed
from cil.data.prepare.unpack import md5, remove, unpacked
from cil.errors import DataError, nearest
from cil.utils.files import replacing

ORIGINS = {
    "original": "the download's own split",
    "authors": "the re-split's own archive, by its md5 sum",
    "as given": "a folder that was split already; its files do not say whether this is the published split",
    "official": "CUB's own train_test_split.txt, which is not the split of published tables with pre-trained ViTs",
    "list": "lists of files",
    "seeded": "drawn here from a seed: the published sizes, but other images",
}


def prepare(
    dataset: str,
    source: Path,
    out: Path,
    *,
    split: SplitWanted = "auto",
    seed: int = 1993,
    train_list: Path | None = None,
    test_list: Path | None = None,
    allow_counts: bool = False,
) -> dict[str, Any]:
    """Prepares one benchmark and returns the content of its ``split.json``.

    ``out`` appears in one step when it is complete. If it exists already, it is checked and left unchanged. The same
    call resumes an interrupted one.

    Args:
        dataset: A key of :data:`BENCHMARKS`.
        source: The original download, an archive or its unpacked folder; or a folder or archive that already has
            train/ and test/, whose split is kept.
        out: Folder to create.
        split: ``official``: CUB's own; ``seeded``: drawn; ``auto``: the split of the source if it has one, else drawn.
        seed: Seed of a drawn split.
        train_list: File that lists the training images, see :func:`cil.data.prepare.split.listed`.
        test_list: File that lists the test images; by default the other images of the listed classes.
        allow_counts: Accept numbers of images or classes that differ from those of the published split.

    Raises:
        DataError: The dataset is unknown, the source is not this dataset or does not allow this split, its numbers
            differ from the published ones, or files cannot be written.
    """
    if dataset not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise DataError(f"dataset: unknown {dataset!r}{nearest(dataset, BENCHMARKS)}; allowed: {known}")
    source, out = source.expanduser(), out.expanduser()
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; give the download of {BENCHMARKS[dataset].original}")
    if test_list and not train_list:
        raise DataError("--test-list needs --train-list")
    if train_list and split != "auto":
        raise DataError(f"--train-list and --split {split} exclude each other")
    if split == "official" and dataset != "cub":
        raise DataError(f"--split official: {dataset} has no list of its own; only cub has")
    if dataset == "cifar100" and (train_list or split != "auto"):
        raise DataError("cifar100 comes with its split; omit --split and --train-list")
    lists = [hashlib.sha256(_read(file)).hexdigest() for file in (train_list, test_list) if file]
    request = {"dataset": dataset, "wanted": "list" if lists else split, "seed": seed, "lists": lists}
    if (out / "split.json").is_file():
        return _prepared_earlier(out, request)
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: not empty and without a split.json; give a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = out.with_name(f".{out.name}.lock")
        with FileLock(lock, timeout=0):
            try:
                return _prepare(BENCHMARKS[dataset], request, source, out, train_list, test_list, allow_counts)
            finally:
                shutil.rmtree(_half(out), ignore_errors=True)
                lock.unlink(missing_ok=True)
    except Timeout:
        raise DataError(f"{out}: another process is preparing it") from None
    except OSError as error:
        raise DataError(f"{out}: {error.strerror or error} ({error.filename or source})") from None


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: this list cannot be read ({error.strerror})") from None


def _prepared_earlier(out: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The record of an earlier call, if it was for the same request and all its files still exist."""
    try:
        record = json.loads((out / "split.json").read_text(encoding="utf-8"))
        same = {key: record["asked"][key] for key in request} == request
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out / 'split.json'}: damaged ({error}); move the folder away to prepare it again") from None
    if not same:
        raise DataError(f"{out}: holds {record['asked']}, asked for {request}; give another folder")
    counted, digest = _contents(out)
    if digest != record["files_sha256"]:
        raise DataError(
            f"{out}: {counted['train']} training and {counted['test']} test images there, not the files that "
            "split.json lists; move the folder away to prepare it again"
        )
    return record


def _prepare(
    benchmark: Benchmark,
    request: dict[str, Any],
    source: Path,
    out: Path,
    train_list: Path | None,
    test_list: Path | None,
    allow_counts: bool,
) -> dict[str, Any]:
    name, is_archive = request["dataset"], source.is_file()
    scratch, half = out.with_name(f".{out.name}.unpacked"), _half(out)
    ours = not source.resolve().is_relative_to(scratch.resolve())  # else the user gives what we unpacked as the source
    if ours and not is_archive:  # what is there comes from an archive that was refused earlier
        remove(scratch)
    root = unpacked(source, scratch) if is_archive else source
    shutil.rmtree(half, ignore_errors=True)
    expected = [benchmark.classes, benchmark.train, benchmark.test]
    if benchmark.layout == "cifar" and layouts.ready_made(root) is None:
        _write_cifar(root, half)
        split = Split(placed(half / "train"), placed(half / "test"), "original")
        matches = check(name, split, expected, allow_counts)
    else:
        split = _read_split(benchmark, request, root, train_list, test_list)
        if split.how == "official":
            expected[1:] = CUB_OFFICIAL
        if split.how == "as given" and is_archive and benchmark.md5 and md5(source) == benchmark.md5:
            split = Split(split.train, split.test, "authors")
        matches = check(name, split, expected, allow_counts)
        _link_files(split, half)
    counted, digest = _contents(half)
    record = {
        "dataset": name,
        "split": split.how,
        "what": ORIGINS[split.how],
        **({"seed": request["seed"]} if split.how == "seeded" else {}),
        "source": source.name,
        "classes": len({name for name, _ in split.train}),
        **counted,
        "published_sizes": matches and split.how != "official",
        "files_sha256": digest,
        "asked": request,
    }
    with replacing(half / "split.json") as file:
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if out.exists():
        out.rmdir()  # it is empty: prepare() refuses any other
    half.rename(out)
    if ours:
        remove(scratch)
    return record


def _half(out: Path) -> Path:
    return out.with_name(f".{out.name}.half")


def _read_split(
    benchmark: Benchmark, request: dict[str, Any], root: Path, train_list: Path | None, test_list: Path | None
) -> Split:
    """The split of an unpacked source.

    Raises:
        DataError: It is not this dataset, or has no such split.
    """
    if train_list is not None:
        home = layouts.objectnet_images(root) if benchmark.layout == "objectnet" else _list_root(benchmark, root)
        return listed(home, train_list, test_list)
    if request["wanted"] == "auto" and (ready := layouts.ready_made(root)) is not None:
        return ready
    if benchmark.layout == "cub":
        return layouts.cub(root, benchmark, request["wanted"], request["seed"])
    if benchmark.layout == "subset" and request["wanted"] == "auto":
        raise DataError(
            f"{root}: no train/ and test/ there. {request['dataset']} is a subset of {benchmark.original} whose "
            "list of files is not published: give the re-split's archive or --train-list; --split seeded draws a split"
        )
    home = layouts.objectnet_images(root) if benchmark.layout == "objectnet" else layouts.class_folders(root)
    return layouts.draw_split(layouts.by_class(home), benchmark, request["seed"])


def _list_root(benchmark: Benchmark, root: Path) -> Path:
    """The folder that the paths of a list are relative to: the one of the class folders, if any, else the source."""
    if benchmark.layout == "cub" and (home := layouts.below(root, ("images.txt", "images"))) is not None:
        return home / "images"
    return layouts.class_folders(root) if benchmark.layout == "classes" else root


def _write_cifar(root: Path, half: Path) -> None:
    for part, name, file, image in layouts.cifar(root):
        (half / part / name).mkdir(parents=True, exist_ok=True)
        image.save(half / part / name / file)


def _link_files(split: Split, half: Path) -> None:
    """Link (or copy across disks) every file of a split to ``half/<train or test>/<class>/``."""
    for part, files in (("train", split.train), ("test", split.test)):
        uses = Counter((name, file.name) for name, file in files)
        for name, file in files:
            folder = half / part / name
            folder.mkdir(parents=True, exist_ok=True)
            # files of one name in different folders of a class are named after their folders, too
            unique = file.name if uses[name, file.name] == 1 else f"{file.parent.name}-{file.name}"
            try:
                os.link(file.resolve(), folder / unique)
            except FileExistsError:
                raise DataError(f"{file}: class {name!r} has two images with this name") from None
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(file, folder / unique)


def _contents(folder: Path) -> tuple[dict[str, int], str]:
    """(number of images per split, sha256 of the sorted list of files)."""
    files = sorted(p.relative_to(folder).as_posix() for part in ("train", "test") for p in (folder / part).glob("*/*"))
    counted = Counter(name.split("/", 1)[0] for name in files)
    digest = hashlib.sha256("".join(f"{name}\n" for name in files).encode()).hexdigest()
    return {"train": counted["train"], "test": counted["test"]}, digest
