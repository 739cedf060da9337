"""Datasets by name, transforms against timm's own, memory and workers, and files that are no images."""

from __future__ import annotations

import gzip
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_transform

from cil.config import Augmentation, DataConfig, HardwareConfig, Normalization, TransformConfig
from cil.data import sources
from cil.data.images import ImageSet, LoadedSplit, read_image
from cil.data.transforms import Transforms
from cil.errors import ConfigError, DataError
from cil.utils.randomness import generator, isolated

HARDWARE = HardwareConfig(workers=2)
STREAMING = HardwareConfig(workers=2, memory_gib=0)
CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.48, 0.45, 0.4),
    "std": (0.27, 0.26, 0.28),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}


def make_tar(root, split, path):
    with tarfile.open(path, "w") as tar:
        tar.add(root / split, arcname="")
    return path


# --- by name ------------------------------------------------------------------------------------------------------


def test_digits_split_covers_all_and_overlaps_nowhere():
    train, test = sources.digits("train"), sources.digits("test")
    assert len(train) + len(test) == 1797 and len(test) == 445
    assert np.bincount(test.labels).min() >= 43
    pixels = load_digits().data
    everything = {np.asarray(s.read(i)).tobytes() for s in (train, test) for i in range(len(s))}
    assert len(everything) == len({np.round(p * 255 / 16).astype(np.uint8).tobytes() for p in pixels})
    assert train.class_names[3] == "three"
    assert train.fingerprint != test.fingerprint == sources.digits("test").fingerprint


def test_folder_and_tar_hold_the_same(picture_folder, tmp_path):
    root = picture_folder()
    folder = sources.folder(root / "train")
    tar = sources.folder(make_tar(root, "train", tmp_path / "train.tar"))
    assert folder.class_names == tar.class_names == ("ant", "bee", "cat")
    assert folder.labels.tolist() == tar.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for i in range(9):
        np.testing.assert_array_equal(np.asarray(folder.read(i)), np.asarray(tar.read(i)))
    assert folder.describe(4).endswith("train/bee/1.png")
    assert "train.tar: " in tar.describe(4)


def test_fingerprint_follows_the_content(picture_folder, tmp_path):
    one, two = picture_folder(root=tmp_path / "a"), picture_folder(root=tmp_path / "b")
    assert sources.folder(one / "train").fingerprint == sources.folder(two / "train").fingerprint
    (two / "train" / "ant" / "0.png").rename(two / "train" / "ant" / "9.png")
    assert sources.folder(one / "train").fingerprint != sources.folder(two / "train").fingerprint


def test_split_folders_are_found_by_their_usual_names(picture_folder):
    root = picture_folder()
    config = DataConfig(dataset="folder", root=root)
    assert len(LoadedSplit(config, "test", HARDWARE).source) == 6
    with pytest.raises(DataError, match="holds none of training_images"):
        LoadedSplit(DataConfig(dataset="folder", root=root, train="training_images"), "train", HARDWARE)


def test_torchvision_set_from_files_on_disk(tmp_path):
    """MNIST's own file format, written by hand, read through timm's factory and torchvision."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    labels = np.arange(10, dtype=np.uint8).repeat(3)
    pixels = np.random.RandomState(0).randint(0, 256, (30, 28, 28)).astype(np.uint8)
    for stem in ("train", "t10k"):
        for kind, magic, content in (("images-idx3", 2051, pixels), ("labels-idx1", 2049, labels)):
            head = b"".join(int(v).to_bytes(4, "big") for v in (magic, *content.shape))
            (raw / f"{stem}-{kind}-ubyte").write_bytes(head + content.tobytes())
            with gzip.open(raw / f"{stem}-{kind}-ubyte.gz", "wb") as file:
                file.write(head + content.tobytes())
    source = LoadedSplit(DataConfig(dataset="torch/mnist", root=tmp_path, download=False), "train", HARDWARE).source
    assert source.labels.tolist() == labels.tolist() and source.class_names[7].startswith("7")
    np.testing.assert_array_equal(np.asarray(source.read(4))[..., 0], pixels[4])


def test_huggingface_set_from_a_local_folder(picture_folder):
    pytest.importorskip("datasets")
    root = picture_folder(classes=("ant", "bee"))
    source = LoadedSplit(DataConfig(dataset=f"hfds/{root / 'train'}"), "train", HARDWARE).source
    assert source.class_names == ("ant", "bee") and np.bincount(source.labels).tolist() == [3, 3]
    own = sources.folder(root / "train")
    ours = sorted(np.asarray(own.read(i)).tobytes() for i in range(len(own)))
    assert sorted(np.asarray(source.read(i)).tobytes() for i in range(len(source))) == ours


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dataset": "digit"}, "did you mean 'digits'"),
        ({"dataset": "torch/cifar1000"}, "did you mean 'cifar100"),
        ({"dataset": "folder"}, "data.root"),
        ({"dataset": "folder", "root": "/no/such/place"}, "/no/such/place is not a folder"),
        ({"dataset": "torch/cifar10", "root": "/no/such/place", "download": False}, "set data.download=true"),
    ],
)
def test_wrong_datasets_say_what_to_do(config, message):
    with pytest.raises(DataError, match=message):
        LoadedSplit(DataConfig(**config), "train", HARDWARE)


def test_empty_class_folder_is_named(picture_folder, tmp_path):
    root = picture_folder()
    (root / "train" / "yak").mkdir()
    with pytest.raises(DataError, match="class folder 'yak' holds no images"):
        sources.folder(root / "train")
    with pytest.raises(DataError, match="class folder 'yak' holds no images"):
        sources.folder(make_tar(root, "train", tmp_path / "train.tar"))


def test_domains_are_combined_by_class_name(picture_folder, tmp_path):
    root = tmp_path / "domains"
    picture_folder(root=root / "photo", classes=("ant", "bee"))
    picture_folder(root=root / "sketch", classes=("bee", "ant"), train=2)
    config = DataConfig(dataset="folder", root=root, domains=["photo", "sketch"])
    source = LoadedSplit(config, "train", HARDWARE).source
    assert source.domains.tolist() == [0] * 6 + [1] * 4
    assert [source.class_names[c] for c in source.labels[6:]] == ["ant", "ant", "bee", "bee"]
    assert "sketch" in source.describe(7)
    picture_folder(root=root / "clip", classes=("ant", "cow"))
    with pytest.raises(DataError, match=r"same classes.*cow"):
        LoadedSplit(config.model_copy(update={"domains": ["photo", "clip"]}), "train", HARDWARE)


def test_per_class_keeps_the_first_of_each(picture_folder):
    root = picture_folder(train=5)
    source = LoadedSplit(DataConfig(dataset="folder", root=root, per_class=2), "train", HARDWARE).source
    assert np.bincount(source.labels).tolist() == [2, 2, 2]
    assert source.describe(3).endswith("bee/1.png")
    assert len(LoadedSplit(DataConfig(dataset="folder", root=root, per_class=2), "test", HARDWARE).source) == 6


# --- files that are no images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardware", [HARDWARE, STREAMING], ids=["memory", "streaming"])
@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_a_broken_file_is_named_or_skipped_and_counted(picture_folder, damage, hardware, backbone):
    root = picture_folder(train=3 if hardware is HARDWARE else 40)  # enough for worker processes to be worth it
    victim = root / "train" / "bee" / "1.png"
    victim.write_bytes(victim.read_bytes()[:200] if damage == "truncated" else b"hello")
    config = DataConfig(dataset="folder", root=root)
    with pytest.raises(DataError, match=r"bee/1\.png: not a readable image.*on_error=skip$") as raised:
        split = LoadedSplit(config, "train", hardware)
        images = split.images(Transforms(backbone.data_config))  # when streaming, at the latest when it is read
        list(images.batches(np.arange(len(images)), images.labels, 4))
    assert len(str(raised.value).splitlines()) == 1
    split = LoadedSplit(config.model_copy(update={"on_error": "skip"}), "train", hardware)
    assert [s.endswith("bee/1.png") for s in split.skipped] == [True]
    each = 3 if hardware is HARDWARE else 40
    assert np.bincount(split.source.labels).tolist() == [each, each - 1, each]
    names = [split.source.describe(i) for i in range(len(split.source))]
    assert not any(n.endswith("bee/1.png") for n in names)
    assert split.source.fingerprint != sources.folder(root / "train").fingerprint


def test_a_class_of_broken_files_only_is_named(picture_folder):
    root = picture_folder(train=1)
    (root / "train" / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match="class 'cat' has no images"):
        LoadedSplit(DataConfig(dataset="folder", root=root, on_error="skip"), "train", HARDWARE)


# --- transforms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_test_transform_equals_timms(crop_mode):
    """Our uint8 + batched normalisation against timm's ToTensor + Normalize on the same picture."""
    rng = np.random.RandomState(0)
    ours = Transforms({**CONFIG, "crop_mode": crop_mode})
    theirs = create_transform(**{**CONFIG, "crop_mode": crop_mode})
    for size in ((8, 8), (64, 64), (40, 70), (200, 33)):
        picture = Image.fromarray(rng.randint(0, 256, (*size, 3)).astype(np.uint8))
        with isolated():
            mine = ours.normalize(torch.from_numpy(np.asarray(ours.evaluate(picture)))[None])[0]
            reference = theirs(picture)
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-6)


def test_published_protocol_overrides():
    """SimpleCIL's: shorter side to 256 bicubic, centre crop 224, [0, 1] pixels without normalisation."""
    from torchvision import transforms as tv

    config = TransformConfig(normalize="none", resize=256, interpolation="bicubic")
    ours = Transforms({**CONFIG, "input_size": (3, 224, 224), "crop_pct": 0.9}, config)
    assert ours.card["mean"] == [0.0, 0.0, 0.0]
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (300, 400, 3)).astype(np.uint8))
    reference = tv.Compose([tv.Resize(256, tv.InterpolationMode.BICUBIC), tv.CenterCrop(224), tv.ToTensor()])(picture)
    mine = ours.normalize(torch.from_numpy(np.asarray(ours.evaluate(picture)))[None])[0]
    torch.testing.assert_close(mine, reference, atol=1e-6, rtol=0)
    own = Transforms(CONFIG, TransformConfig(normalize=Normalization(mean=(0.1, 0.2, 0.3), std=(1, 1, 2))))
    assert own.normalize(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))[0, 2, 0, 0].item() == pytest.approx(0.35)
    with pytest.raises(ConfigError, match=r"transform\.resize: 200 is smaller"):
        Transforms({**CONFIG, "input_size": (3, 224, 224)}, TransformConfig(resize=200))


@pytest.mark.parametrize("resize", range(224, 300, 7))
def test_resize_lands_on_the_pixel_asked_for(resize):
    ours = Transforms({**CONFIG, "input_size": (3, 224, 224)}, TransformConfig(resize=resize))
    assert ours.evaluate.transforms[0].size == resize


def test_augmentation_off_trains_on_the_test_transform(image_set, backbone):
    images = image_set([0, 1, 0, 1])
    plain = ImageSet(images.source, Transforms(backbone.data_config, TransformConfig(augment="none")))
    got = dict(_by_label(plain, augment=True))
    expected = dict(_by_label(plain, augment=False))
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def _by_label(images, **options):
    for batch, labels in images.batches(
        np.arange(len(images)), np.arange(len(images)), 3, generator=generator(0), **options
    ):
        yield from zip(labels.tolist(), batch, strict=True)


# --- memory and workers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [False, True])
def test_streaming_workers_give_what_memory_gives(picture_folder, tmp_path, augment):
    """To the bit, whatever the number of workers: also from one tar that many processes read."""
    root = picture_folder(train=40)
    make_tar(root, "train", root / "train.tar")
    config = DataConfig(dataset="folder", root=root, train="train.tar")
    transforms = Transforms(CONFIG, TransformConfig(augment=Augmentation(color_jitter=0.3)))
    held = LoadedSplit(config, "train", HARDWARE)
    assert held.in_memory and not LoadedSplit(config, "train", STREAMING).in_memory
    expected = dict(_by_label(held.images(transforms), augment=augment))
    for workers in (0, 1, 2):
        split = LoadedSplit(config, "train", STREAMING.model_copy(update={"workers": workers}))
        split.source.read(5)  # a file position left behind by the parent must not reach the workers
        got = dict(_by_label(split.images(transforms), augment=augment))
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("augment", [True, False])
def test_parts_of_all_processes_are_the_whole_pass_to_the_bit(picture_folder, tmp_path, augment, in_memory):
    """Batches of 8 of 9 images on two processes: the last batch is empty on one of them."""
    transforms = Transforms(CONFIG, TransformConfig(augment=Augmentation(scale=(0.3, 1.0))))
    images = ImageSet(sources.folder(picture_folder() / "train"), transforms, in_memory=in_memory, memory_bytes=0)

    def passed(part):
        return list(images.batches(np.arange(9), images.labels, 8, generator=generator(3), augment=augment, part=part))

    whole, shares = passed((0, 1)), [passed((rank, 2)) for rank in range(2)]
    for step, (pixels, labels) in enumerate(whole):
        for rank in range(2):
            assert torch.equal(shares[rank][step][0], pixels[rank::2])
            assert torch.equal(shares[rank][step][1], labels[rank::2])
    assert len(shares[1][1][1]) == 0 and shares[1][1][0].shape == (0, 3, 32, 32)


def test_training_has_its_own_interpolation_and_jitter():
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (50, 40, 3)).astype(np.uint8))
    augment = Augmentation(scale=(0.4, 1.0), interpolation="bilinear", color_jitter=(0.25, 0.0, 0.0))
    ours = Transforms(CONFIG, TransformConfig(augment=augment))
    theirs = create_transform(
        input_size=32, is_training=True, use_prefetcher=True, interpolation="bilinear", scale=(0.4, 1.0),
        color_jitter=(0.25, 0.0, 0.0), mean=CONFIG["mean"], std=CONFIG["std"],
    )  # fmt: skip
    with isolated(1):
        a = ours.augment(picture)
    with isolated(1):
        b = theirs(picture)
    np.testing.assert_array_equal(a, b)
    assert ours.card["interpolation"] == "bicubic"


def test_batches_leave_global_randomness_alone(image_set):
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    list(_by_label(image_set(np.arange(4).repeat(30)), augment=True))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()


def test_each_picture_is_transformed_once(image_set):
    images, calls = image_set([0, 1, 2] * 4), []
    original = images.transforms.evaluate
    images.transforms.evaluate = lambda picture: calls.append(1) or original(picture)
    for _ in range(3):
        list(images.batches(np.arange(12), images.labels, 5))
    list(images.batches(np.array([3, 3, 4]), images.labels[[3, 3, 4]], 5))
    assert len(calls) == 12


def test_shuffle_follows_the_generator(image_set):
    images = image_set(np.arange(10))
    orders = [[k for k, _ in _by_label(images)] for _ in range(2)]
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(10)) != orders[0]


def test_from_arrays_refuses_other_shapes():
    with pytest.raises(DataError, match=r"uint8 \[N, H, W\]"):
        sources.from_arrays(np.zeros((2, 3, 8, 8), np.float32), [0, 1], ["a", "b"])
    with pytest.raises(DataError, match="class 'c' has no images"):
        sources.from_arrays(np.zeros((2, 8, 8), np.uint8), [0, 1], ["a", "b", "c"])


def test_one_image_from_disk(picture_folder, backbone, tmp_path):
    root = picture_folder()
    transforms = Transforms(backbone.data_config)
    assert read_image(root / "train" / "ant" / "0.png", transforms).shape == (1, 3, 32, 32)
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "none.png", transforms)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match=r"text\.png: not a readable image"):
        read_image(tmp_path / "text.png", transforms)
