"""From a benchmark's original download to ``train/<class>/…`` and ``test/<class>/…``, which dataset ``folder`` reads.

Pictures keep their bytes (hard links, or copies across disks); only CIFAR-100, which comes without files, becomes PNG.
``split.json`` beside the two folders says which split this is and hashes its list of files.
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
from cil.data.prepare.unpack import md5, unpacked
from cil.errors import DataError, nearest
from cil.files import replacing

SAID = {
    "original": "the download's own split",
    "authors": "the re-split's own archive, by its md5 sum",
    "as given": "a folder that was split already; whether it is the published split, its files do not say",
    "official": "CUB's own train_test_split.txt, which is not the split of published tables with pre-trained ViTs",
    "list": "lists of files",
    "seeded": "drawn here from a seed: the published sizes, other pictures",
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
    """Prepare one benchmark; the content of its split.json. What is there already is checked and left alone.

    ``out`` appears whole, in one step. An interrupted call is taken up again by the same call.

    Args:
        dataset: A key of :data:`BENCHMARKS`.
        source: The original download, an archive or its unpacked folder; or a folder or archive that has train/ and
            test/ already, which is taken as it is.
        out: Folder to make.
        split: ``official``: CUB's own; ``seeded``: drawn; ``auto``: what the source gives, else drawn.
        seed: Of a drawn split.
        train_list: Lists the training pictures, see :func:`cil.data.prepare.split.listed`.
        test_list: Lists the test pictures; without it they are what else the listed classes have.
        allow_counts: Take other numbers of pictures or classes than the published split's.

    Raises:
        DataError: Unknown dataset, a source that is not it, a split that cannot be had, other numbers, or files that
            cannot be written.
    """
    if dataset not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise DataError(f"dataset: unknown {dataset!r}{nearest(dataset, BENCHMARKS)}; allowed: {known}")
    source, out = source.expanduser(), out.expanduser()
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; give the download of {BENCHMARKS[dataset].original}")
    if test_list and not train_list:
        raise DataError("--test-list needs --train-list beside it")
    if train_list and split != "auto":
        raise DataError(f"--train-list and --split {split} exclude each other")
    if split == "official" and dataset != "cub":
        raise DataError(f"--split official: {dataset} has no list of its own; only cub has")
    if dataset == "cifar100" and (train_list or split != "auto"):
        raise DataError("cifar100 comes with its split; leave --split and --train-list away")
    lists = [hashlib.sha256(_read(file)).hexdigest() for file in (train_list, test_list) if file]
    asked = {"dataset": dataset, "wanted": "list" if lists else split, "seed": seed, "lists": lists}
    if (out / "split.json").is_file():
        return _there(out, asked)
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: not empty and without a split.json; give a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = out.with_name(f".{out.name}.lock")
        with FileLock(lock, timeout=0):
            record = _prepare(BENCHMARKS[dataset], asked, source, out, train_list, test_list, allow_counts)
            lock.unlink(missing_ok=True)
            return record
    except Timeout:
        raise DataError(f"{out}: another process is preparing it") from None
    except OSError as error:
        raise DataError(f"{out}: {error.strerror or error} ({error.filename or source})") from None


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: this list cannot be read ({error.strerror})") from None


def _there(out: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The record of what was prepared earlier, if it is what is asked for and still all there."""
    try:
        found = json.loads((out / "split.json").read_text(encoding="utf-8"))
        same = {key: found["asked"][key] for key in asked} == asked
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out / 'split.json'}: damaged ({error}); move the folder away to prepare it again") from None
    if not same:
        raise DataError(f"{out}: holds {found['asked']}, asked for {asked}; give another folder")
    counted, digest = _contents(out)
    if digest != found["files_sha256"]:
        raise DataError(
            f"{out}: {counted['train']} training and {counted['test']} test pictures there, not the files that "
            "split.json tells; move the folder away to prepare it again"
        )
    return found


def _prepare(
    benchmark: Benchmark,
    asked: dict[str, Any],
    source: Path,
    out: Path,
    train_list: Path | None,
    test_list: Path | None,
    allow_counts: bool,
) -> dict[str, Any]:
    name, is_archive = asked["dataset"], source.is_file()
    scratch, half = out.with_name(f".{out.name}.unpacked"), out.with_name(f".{out.name}.half")
    root = unpacked(source, scratch) if is_archive else source
    shutil.rmtree(half, ignore_errors=True)
    expected = [benchmark.classes, benchmark.train, benchmark.test]
    if benchmark.layout == "cifar" and layouts.ready_made(root) is None:
        _draw(root, half)
        found = Split(placed(half / "train"), placed(half / "test"), "original")
        matches = check(name, found, expected, allow_counts)
    else:
        found = _found(benchmark, asked, root, train_list, test_list)
        if found.how == "official":
            expected[1:] = CUB_OFFICIAL
        if found.how == "as given" and is_archive and benchmark.md5 and md5(source) == benchmark.md5:
            found = Split(found.train, found.test, "authors")
        matches = check(name, found, expected, allow_counts)
        _place(found, half)
    counted, digest = _contents(half)
    record = {
        "dataset": name,
        "split": found.how,
        "what": SAID[found.how],
        **({"seed": asked["seed"]} if found.how == "seeded" else {}),
        "source": source.name,
        "classes": len({name for name, _ in found.train}),
        **counted,
        "published_sizes": matches and found.how != "official",
        "files_sha256": digest,
        "asked": asked,
    }
    with replacing(half / "split.json") as written:
        written.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if out.exists():
        out.rmdir()  # empty, or it would have been refused
    half.rename(out)
    if is_archive:
        shutil.rmtree(scratch, ignore_errors=True)
    return record


def _found(
    benchmark: Benchmark, asked: dict[str, Any], root: Path, train_list: Path | None, test_list: Path | None
) -> Split:
    """The split of an unpacked source.

    Raises:
        DataError: It is not this dataset, or no split can be had from it.
    """
    if train_list is not None:
        home = layouts.objectnet_images(root) if benchmark.layout == "objectnet" else _list_root(benchmark, root)
        return listed(home, train_list, test_list)
    if asked["wanted"] == "auto" and (ready := layouts.ready_made(root)) is not None:
        return ready
    if benchmark.layout == "cub":
        return layouts.cub(root, benchmark, asked["wanted"], asked["seed"])
    if benchmark.layout == "subset" and asked["wanted"] == "auto":
        raise DataError(
            f"{root}: no train/ and test/ there. {asked['dataset']} is a choice from {benchmark.original} whose "
            "list of files is not published: give the re-split's archive or --train-list; --split seeded draws one"
        )
    home = layouts.objectnet_images(root) if benchmark.layout == "objectnet" else layouts.class_folders(root)
    return layouts.drawn(layouts.by_class(home), benchmark, asked["seed"])


def _list_root(benchmark: Benchmark, root: Path) -> Path:
    """What a list's paths are relative to: the folder of class folders where there is one, else the source itself."""
    if benchmark.layout == "cub" and (home := layouts.below(root, ("images.txt", "images"))) is not None:
        return home / "images"
    return layouts.class_folders(root) if benchmark.layout == "classes" else root


def _draw(root: Path, half: Path) -> None:
    for part, name, file, picture in layouts.cifar(root):
        (half / part / name).mkdir(parents=True, exist_ok=True)
        picture.save(half / part / name / file)


def _place(found: Split, half: Path) -> None:
    for part, files in (("train", found.train), ("test", found.test)):
        taken = Counter((name, file.name) for name, file in files)
        for name, file in files:
            folder = half / part / name
            folder.mkdir(parents=True, exist_ok=True)
            # two files of one name in different folders of a class
            own = file.name if taken[name, file.name] == 1 else f"{file.parent.name}-{file.name}"
            try:
                os.link(file.resolve(), folder / own)
            except FileExistsError:
                raise DataError(f"{file}: a second picture of class {name!r} with this name") from None
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(file, folder / own)


def _contents(folder: Path) -> tuple[dict[str, int], str]:
    """(pictures of each split, sha256 of the sorted list of files)."""
    files = sorted(p.relative_to(folder).as_posix() for part in ("train", "test") for p in (folder / part).glob("*/*"))
    counted = Counter(name.split("/", 1)[0] for name in files)
    digest = hashlib.sha256("".join(f"{name}\n" for name in files).encode()).hexdigest()
    return {"train": counted["train"], "test": counted["test"]}, digest
