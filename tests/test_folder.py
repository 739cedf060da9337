"""Which files of a folder or tar file are images of which class: generated folders against plain lines, and timm."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from test_runner import settings as configured
from timm.data.readers.reader_image_folder import find_images_and_targets

from cil import results
from cil.config import DataConfig
from cil.data import sources
from cil.data.classes import find_split
from cil.data.folder import as_text, image_types, in_order, natural_key
from cil.data.opening import open_source
from cil.errors import DataError
from cil.prediction import find_images
from cil.runner import run
from cil.runner.display import Display

READ = (".png", ".JPG", ".jpeg", ".webp", ".bmp", ".tif", ".TIFF", ".gif", ".ppm", ".jp2", ".avif", ".mpo", ".tga")
NOT_READ = (".txt", ".json", ".npy", ".mp4", ".mpg", ".h5", ".pdf", ".eps", "")
UNSEEN = (".DS_Store", "._0.png", "Thumbs.db", ".ipynb_checkpoints", "__MACOSX", ".hidden", ".x.png")


def png(shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write(top: Path, names) -> Path:
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(png(len(name)))
    return top


def tar(path: Path, members) -> Path:
    """A tar file of (name, content or ``link to …``) pairs, in this order."""
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                kind, _, info.linkname = content.partition(" ")
                info.type = tarfile.SYMTYPE if kind == "link" else tarfile.LNKTYPE
                file.addfile(info)
            else:
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return path


def found(source) -> dict[str, list[str]]:
    """The names of each class's images below their class, in the order of the source."""
    where = source.findings[0].where
    names = [source.describe(i)[len(where) :].lstrip("/: ") for i in range(len(source))]
    return {
        c: [name for name, k in zip(names, source.labels, strict=True) if k == i]
        for i, c in enumerate(source.class_names)
    }


# --- generated folders ------------------------------------------------------------------------------------------------

PART = st.sampled_from(
    ["ant", "Ant", "ANT", "1", "01", "10", "9", "a b", "²", "猫", "caf\u00e9", "cafe\u0301", "v2.png"]
)
STEM = st.sampled_from(["0", "00", "1", "10", "x", "X", "img 2", "img 10", "é"])
FILE = st.builds(str.__add__, STEM, st.sampled_from(READ))
FILE = st.one_of(FILE, FILE, FILE, st.builds(str.__add__, STEM, st.sampled_from(NOT_READ)), st.sampled_from(UNSEEN))
FOLDERS = st.lists(st.one_of(PART, PART, PART, st.sampled_from(UNSEEN)), max_size=3)
FILES = st.lists(st.builds(lambda folders, file: "/".join([*folders, file]), FOLDERS, FILE), max_size=14, unique=True)


def consistent(names: list[str]) -> list[str]:
    """The names without those that would be below another file."""
    kept: list[str] = []
    for name in names:
        if not any(a.startswith(f"{b}/") for a, b in [(name, k) for k in kept] + [(k, name) for k in kept]):
            kept.append(name)
    return kept


def expected(names: list[str]) -> tuple[dict[str, set[str]], int, str | None]:
    """(images by class, number of files that are left out, a class without images), from the names alone."""
    classes: dict[str, set[str]] = {}
    left, unseen = 0, set()
    for name in names:
        parts = name.split("/")
        first = next((i for i, part in enumerate(parts) if part in UNSEEN), None)
        if first is not None:
            unseen.add("/".join(parts[: first + 1]))
        for part in parts[: -1 if first is None else first][:1] if len(parts) > 1 else []:
            classes.setdefault(part, set())
        if first is None and len(parts) > 1 and name.endswith(READ):
            classes[parts[0]].add(name)
        elif first is None:
            left += 1
    return classes, left + len(unseen), next((c for c in in_order(classes) if not classes[c]), None)


@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(names=FILES, shuffled=st.randoms(use_true_random=False))
def test_generated_folders_and_tars_are_read_alike(names, shuffled):
    names = consistent([*names, "k1/0.png", "k2/0.png"])
    classes, left_out, empty = expected(names)
    again = shuffled.sample(names, len(names))
    with tempfile.TemporaryDirectory() as place:
        one, other = write(Path(place) / "one", names), write(Path(place) / "other", again)
        packed = tar(Path(place) / "packed.tar", [(name, png(len(name))) for name in again])
        for path in (one, other, packed):
            if empty is not None:
                with pytest.raises(DataError, match="holds no images; fill or remove it") as error:
                    sources.folder(path)
                assert len(str(error.value).splitlines()) == 1
                continue
            source = sources.folder(path)
            assert {c: set(files) for c, files in found(source).items()} == classes
            [finding] = source.findings
            assert sum(map(len, finding.left_out.values())) == left_out
            assert json.loads(json.dumps(finding.card()))["left_out"].keys() == finding.left_out.keys()
            for i in range(len(source)):
                assert source.read(i).getpixel((0, 0))[0] == len(source.describe(i)[len(finding.where) :].lstrip("/: "))
        if empty is None:
            a, b, c = map(sources.folder, (one, other, packed))
            assert a.fingerprint == b.fingerprint == c.fingerprint
            assert found(a) == found(b) == found(c) and a.class_names == b.class_names == c.class_names
        seen = {p.relative_to(one).as_posix() for p in find_images([one])}
        top = {name for name in names if "/" not in name and name.endswith(READ) and name not in UNSEEN}
        assert seen == set().union(top, *classes.values())


PLAIN = st.builds(
    lambda c, stem, number, end: f"{c}/{stem}{number}.{end}",
    st.sampled_from(["n02", "n1", "Owl", "red fox", "a-b", "猫"]), st.sampled_from(["", "img", "Z ", "é_"]),
    st.integers(0, 200), st.sampled_from(["png", "JPG", "jpeg"]),
)  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=15, database=None)
@given(names=st.lists(PLAIN, min_size=1, max_size=20, unique_by=lambda name: str(natural_key(name))))
def test_plain_data_sets_keep_timms_order_and_so_their_fingerprint(names):
    with tempfile.TemporaryDirectory() as place:
        top = write(Path(place) / "7 train", names)
        source = sources.folder(top)
        samples, positions = find_images_and_targets(str(top))
        assert [source.describe(i) for i in range(len(source))] == [file for file, _ in samples]
        assert source.labels.tolist() == [target for _, target in samples]
        assert source.class_names == tuple(sorted(positions, key=positions.__getitem__))


def test_the_fingerprint_of_a_plain_folder_is_what_it_was(tmp_path):
    top = write(tmp_path / "train", ["ant/1.png", "bee/10.png", "bee/9.JPG"])
    for file in top.rglob("*.*"):
        file.write_bytes(b"x" * 5)
    assert sources.folder(top).fingerprint == "a11228af8e1cb9e086626c0277d36bdd5d241e87b12e2fc70fcdc47f8bcf5841"


def test_every_order_of_equal_keys_gives_one_order():
    names = ["Rock", "rock", "ROCK", "01", "1", "001", "²", "m²", "5²", "٣", "img10", "img9"]
    orders = {tuple(in_order(np.random.RandomState(k).permutation(names).tolist())) for k in range(20)}
    assert len(orders) == 1
    [order] = orders
    assert order.index("img9") < order.index("img10") and order.index("ROCK") < order.index("Rock")


# --- links ------------------------------------------------------------------------------------------------------------


def test_links_are_followed_once_and_never_in_a_circle(tmp_path):
    top = write(tmp_path / "set" / "train", ["dog/0.png", "dog/deep/1.png", "fox/0.png"])
    pool = write(tmp_path / "pool", ["owl/0.png", "owl/1.png", "single.png"])
    write(tmp_path / "set" / "test", ["dog/7.png"])
    (top / "owl").symlink_to(pool / "owl")
    (top / "fox" / "single.png").symlink_to(pool / "single.png")
    (top / "fox" / "first.png").symlink_to("0.png")  # there already
    (top / "ape").symlink_to("dog")  # sorted first, and yet the folder itself is read and not the link
    for name, target in {"loop": ".", "up": "..", "over": "../../..", "self": "self"}.items():
        (top / "dog" / name).symlink_to(target)
    source = sources.folder(top)
    assert found(source) == {
        "dog": ["dog/0.png", "dog/deep/1.png"], "fox": ["fox/0.png", "fox/single.png"],
        "owl": ["owl/0.png", "owl/1.png"]
    }  # fmt: skip
    left_out = source.findings[0].left_out
    assert sorted(left_out["links to what is read already"]) == [
        "ape",
        "dog/loop",
        "dog/over",
        "dog/up",
        "fox/first.png",
    ]
    assert left_out["not of an image type"] == ["dog/self"]
    assert len(find_images([top])) == len(source)


def test_a_link_that_leads_nowhere_is_an_unreadable_image(tmp_path):
    top = write(tmp_path / "train", ["dog/0.png", "fox/0.png"])
    (top / "dog" / "1.png").symlink_to("gone.png")
    (top / "dog" / "2.png").symlink_to("2.png")
    packed = tar(
        tmp_path / "t.tar", [("dog/0.png", png()), ("dog/1.png", "link ../../etc/x"), ("dog/2.png", "link 2.png")]
    )
    for source in (sources.folder(top), sources.folder(packed)):
        assert [source.read_or_none(i) is None for i in range(3)] == [False, True, True]
        with pytest.raises(DataError, match=r"dog/1\.png: not a readable image .*on_error=skip"):
            source.read(1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    top = write(tmp_path / "train", ["dog/0.png", "fox/0.png"])
    os.mkfifo(top / "dog" / "1.png")
    assert sources.folder(top).findings[0].left_out == {"neither files nor folders": ["dog/1.png"]}


# --- tar files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../dog/0.png", "dog/../../0.png", "/dog/0.png", f"dog/{'x' * 300}.png"])
def test_members_that_cannot_be_unpacked_into_the_folder_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"e\.tar: refused, because .* member"):
        sources.folder(tar(tmp_path / "e.tar", [("dog/1.png", png()), ("fox/1.png", png()), (name, png())]))


def test_links_and_repeated_names_in_a_tar_are_what_unpacking_gives(tmp_path):
    members = [
        ("dog/0.png", png(1)), ("dog/0.png", png(2)), ("fox/0.png", "hard dog/0.png"),
        ("fox/1.png", "link ../dog/0.png"),
        ("fox/2.png", png(3)), ("blob/.store/ab", png(4)), ("blob/x.png", png(5)),
        ("fox/3.png", "link ../blob/.store/ab"),
    ]  # fmt: skip
    path = tar(tmp_path / "t.tar", members)
    source = sources.folder(path)
    with tarfile.open(path) as file:
        file.extractall(tmp_path / "out", filter="data")
    unpacked = sources.folder(tmp_path / "out")
    assert found(source) == found(unpacked) == {
        "blob": ["blob/x.png"], "dog": ["dog/0.png"], "fox": ["fox/0.png", "fox/2.png", "fox/3.png"]
    }  # fmt: skip
    shades = [source.read(i).getpixel((0, 0))[0] for i in range(len(source))]
    assert shades == [unpacked.read(i).getpixel((0, 0))[0] for i in range(5)] == [5, 2, 2, 3, 4]
    assert source.findings[0].left_out["replaced by a later member of the same name"] == ["dog/0.png"]


def test_a_tar_of_tars_has_one_class_per_tar(tmp_path):
    parts = [tar(tmp_path / f"{c}.tar", [(f"{i}.png", png(40 * k + i)) for i in range(12)]) for k, c in enumerate("ab")]
    source = sources.folder(tar(tmp_path / "train.tar", [(p.name, p.read_bytes()) for p in parts]))
    assert source.class_names == ("a", "b") and np.bincount(source.labels).tolist() == [12, 12]
    shades = [source.read(i).getpixel((0, 0))[0] for i in range(24)]
    assert shades == [40 * label + i // 2 for i, label in enumerate(source.labels)]


def test_wrappers_around_the_classes_are_seen_through_and_several_splits_are_not(tmp_path):
    names = ["dog/0.png", "dog/2020/1.png", "fox/0.png"]
    for wrapper in ("train", "train/v2", "./pictures"):
        source = sources.folder(tar(tmp_path / "w.tar", [(f"{wrapper}/{name}", png()) for name in names]))
        assert source.class_names == ("dog", "fox") and source.labels.tolist() == [0, 0, 1]
        said = any("the classes are the folders in" in note for note in source.findings[0].notes)
        assert said == (wrapper != "train")
    for splits in (("train", "test"), ("training", "val", "meta"), ("Train", "Test")):
        both = [f"{split}/{name}" for split in splits for name in names]
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        for path in (write(tmp_path / "set", both), tar(tmp_path / "b.tar", [(name, png()) for name in both])):
            with pytest.raises(DataError, match=r"holds several splits \("):
                sources.folder(path)
    vehicles = write(tmp_path / "vehicles", ["train/0.png", "test/0.png", "car/0.png"])
    assert sources.folder(vehicles).class_names == ("car", "test", "train")


def test_compressed_and_damaged_archives_are_one_line(tmp_path):
    plain = tar(
        tmp_path / "plain.tar", [(f"{c}/{i}.png", png(i)) for c in ("dog", "fox") for i in range(3)]
    ).read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("dog/0.png", png())
    (tmp_path / "gzip.tar").write_bytes(gzip.compress(plain))
    (tmp_path / "text.tar").write_text("hello")
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "cut.tar").write_bytes(plain[:1100])
    broken = bytearray(plain)
    broken[2 * 1024 + 10 : 2 * 1024 + 20] = b"\xff" * 10  # the third header: tarfile would stop there without a word
    (tmp_path / "header.tar").write_bytes(broken)
    for name, message in {
        "a.zip": "a zip file; .* unpack it", "gzip.tar": "a compressed tar file; .* unpack it",
        "text.tar": "not a tar file", "empty.tar": "not a tar file",
        "cut.tar": "not a tar file, or a damaged one", "header.tar": "no header at byte 2048",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=message) as error:
            sources.folder(tmp_path / name)
        assert len(str(error.value).splitlines()) == 1


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_that_are_not_utf8_are_read_and_shown_escaped(tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    names = [f"{odd}/{odd}.png", "dog/0.png"]
    for path in (write(tmp_path / "train", names), tar(tmp_path / "t.tar", [(name, png(len(name))) for name in names])):
        source = sources.folder(path)
        assert source.class_names == ("caf\\xe9", "dog") and source.read(0).size == (3, 2)
        assert source.describe(0).endswith("caf\\xe9/caf\\xe9.png")
        (source.describe(0) + source.fingerprint).encode()
    assert as_text(find_images([tmp_path / "train"])[0]).endswith("caf\\xe9.png")


def test_alike_class_names_stay_apart_and_are_said(tmp_path):
    source = sources.folder(
        write(tmp_path / "t", [f"{c}/0.png" for c in ("Rock", "rock", "1", "01", "é", "e\u0301", "x")])
    )
    assert source.class_names == ("01", "1", "e\u0301", "Rock", "rock", "x", "é")
    [note] = source.findings[0].notes
    assert "'Rock' and 'rock'" in note and "'01' and '1'" in note and note.count(" and ") == 3
    same = write(tmp_path / "u", [os.fsdecode(b"\xe9/0.png"), "\\xe9/0.png"])
    with pytest.raises(DataError, match="two class folders would both be called"):
        sources.folder(same)


def test_the_message_about_an_empty_class_says_what_is_there(tmp_path):
    top = write(tmp_path / "train", ["dog/0.png", "fox/0.mp4", "fox/notes.txt"])
    with pytest.raises(
        DataError, match=r"class folder 'fox' holds no images; .* 2 not of an image type \(fox/0\.mp4, .*webp"
    ):
        sources.folder(top)
    with pytest.raises(DataError, match=r"found 2 images, but no class folders; expected <class>/<image>"):
        sources.folder(write(tmp_path / "flat", ["0.png", "1.png"]))


def test_types_are_those_that_pillow_reads_by_itself(tmp_path):
    assert {e.lower() for e in READ} <= image_types() and not image_types() & {e for e in NOT_READ if e}
    for ending in (".webp", ".bmp", ".tif", ".gif", ".ppm", ".tga", ".jp2", ".jpg"):
        (tmp_path / "t" / ending[1:]).mkdir(parents=True)
        Image.new("RGB", (4, 4), (200, 10, 10)).save(tmp_path / "t" / ending[1:] / f"0{ending}")
    source = sources.folder(tmp_path / "t")
    assert len(source) == 8 and all(abs(source.read(i).getpixel((1, 1))[0] - 200) < 5 for i in range(8))


# --- splits -----------------------------------------------------------------------------------------------------------


def test_the_split_that_was_taken_and_its_synonyms_are_recorded_and_said(tmp_path):
    root = write(tmp_path / "set", [f"{s}/{c}/0.png" for s in ("train", "val", "validation", "eval") for c in "ab"])
    assert find_split(root, None, "test") == (root / "val", ("validation", "eval"))
    [finding] = open_source(DataConfig(dataset="folder", root=root), "test").findings
    assert (finding.place, finding.not_taken) == ("val", ("validation", "eval"))
    assert finding.lines() == [f"{root}/val: taken for this split; validation and eval beside it not read"]
    [chosen] = open_source(DataConfig(dataset="folder", root=root, test="eval"), "test").findings
    assert (chosen.place, chosen.not_taken) == ("eval", ()) and not chosen.lines()
    shutil.make_archive(str(tmp_path / "zips" / "train"), "zip", root / "train")
    with pytest.raises(
        DataError, match=r"holds none of train, .*; set data\.root and data\.train, or unpack train\.zip"
    ):
        open_source(DataConfig(dataset="folder", root=tmp_path / "zips"), "train")


def test_a_run_records_and_says_what_it_left_out_and_needs_no_test_split_for_validation(picture_folder, tmp_path):
    root = picture_folder(classes=("ant", "bee", "cat", "dog"), train=4)
    write(root / "train", ["ant/old/7.webp", "notes.txt", "stray.png", "bee/.DS_Store"])
    shutil.rmtree(root / "val")
    data, stream = (
        {"dataset": "folder", "root": str(root)},
        {"increment": 2, "validation": 0.25, "test_on": "validation"},
    )
    heard = io.StringIO()
    [folder] = run(
        configured(data=data, stream=stream), tmp_path / "runs", display=Display(Console(file=heard, width=400))
    )
    header = results.read_run(folder)["data"]
    assert header["test"] | {"tasks": []} == {"sha256": "none", "images": 0, "skipped": [], "tasks": []}
    assert header["train"]["images"] == 17
    [facts] = header["train"]["folders"]
    assert facts["place"] == "train" and {reason: f["count"] for reason, f in facts["left_out"].items()} == {
        "not of an image type": 1, "outside the class folders": 1, "of the system": 1
    }  # fmt: skip
    said = [line for line in heard.getvalue().splitlines() if str(root) in line]
    assert said == [
        f"{root}/train: left out 1 not of an image type (notes.txt); 1 outside the class folders (stray.png)",
        f"{root}/train: images in subfolders belong to the class folder above: 1, e.g. ant/old/7.webp",
    ]
    with pytest.raises(DataError, match=r"data\.test: .* holds none of test, test\.tar, val"):
        run(configured(data=data, stream={"increment": 2}), tmp_path / "runs")
