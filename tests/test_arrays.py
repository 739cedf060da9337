"""Arrays, tables and sources handed in: what does not fit is one error at the call, whatever it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cil.config import DataConfig, HardwareConfig
from cil.data import arrays, sources
from cil.data.images import LoadedSplit, load_images
from cil.data.opening import open_source
from cil.data.source import ImageSource
from cil.errors import DataError, PluginError

HARDWARE = HardwareConfig(workers=2)
NAMES = ["ant", "bee", "cat", "dog"]
LABELS = np.arange(16) % 4
PIXELS = np.random.RandomState(0).randint(0, 256, (16, 8, 9, 3)).astype(np.uint8)


def refused(message, images=PIXELS, labels=LABELS, names=NAMES):
    with pytest.raises(DataError, match=message) as raised:
        sources.from_arrays(images, labels, names)
    assert len(str(raised.value).splitlines()) == 1


def test_arrays_that_fit():
    assert sources.from_arrays is arrays.from_arrays and sources.ImageSource is ImageSource
    for labels in (LABELS, LABELS.tolist(), tuple(LABELS.tolist()), LABELS.astype(np.uint8), torch.from_numpy(LABELS)):
        source = sources.from_arrays(PIXELS, labels, NAMES)
        assert source.labels.dtype == np.int64 and source.labels.tolist() == LABELS.tolist()
        np.testing.assert_array_equal(np.asarray(source.read(5)), PIXELS[5])
    grey = sources.from_arrays(PIXELS[..., 0], LABELS, NAMES)
    np.testing.assert_array_equal(np.asarray(grey.read(5)), np.dstack([PIXELS[5, ..., 0]] * 3))
    clear = np.concatenate([PIXELS, np.zeros_like(PIXELS[..., :1])], axis=3)
    assert (np.asarray(sources.from_arrays(clear, LABELS, NAMES).read(5)) == 255).all()
    assert len({source.fingerprint, grey.fingerprint, sources.from_arrays(PIXELS, LABELS, NAMES).fingerprint}) == 2


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (PIXELS.transpose(0, 3, 1, 2), r"\[16, 3, 8, 9\]; channels come last: use images.transpose\(0, 2, 3, 1\)"),
        (PIXELS[..., :1], r"\[16, 8, 9, 1\]; use images\[\.\.\., 0\]"),
        (PIXELS[..., :1].transpose(0, 3, 1, 2), r"\[16, 1, 8, 9\]; use images\[:, 0\]"),
        (PIXELS[..., :2], r"\[16, 8, 9, 2\]; the last axis must be the channels"),
        (PIXELS[0, ..., 0], r"uint8 \[8, 9\]"),
        (PIXELS[None], r"\[1, 16, 8, 9, 3\]"),
        (PIXELS[:0], r"at least one image and pixel; got uint8 \[0, 8, 9, 3\]"),
        (PIXELS[:, :0], r"\[16, 0, 9, 3\]"),
        (PIXELS / np.float32(255), r"got float32 .* use \(images \* 255\)\.round\(\)"),
        (PIXELS.astype(np.int64), r"got int64 .* use images\.astype\(np\.uint8\)"),
        (PIXELS.astype(np.int8), r"got int8"),
        (PIXELS.astype(np.uint16) * 257, r"got uint16 .*images >> 8"),
        (PIXELS > 9, r"got bool .* \* 255"),
        (PIXELS.astype(object), r"got object"),
        ([PIXELS[0], PIXELS[1, :4]], r"got list that is none"),
        (None, r"got object \[\]"),
        ("photos", r"got <U6 \[\]"),
        (PIXELS[:9], r"same length; got 9 and 16"),
    ],
)
def test_images_that_do_not_fit(images, message):
    refused(message, images=images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.where(np.arange(16) == 3, -1, LABELS), r"in 0…3, .*image 3 has -1 \(1 such labels\)$"),
        (np.where(np.arange(16) < 3, 7, LABELS), r"image 0 has 7 \(3 such labels\)$"),
        (LABELS + 1, r"image 3 has 4 \(4 such labels\); subtract 1$"),
        (LABELS + 0.6, r"got float64 \(0\.6, …\)"),
        (np.where(LABELS == 1, np.nan, LABELS), r"got float64"),
        (np.array(NAMES)[LABELS], r"got text \('ant', …\); use \[class_names\.index"),
        (np.array(NAMES, object)[LABELS], r"got text \('ant', …\)"),
        ([b"ant"] * 16, r"got text"),
        (LABELS > 1, r"got bool"),
        ([None] * 16, r"got object \(None"),
        ([0, None] * 8, r"got object"),
        (LABELS.astype("datetime64[D]"), r"got datetime64"),
        (np.eye(4, dtype=int)[LABELS], r"\[16, 4\]; for one-hot rows use labels\.argmax\(1\)"),
        (LABELS[:, None], r"\[16, 1\]; use labels\[:, 0\]"),
        (3, r"got shape \[\]"),
        ([[0], [1, 2]] * 8, r"rows of different lengths"),
        (LABELS[:9], r"same length; got 16 and 9"),
        ([], r"same length; got 16 and 0"),
        (np.full(16, 2**63, np.uint64), r"image 0 has 9223372036854775808"),
        (np.zeros(16, int), "class 'bee' has no images"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    refused(message, labels=labels)
    if "same length" not in message:  # every source checks them
        with pytest.raises(DataError, match=message):
            ImageSource(lambda i: PIXELS[i], labels, NAMES, describe=str, fingerprint="f")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ant", "bee", "bee", "dog"], r"'bee' is the name of the classes \[1, 2\]"),
        (["1", 1, "2", "3"], r"'1' is the name of the classes \[0, 1\]"),
        ([], "class_names is empty"),
        ("abcd", "got the text 'abcd'"),
        (NAMES[:3], r"in 0…2, .*image 3 has 3"),
        ([*NAMES, "eel"], "class 'eel' has no images"),
        (None, "class_names must be a sequence .* got NoneType"),
        (4, "class_names must be a sequence .* got int"),
    ],
)
def test_names_that_do_not_fit(names, message):
    refused(message, names=names)


values = st.one_of(st.integers(-3, 6), st.floats(), st.booleans(), st.none(), st.text(max_size=2), st.just([0]))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(values, max_size=5), st.lists(st.sampled_from(["ant", "bee", "cat", 1, None]), max_size=3))
def test_whatever_is_handed_in_is_a_source_or_one_error(labels, names):
    try:
        source = sources.from_arrays(PIXELS[:4], labels, names)
    except DataError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert source.labels.tolist() == labels and set(labels) == set(range(len(names)))
        assert all(type(label) is int for label in labels) and len(set(map(str, names))) == len(names)


def test_domains_are_one_per_image():
    with pytest.raises(DataError, match=r"domains must be whole numbers, one per image, \[16\]; got int64 \[15\]"):
        ImageSource(lambda i: PIXELS[i], LABELS, NAMES, describe=str, fingerprint="f", domains=np.zeros(15, np.int64))


@pytest.mark.parametrize("data", [PIXELS, (PIXELS, LABELS), None, {"dataset": "digits"}])
def test_load_images_takes_a_name_a_section_or_a_source(data, backbone):
    with pytest.raises(DataError, match="allowed: the name of a dataset, a DataConfig, or an ImageSource"):
        load_images(data, "train", backbone)


# --- functions of users ----------------------------------------------------------------------------------------------

FUNCTIONS = """
import numpy as np
from pathlib import Path
from cil.data.sources import ImageSource, from_arrays

x, y = np.zeros((8, 6, 6, 3), np.uint8), np.arange(8) % 2
def returns_nothing(split): pass
def returns_a_pair(split): return x, y
def returns_the_class(split): return ImageSource
def fails(split): return {}["name"]
def wrong_labels(split): return from_arrays(x, y - 1, ["ant", "bee"])
def source(read): return ImageSource(read, y, ["ant", "bee"], describe=lambda i: f"row {i}", fingerprint="f")
def reads_nothing(split): return source(lambda i: None)
def reads_floats(split): return source(lambda i: x[i] / 2)
def reads_channels_first(split): return source(lambda i: x[i].transpose(2, 0, 1))
def reads_missing_files(split): return source(lambda i: Path("none.png"))
def reads_rows(split): return source(lambda i: {}["name"])
def reads_arrays(split): return source(lambda i: x[i])
def reads_grey(split): return source(lambda i: x[i, :, :, 0])
"""


@pytest.fixture
def functions(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return lambda name, **options: DataConfig(dataset=f"{tmp_path}/mine.py:{name}", **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("returns_nothing", "returned NoneType for train; it must return an ImageSource"),
        ("returns_a_pair", "returned tuple for train"),
        ("returns_the_class", "returned type for train"),
        ("fails", r", train: KeyError: 'name' \(.*mine\.py, line 10\)$"),
    ],
)
def test_a_function_that_returns_no_source(functions, name, message):
    with pytest.raises(PluginError, match=message):
        open_source(functions(name), "train")


def test_a_function_with_wrong_labels_is_named(functions):
    with pytest.raises(DataError, match=r"^dataset '.*mine\.py:wrong_labels', train: labels must be"):
        open_source(functions("wrong_labels"), "train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reads_nothing", "TypeError: got NoneType; allowed: PIL image, uint8 array, bytes or path of a file"),
        ("reads_floats", r"TypeError: got an array float64 \[6, 6, 3\]"),
        ("reads_channels_first", r"TypeError: got an array uint8 \[3, 6, 6\]"),
        ("reads_missing_files", "FileNotFoundError"),
        ("reads_rows", "KeyError: 'name'"),
    ],
)
def test_a_source_that_reads_no_images_says_so(functions, name, message):
    config = functions(name)
    with pytest.raises(DataError, match=rf"^row 0: not a readable image \({message}"):
        LoadedSplit(config, "train", HARDWARE).source.read(0)
    with pytest.raises(DataError, match=rf"none of the 8 images can be read: row 0: not a readable image \({message}"):
        LoadedSplit(config.model_copy(update={"on_error": "skip"}), "train", HARDWARE)


def test_a_source_may_read_arrays(functions):
    for name in ("reads_arrays", "reads_grey"):
        assert np.asarray(LoadedSplit(functions(name), "train", HARDWARE).source.read(1)).shape == (6, 6, 3)


# --- tables of Hugging Face ------------------------------------------------------------------------------------------

PHOTOS = [Image.fromarray(pixels) for pixels in PIXELS[:6]]
AB = [0, 1] * 3
TABLES = {  # columns, type of the first, options, message
    "integers": ({"label": AB}, "int64", {}, None),
    "no label column": ({"fine": AB}, "class", {}, r"column 'label' \(KeyError\); .* another column: fine$"),
    "other label column": ({"fine": AB}, "class", {"label_key": "fine"}, None),
    "no image column": ({"label": AB}, "class", {"image_key": "img"}, "data.image_key to another column: image"),
    "labels as images": ({"label": AB}, "class", {"image_key": "label"}, "does not hold images, set data.image_key"),
    "rows without label": ({"label": [0, 1, None] * 2}, "class", {}, r"2 of 6 rows have no label \(row 2: None\)"),
    "hidden labels": ({"label": [-1] * 6}, "class", {}, r"6 of 6 rows have no label \(row 0: -1\)"),
    "text": ({"label": ["a", "b"] * 3}, "string", {}, r"holds str \(a\)"),
    "floats": ({"label": [0.5, 1.0] * 3}, "float32", {}, r"holds float \(0\.5\)"),
    "truth values": ({"label": [True, False] * 3}, "bool", {}, "holds bool"),
    "several labels": ({"label": [[0], [1]] * 3}, "several", {}, r"holds list \(\[0\]\)"),
    "numbers of rows": ({"label": [7, 10**12] * 3}, "int64", {}, "from 7 to 1000000000000 for 6 rows"),
    "text as images": ({"label": AB, "text": ["x"] * 6}, "class", {"image_key": "text"}, "'text' holds no images"),
    "no such split": ({"label": AB}, "class", {"train": "none"}, "Unknown split"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_or_refused_when_it_is_opened(name, tmp_path):
    datasets = pytest.importorskip("datasets")
    columns, kind, options, message = TABLES[name]
    label = datasets.ClassLabel(names=["ant", "bee"])
    kinds = {"class": label, "several": datasets.Sequence(label)}
    target = next(iter(columns))
    features = {column: datasets.Value("string") for column in columns} | {"image": datasets.Image()}
    features[target] = kinds.get(kind) or datasets.Value(kind)
    table = datasets.Dataset.from_dict({"image": PHOTOS, **columns}, features=datasets.Features(features))
    table.to_parquet(str(tmp_path / "train.parquet"))
    config = DataConfig(dataset=f"hfds/{tmp_path}", root=tmp_path / "cache", **options)
    if message is None:
        source = open_source(config, "train")
        assert source.labels.tolist() == [0, 1] * 3
        np.testing.assert_array_equal(np.asarray(source.read(2)), PIXELS[2])
        return
    with pytest.raises(DataError, match=message) as raised:
        open_source(config, "train")
    assert len(str(raised.value).splitlines()) == 1


# --- torchvision -----------------------------------------------------------------------------------------------------


def test_torchvision_files_are_decoded_as_all_others(tmp_path):
    """ImageNet's layout: 16 bits and orientations as in folders, a broken file by its path, two classes ``crane``."""
    words = {"n01": ("crane",), "n02": ("crane",), "n03": ("maillot", "tank suit")}
    torch.save((words, []), tmp_path / "meta.bin")
    grey = PIXELS[0, ..., 0]
    for wnid in words:
        (tmp_path / "train" / wnid).mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "train" / "n01" / "x.png")
    Image.fromarray(np.ascontiguousarray(np.rot90(grey, 2))).save(tmp_path / "train" / "n02" / "x.png", exif=exif)
    (tmp_path / "train" / "n03" / "x.png").write_bytes(b"P5 4 x\n")
    source = open_source(DataConfig(dataset="torch/imagenet", root=tmp_path, download=False), "train")
    assert source.class_names == ("crane (class 0)", "crane (class 1)", "maillot / tank suit")
    for i in range(2):
        np.testing.assert_array_equal(np.asarray(source.read(i))[..., 0], grey)
    with pytest.raises(DataError, match=r"train/n03/x\.png: not a readable image"):
        source.read(2)
