"""Preparing published benchmarks: small archives in the originals' layout, read back as cil reads any folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import cil.data.prepare as prepare_module
from cil import results, run
from cil.cli import app
from cil.config import DataConfig
from cil.config.reading import load_config
from cil.data.opening import open_source
from cil.data.prepare import known, prepare, split
from cil.data.prepare.known import BENCHMARKS
from cil.errors import DataError

PICTURES = np.random.RandomState(0)


def jpeg(size=(12, 10)):
    stream = io.BytesIO()
    Image.fromarray(PICTURES.randint(0, 256, (*size, 3)).astype(np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def classes(top, counts, names=None):
    """``top``/<class>/… of pictures, as many a class as ``counts`` says."""
    names = names or [f"n0{1443537 + i}" for i in range(len(counts))]
    return {f"{top}/{c}/art_{i}.jpg": jpeg() for c, n in zip(names, counts, strict=True) for i in range(n)}


@pytest.fixture
def sizes(monkeypatch):
    """Makes a benchmark as small as the archives here: sizes(name, classes, train, test)."""

    def shrink(name, *counts):
        small = replace(BENCHMARKS[name], classes=counts[0], train=counts[1], test=counts[2])
        monkeypatch.setattr(prepare_module, "BENCHMARKS", {**BENCHMARKS, name: small})

    return shrink


def read(out):
    """class → pictures' bytes, of each split as cil opens it."""
    found = {}
    for part in ("train", "test"):
        source = open_source(DataConfig(dataset="folder", root=out), part)
        assert len(source) == sum(1 for _ in (out / part).glob("*/*"))
        source.read(0)
        found[part] = {f"{p.parent.name}/{p.name}": p.read_bytes() for p in (out / part).glob("*/*")}
    return found


def command(*arguments):
    result = CliRunner().invoke(app, ["prepare-data", *map(str, arguments)])
    if isinstance(result.exception, DataError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


# --- CIFAR-100, binary version ----------------------------------------------------------------------------------------


def cifar(path, train=6, test=2, names=("apple", "bee"), mode="w:gz"):
    """Two label bytes, then the red, green and blue planes, row by row; labels in turn."""
    members, pixels = {}, {}
    for part, count in (("train", train), ("test", test)):
        pixels[part] = PICTURES.randint(0, 256, (count, 32, 32, 3)).astype(np.uint8)
        rows = [bytes([7, i % 2]) + picture.transpose(2, 0, 1).tobytes() for i, picture in enumerate(pixels[part])]
        members[f"cifar-100-binary/{part}.bin"] = b"".join(rows)
    members["cifar-100-binary/fine_label_names.txt"] = "".join(f"{n}\n" for n in names).encode()
    members["cifar-100-binary/coarse_label_names.txt"] = b"fruit\n"
    return tar(path, members, mode), pixels


def test_cifar_pixels_and_fine_labels_arrive_exactly(tmp_path, sizes):
    sizes("cifar100", 2, 6, 2)
    archive, pixels = cifar(tmp_path / "cifar-100-binary.tar.gz")
    said = command("cifar100", archive, tmp_path / "out")
    assert "2 classes, 6 training and 2 test images; the download's own split" in said
    for part in ("train", "test"):
        source = open_source(DataConfig(dataset="folder", root=tmp_path / "out"), part)
        assert source.class_names == ("apple", "bee")
        for i, expected in enumerate(pixels[part]):
            file = tmp_path / "out" / part / ("apple", "bee")[i % 2] / f"{i:05d}.png"
            np.testing.assert_array_equal(np.asarray(Image.open(file)), expected)


def test_wrong_cifars_are_named(tmp_path):
    python = tar(tmp_path / "p.tar.gz", {f"cifar-100-python/{n}": b"x" for n in ("train", "test", "meta")}, "w:gz")
    with pytest.raises(DataError, match=r"Python version, which is pickled; give cifar-100-binary\.tar\.gz"):
        command("cifar100", python, tmp_path / "a")
    archive, _ = cifar(tmp_path / "c.tar.gz")
    with pytest.raises(DataError, match="2 classes, 6 training and 2 test images; the published split has 100"):
        command("cifar100", archive, tmp_path / "b")
    assert json.loads(json.dumps(prepare("cifar100", archive, tmp_path / "b", allow_counts=True)))["train"] == 6
    cut = tar(tmp_path / "cut.tar", {"train.bin": b"x" * 5000, "test.bin": b"", "fine_label_names.txt": b"a\nb"})
    with pytest.raises(DataError, match=r"train\.bin: 5000 bytes are not images of 3074 bytes"):
        command("cifar100", cut, tmp_path / "c")
    bad, _ = cifar(tmp_path / "d.tar.gz", names=("apple",))
    with pytest.raises(DataError, match=r"label 1, but there are 1 names"):
        command("cifar100", bad, tmp_path / "d")


# --- class folders: ImageNet-R and ImageNet-A -------------------------------------------------------------------------


def test_imagenet_r_is_drawn_at_the_published_sizes_and_runs(tmp_path, sizes):
    sizes("imagenet_r", 4, 24, 6)
    members = {"imagenet-r/README.txt": b"n01443537 goldfish\n", **classes("imagenet-r", [10, 8, 7, 5])}
    archive = tar(tmp_path / "imagenet-r.tar", members)
    out = tmp_path / "out"
    assert "drawn here from a seed" in command("imagenet_r", archive, out)
    found = read(out)
    assert len(found["train"]) == 24 and len(found["test"]) == 6
    assert found["train"] | found["test"] == {
        name.split("/", 1)[1]: raw for name, raw in members.items() if "art" in name
    }
    record = json.loads((out / "split.json").read_text())
    names = sorted(f"{part}/{name}" for part in found for name in found[part])
    assert record["files_sha256"] == hashlib.sha256("".join(f"{n}\n" for n in names).encode()).hexdigest()
    assert record["split"] == "seeded" and record["seed"] == 1993 and record["published_sizes"] is True
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # nothing unpacked is left

    config = load_config(
        "imagenet_r/ncm_b0_inc20",
        [f"data.root={out}", "stream.increment=2", "backbone={name: vit_tiny_patch8_64.tinyimagenet100}",
         "transform={resize: 64}", "hardware.workers=0", "name=tiny"],
    )  # fmt: skip
    (done,) = run(config, tmp_path / "results")
    assert results.read_run(done)["complete"]


def test_the_same_seed_draws_the_same_from_archive_and_folder(tmp_path, sizes):
    sizes("imagenet_a", 3, 16, 4)
    archive = tar(tmp_path / "imagenet-a.tar", classes("imagenet-a", [9, 7, 4]))
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "folder", filter="data")
    first = prepare("imagenet_a", archive, tmp_path / "a")
    second = prepare("imagenet_a", tmp_path / "folder", tmp_path / "b")
    other = prepare("imagenet_a", archive, tmp_path / "c", seed=7)
    assert first["files_sha256"] == second["files_sha256"] != other["files_sha256"]
    linked = next((tmp_path / "b" / "train").glob("*/*"))
    assert linked.stat().st_nlink == 2  # not a copy
    assert sum(1 for _ in (tmp_path / "folder").rglob("*.jpg")) == 20


def test_a_split_archive_is_taken_as_it_is_and_known_by_its_sum(tmp_path, sizes, monkeypatch):
    sizes("vtab", 2, 4, 2)
    members = {**classes("vtab/train", [2, 2]), **classes("vtab/test", [1, 1])}
    path = tmp_path / "vtab.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name, raw in members.items():
            file.writestr(name, raw)
    record = prepare("vtab", path, tmp_path / "a")
    assert record["split"] == "as given" and "do not say" in record["what"]
    known_sum = replace(prepare_module.BENCHMARKS["vtab"], md5=hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(prepare_module, "BENCHMARKS", {**BENCHMARKS, "vtab": known_sum})
    assert prepare("vtab", path, tmp_path / "b")["split"] == "authors"
    assert read(tmp_path / "a") == read(tmp_path / "b")
    assert read(tmp_path / "a")["test"] == {
        n.removeprefix("vtab/test/"): r for n, r in members.items() if "/test/" in n
    }


# --- CUB --------------------------------------------------------------------------------------------------------------


def cub(path, left_out=()):
    names = [f"00{c}.Bird_{c}/Bird_{c}_{i}.jpg" for c in (1, 2) for i in range(5)]
    members = {f"CUB_200_2011/images/{name}": jpeg() for name in names}
    members["CUB_200_2011/images.txt"] = "".join(f"{i} {n}\n" for i, n in enumerate(names, 1)).encode()
    members["CUB_200_2011/train_test_split.txt"] = "".join(f"{i} {i % 2}\n" for i in range(1, 11)).encode()
    members["CUB_200_2011/classes.txt"] = b"1 001.Bird_1\n2 002.Bird_2\n"
    return tar(path, {n: raw for n, raw in members.items() if not n.endswith(tuple(left_out) or "\0")}, "w:gz"), names


def test_cub_has_the_published_sizes_or_its_official_split(tmp_path, sizes, monkeypatch):
    sizes("cub", 2, 8, 2)
    monkeypatch.setattr(prepare_module, "CUB_OFFICIAL", (5, 5))
    archive, names = cub(tmp_path / "CUB_200_2011.tgz")
    drawn = prepare("cub", archive, tmp_path / "drawn")
    assert (drawn["train"], drawn["test"], drawn["split"]) == (8, 2, "seeded")
    official = prepare("cub", archive, tmp_path / "official", split="official")
    assert official["split"] == "official" and official["published_sizes"] is False
    assert set(read(tmp_path / "official")["train"]) == {n for i, n in enumerate(names, 1) if i % 2}
    broken, _ = cub(tmp_path / "broken.tgz", ["Bird_2_3.jpg"])
    with pytest.raises(DataError, match=r"Bird_2_3\.jpg is missing \(1 of 10 images\)"):
        prepare("cub", broken, tmp_path / "x")
    without, _ = cub(tmp_path / "without.tgz", ["train_test_split.txt"])
    with pytest.raises(DataError, match=r"no folder with images\.txt, images, train_test_split\.txt"):
        prepare("cub", without, tmp_path / "y", split="official")


# --- ObjectNet and subsets --------------------------------------------------------------------------------------------


def objectnet(path):
    names = ["air_freshener", "alarm_clock", "banana"]
    members = classes("objectnet-1.0/images", [5, 5, 5], names)
    members["objectnet-1.0/mappings/folder_to_objectnet_label.json"] = json.dumps(
        {n: n.replace("_", " ").capitalize() for n in names}
    ).encode()
    with zipfile.ZipFile(path, "w") as file:
        for name, raw in members.items():
            file.writestr(name, raw)
    return path


def test_objectnet_keeps_its_folders_names_and_draws_classes(tmp_path, sizes):
    sizes("objectnet", 2, 8, 2)
    archive = objectnet(tmp_path / "objectnet-1.0.zip")
    record = prepare("objectnet", archive, tmp_path / "a")
    assert (record["classes"], record["train"], record["test"]) == (2, 8, 2)
    kept = open_source(DataConfig(dataset="folder", root=tmp_path / "a"), "train").class_names
    assert len(kept) == 2 and set(kept) < {"air_freshener", "alarm_clock", "banana"}
    listing = tmp_path / "train.txt"
    listing.write_text("".join(f"{c}/art_{i}.jpg\n" for c in ("banana", "alarm_clock") for i in range(4)))
    record = prepare("objectnet", archive, tmp_path / "b", train_list=listing)
    assert record["split"] == "list" and sorted(read(tmp_path / "b")["test"]) == [
        "alarm_clock/art_4.jpg", "banana/art_4.jpg",
    ]  # fmt: skip


def test_lists_may_name_classes_and_test_pictures(tmp_path, sizes):
    sizes("omnibenchmark", 2, 2, 2)
    members = {f"omni/bird/bird.{part}/images/a b{i}.jpg": jpeg() for part in ("train", "test") for i in range(2)}
    archive = tar(tmp_path / "omni.tar", members)
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("".join(f"omni/bird/bird.train/images/a b{i}.jpg {i}\n" for i in range(2)))
    test.write_text("".join(f"omni/bird/bird.test/images/a b{i}.jpg\t{i}\n" for i in range(2)))
    prepare("omnibenchmark", archive, tmp_path / "out", train_list=train, test_list=test)
    assert read(tmp_path / "out")["test"]["1/a b1.jpg"] == members["omni/bird/bird.test/images/a b1.jpg"]
    with pytest.raises(DataError, match=r"no train/ and test/ there.*list of files is not published"):
        prepare("omnibenchmark", archive, tmp_path / "x")
    for text, message in (
        ("nowhere.jpg\n", r"train\.txt: line 1: 'nowhere\.jpg' is not an image below"),
        ("\n../secret.jpg 1\n", r"line 2: '\.\./secret\.jpg 1' leads outside"),
        ("omni/bird/bird.train/images/a b0.jpg\t../../up\n", r"'\.\./\.\./up' cannot be a class"),
        ("", "this list is empty"),
    ):
        train.write_text(text)
        with pytest.raises(DataError, match=message):
            prepare("omnibenchmark", archive, tmp_path / "x", train_list=train)
    assert not (tmp_path / "x").exists()


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_archives_cannot_write_outside(tmp_path):
    evil = tar(tmp_path / "evil.tar", {"../escaped.jpg": jpeg()})
    with pytest.raises(DataError, match="refused, a member would leave the folder"):
        prepare("imagenet_r", evil, tmp_path / "in" / "out")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        file.writestr("../escaped.jpg", jpeg())
    with pytest.raises(DataError, match=r"refused, member '\.\./escaped\.jpg'"):
        prepare("imagenet_r", tmp_path / "evil.zip", tmp_path / "in" / "out")
    assert not list(tmp_path.rglob("escaped.jpg")) and not list((tmp_path / "in").iterdir())


def test_what_a_refused_archive_left_is_removed_by_the_next_command(tmp_path, sizes):
    sizes("imagenet_r", 2, 8, 2)
    wrong = tar(tmp_path / "wrong.tar", classes("r", [2, 2]))
    for path, content in classes("folder", [5, 5]).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    (tmp_path / "in" / ".out.unpacked.half").mkdir(parents=True)  # of a process that was killed
    with pytest.raises(DataError, match="--allow-counts accepts it"):
        prepare("imagenet_r", wrong, tmp_path / "in" / "out")
    assert [p.name for p in (tmp_path / "in").iterdir()] == [
        ".out.unpacked"
    ]  # for the same command with another option
    prepare("imagenet_r", tmp_path / "folder", tmp_path / "in" / "out")
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["out"]
    with pytest.raises(DataError, match="--allow-counts accepts it"):
        prepare("imagenet_r", wrong, tmp_path / "again")
    prepare("imagenet_r", tmp_path / ".again.unpacked", tmp_path / "again", allow_counts=True)
    assert (tmp_path / ".again.unpacked").exists()  # the user's source by now


def test_an_encrypted_zip_says_what_to_do(tmp_path):
    raw = bytearray(objectnet(tmp_path / "objectnet.zip").read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = raw.find(signature)
        while at >= 0:
            raw[at + offset] |= 1
            at = raw.find(signature, at + 4)
    (tmp_path / "objectnet.zip").write_bytes(bytes(raw))
    with pytest.raises(DataError, match="encrypted; unpack it with the password its authors give"):
        prepare("objectnet", tmp_path / "objectnet.zip", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imagnet_r", ".", "out"], r"unknown 'imagnet_r' \(did you mean 'imagenet_r'\?\)"),
        (["imagenet_r", "none.tar", "out"], r"none\.tar: no such file or folder"),
        (["imagenet_r", "text.tar", "out"], "neither a tar nor a zip file"),
        (["imagenet_r", "cut.tar.gz", "out"], "damaged or incomplete"),
        (["imagenet_r", "empty", "out"], "no class folders with images there"),
        (["imagenet_r", "few", "out"], "fewer than two images"),
        (["imagenet_r", "few", "empty_not"], "not empty and without a split.json"),
        (["imagenet_r", "few", "out", "--split", "official"], "only cub has"),
        (["cifar100", "few", "out", "--split", "seeded"], "cifar100 comes with its split"),
        (["imagenet_r", "few", "out", "--test-list", "text.tar"], "--test-list needs --train-list"),
        (["imagenet_r", "few", "out", "--train-list", "none.txt"], "none.txt: this list cannot be read"),
        (["cub", "few", "out"], r"no folder with images\.txt, images there; is this CUB_200_2011\.tgz\?"),
        (["vtab", "uneven", "out", "--allow-counts"], "class 'b' is not in both splits"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.tar").write_text("no archive")
    whole = tar(tmp_path / "whole.tar.gz", classes("r", [3, 3]), "w:gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    for file in ("few/a/1.jpg", "few/b/1.jpg", "few/b/2.jpg", "empty_not/x.txt", "uneven/train/a/1.jpg",
                 "uneven/train/b/1.jpg", "uneven/test/a/2.jpg"):  # fmt: skip
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(jpeg())
    with pytest.raises(DataError, match=message) as error:
        command(*arguments)
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "out").exists()


def test_interrupted_and_repeated(tmp_path, sizes, monkeypatch):
    sizes("imagenet_r", 2, 8, 2)
    archive, out = tar(tmp_path / "r.tar", classes("r", [5, 5])), tmp_path / "out"
    real, calls = os.link, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(os, "link", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare("imagenet_r", archive, out)
    assert not out.exists()
    monkeypatch.setattr(os, "link", real)
    with monkeypatch.context() as patch:  # what was unpacked is there, and is not unpacked again
        patch.setattr(tarfile.TarFile, "extractall", lambda *a, **k: pytest.fail("unpacked again"))
        first = prepare("imagenet_r", archive, out)
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert prepare("imagenet_r", archive, out) == first  # nothing to do
    assert stamps == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(DataError, match=r"asked for .*; give another folder"):
        prepare("imagenet_r", archive, out, seed=5)
    next((out / "train").glob("*/*")).unlink()
    with pytest.raises(DataError, match="7 training and 2 test images there, not the files that"):
        prepare("imagenet_r", archive, out)


def test_copies_where_links_are_refused(tmp_path, sizes, monkeypatch):
    sizes("imagenet_r", 2, 8, 2)
    archive = tar(tmp_path / "r.tar", classes("r", [5, 5]))

    def refused(*arguments):
        raise OSError(18, "Invalid cross-device link")

    linked = prepare("imagenet_r", archive, tmp_path / "a")
    monkeypatch.setattr(os, "link", refused)
    assert prepare("imagenet_r", archive, tmp_path / "b")["files_sha256"] == linked["files_sha256"]
    assert read(tmp_path / "a") == read(tmp_path / "b")


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_seats_are_exact_and_within_bounds():
    random = np.random.RandomState(3)
    for _ in range(200):
        sizes = random.randint(2, 60, random.randint(2, 40))
        total = random.randint(len(sizes), (sizes - 1).sum() + 1)
        counts = split.apportioned(sizes, total)
        assert counts.sum() == total and (counts >= 1).all() and (counts < sizes).all()
    assert split.apportioned(np.array([60] * 100 + [57] * 100), 2340).sum() == 2340


def test_the_published_sizes_are_those_of_the_originals():
    """Splits of whole originals add up to them: 30,000, 7,500 and 11,788 pictures, and CUB's official one as well."""
    totals = {name: b.train + b.test for name, b in BENCHMARKS.items()}
    assert totals["imagenet_r"] == 30_000 and totals["imagenet_a"] == 7_500 and totals["cifar100"] == 60_000
    assert totals["cub"] == sum(known.CUB_OFFICIAL) == 11_788
