"""The feature store: nothing computed twice, no bit changed by it, nothing damaged trusted, no run ended by it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from marks import slow_beyond
from test_cli import cil  # noqa: F401
from test_runner import settings, stable

from cil import results
from cil.backbone import Backbone
from cil.config import DataConfig, HardwareConfig, TransformConfig
from cil.data.images import ImageSet, LoadedSplit
from cil.data.sources import ImageSource
from cil.data.transforms import Transforms
from cil.errors import StreamError
from cil.features import FeatureCache
from cil.learner import Context
from cil.learners.ncm import NCMLearner
from cil.runner import benchmark, run, run_stages
from cil.store import FeatureStore, Key, open_store
from cil.testing import setting
from cil.tuning import Adapter, Tuner, build_tuner
from cil.tuning.configs import SSFConfig
from cil.utils import hardware
from cil.utils.randomness import isolated

DIGITS = {"dataset": "digits", "per_class": 9}
FROZEN = [
    {"name": "ncm"},
    {"name": "ranpac", "projection": 50},
    {"name": "linear_probe", "epochs": 1},
    {"name": "fecam"},
]
ADAPTER = {"name": "adapter", "bottleneck": 4}
TUNED = [
    {"name": "aper", "epochs": 1, "tuner": ADAPTER},
    {"name": "ranpac", "label": "adapted", "projection": None, "epochs": 1, "tuner": ADAPTER},
    {"name": "ease", "epochs": 1, "bottleneck": 4},
    {"name": "lae", "epochs": 2, "frozen_epochs": 1, "tuner": ADAPTER},
    {"name": "l2p", "epochs": 1, "pool": 3, "top": 2},
]
KEY = Key({"of": "a test"}, {"backbone_name": "none"})
fork = multiprocessing.get_context("fork")


@pytest.fixture
def watched(monkeypatch):
    """What runs do from here on: the backbones they load, and how often each picture is decoded."""
    backbones, reads = [], Counter()
    load, read = benchmark.load_backbones, ImageSource.read

    def loaded(*arguments):
        backbones.append(load(*arguments))
        return backbones[-1]

    def counted(self, index):
        if not hasattr(self, "source"):  # the one below, which opens the file
            reads[self.describe(index)] += 1
        return read(self, index)

    monkeypatch.setattr(benchmark, "load_backbones", loaded)
    monkeypatch.setattr(ImageSource, "read", counted)
    return backbones, reads


def place() -> Path:
    return Path(os.environ["CIL_CACHE"]) / "features"


def kept() -> list[Path]:
    return sorted(place().rglob("*.safetensors"))


def unit(number: int, images: int = 4) -> tuple[list[np.ndarray], torch.Tensor]:
    return [np.arange(images) + 100 * number], torch.full((images, 64), float(number))


def outcome(folder: Path) -> tuple[dict, list[bytes]]:
    found = stable(results.read_run(folder))
    found["config"].pop("hardware")
    files = sorted(p for p in folder.rglob("*.safetensors"))
    assert len(files) == 6
    return found, [p.read_bytes() for p in files]


# --- nothing twice --------------------------------------------------------------------------------------------------


def test_runs_over_the_same_images_touch_neither_backbone_nor_picture(tmp_path, watched):
    """The second of each frozen learner, in another class order, with other head-only settings and another seed."""
    backbones, reads = watched
    run(settings(data=DIGITS), tmp_path / "first")
    assert backbones[0].passes == sum(reads.values()) == 90 + 445  # each picture decoded once as well
    reads.clear()
    changed = [{**entry, "label": f"{entry['name']}2"} for entry in FROZEN]
    folders = run(settings(data=DIGITS, learners=[*FROZEN, *changed], orders=[5], seeds=[3]), tmp_path / "second")
    assert backbones[1].passes == 0 and not reads
    for folder in folders:
        found = results.read_run(folder)
        assert found["summary"]["passes_per_train_image"] == found["summary"]["passes_per_test_image"] == 1
        assert sum(row["costs"]["features_from_store"] for row in found["stages"]) == 90 + 445


def test_with_the_store_off_nothing_is_kept(tmp_path, watched):
    config = settings(data=DIGITS, hardware={"device": "cpu", "feature_store": "off"})
    run(config, tmp_path)
    run(config, tmp_path / "again")
    assert [vit.passes for vit in watched[0]] == [535, 535] and not kept()
    assert settings(hardware={"feature_store": False}).hardware.feature_store == "off"  # as YAML reads it
    assert open_store(HardwareConfig()).place == place()


@pytest.mark.parametrize(
    "entry", slow_beyond([FROZEN[1], TUNED[0]], [*FROZEN[:2], *TUNED]), ids=lambda e: e.get("label", e["name"])
)
def test_no_byte_depends_on_the_store(tmp_path, watched, entry):
    """Predictions, learned state and metrics: store off, empty, full, and filled in another class order."""
    found = {}
    ways = {"off": ("off", [7]), "cold": ("a", [7]), "warm": ("a", [7]), "other": ("b", [3]), "filled": ("b", [7])}
    for way, (folder, orders) in ways.items():
        hardware = {"device": "cpu", "feature_store": "off" if folder == "off" else str(tmp_path / "store" / folder)}
        config = settings(data=DIGITS, learners=[entry], orders=orders, hardware=hardware)
        config = config.model_copy(update={"inference_batch_size": 16})
        found[way] = outcome(run(config, tmp_path / way)[0])
    for way in ("cold", "warm", "filled"):
        assert found[way] == found["off"], way
    passes = [vit.passes for vit in watched[0]]
    assert passes[2] < passes[1] == passes[0]  # the warm one computed less
    if entry in FROZEN:
        assert passes[2] == passes[4] == 0


def test_a_validation_split_reads_what_the_test_on_all_images_left(tmp_path, watched):
    """Its images pass with their class; the costs are those of the images asked for."""
    run(settings(data=DIGITS), tmp_path / "all")
    held = {"increment": 4, "validation": 0.25, "test_on": "validation"}
    warm = results.read_run(run(settings(data=DIGITS, stream=held), tmp_path / "warm")[0])
    assert watched[0][1].passes == 0
    off = {"device": "cpu", "feature_store": "off"}
    cold = results.read_run(run(settings(data=DIGITS, stream=held, hardware=off), tmp_path / "cold")[0])
    assert watched[0][2].passes == 90
    assert stable(warm["stages"]) == stable(cold["stages"])
    for found in (warm, cold):
        assert sum(row["costs"]["train_passes"] + row["costs"]["test_passes"] for row in found["stages"]) == 90
        assert all(row["costs"]["train_passes"] == row["costs"]["train_images"] for row in found["stages"])


def test_prompts_ask_each_test_image_for_its_query_once():
    from cil.learners.l2p import L2P

    rows = setting.Case(L2P, {"epochs": 1}).finished.rows
    seen, new = 6 * np.cumsum(setting.SIZES), 6 * np.array(setting.SIZES)
    assert [row["costs"]["test_passes"] for row in rows] == (seen + new).tolist()


def test_a_picture_is_decoded_once_in_a_run_that_trains(picture_folder, tmp_path, watched):
    data = {"dataset": "folder", "root": str(picture_folder(train=9))}
    learner = {"name": "finetune", "epochs": 2}
    run(settings(data=data, stream={"increment": 1}, learners=[learner]), tmp_path / "r")
    assert len(watched[1]) == 27 + 6 and set(watched[1].values()) == {1}


def test_unreadable_files_are_found_once(picture_folder, tmp_path, watched):
    root = picture_folder(train=4)
    victim = root / "train" / "bee" / "1.png"
    victim.write_bytes(b"no picture")
    data, store = DataConfig(dataset="folder", root=root, on_error="skip"), FeatureStore(tmp_path / "store")
    hardware, reads = HardwareConfig(), watched[1]
    once = LoadedSplit(data, "train", hardware, store)
    once.source.read(0)
    assert len(reads) == 12 and len(once.skipped) == 1
    assert all(count == 1 for name, count in reads.items() if name not in once.skipped)  # looked at and kept
    reads.clear()
    again = LoadedSplit(data, "train", hardware, store)
    assert not reads and again.skipped == once.skipped and again.source.fingerprint == once.source.fingerprint
    np.testing.assert_array_equal(np.asarray(again.source.read(5)), np.asarray(once.source.read(5)))
    [note] = (store.root / "notes").iterdir()
    note.write_text(note.read_text().replace("[", "[9, ", 1))
    assert LoadedSplit(data, "train", hardware, store).skipped == once.skipped  # damaged: looked at again
    victim.write_bytes((root / "train" / "bee" / "0.png").read_bytes())
    assert LoadedSplit(data, "train", hardware, store).skipped == []


# --- the key --------------------------------------------------------------------------------------------------------


def digest(view, images, precision="fp32") -> str | None:
    cache = FeatureCache(hardware.accelerator("cpu", precision), store=FeatureStore(Path("nowhere")))
    key = cache.key(view, images)
    return None if key is None else key.digest


def test_whatever_changes_features_changes_the_key(image_set):
    vit = setting.backbone()
    images = image_set(np.arange(4).repeat(3))
    source = images.source
    small = {"img_size": 32, "patch_size": 8, "depth": 1, "num_classes": 0}
    with isolated(0):
        other = timm.create_model("vit_tiny_patch16_224", **small)
        pooled = timm.create_model("vit_tiny_patch16_224", **small)
        relu = timm.create_model("vit_tiny_patch16_224", act_layer="relu", **small)
    for model in (pooled, relu):  # the same weights, another function
        model.load_state_dict(other.state_dict())
    pooled.global_pool = "max"
    generator = torch.Generator().manual_seed(0)
    adapter = Adapter(vit, 4)
    adapter.reset(generator)
    wider, another, ssf = Adapter(vit, 4, scale=0.2), Adapter(vit, 4), build_tuner(SSFConfig(), vit)
    wider.load_state_dict(adapter.state_dict())
    another.reset(generator)
    dated = ImageSource(source.read, source.labels, source.class_names, describe=str, fingerprint=source.fingerprint)
    dated.stamp = "changed on Monday"
    plain = TransformConfig(normalize="none")
    found = [
        digest(vit, images),
        digest(vit, images, "bf16"),
        digest(vit, image_set(np.arange(4).repeat(3), seed=1)),
        digest(vit, ImageSet(dated, images.transforms)),
        digest(vit, ImageSet(source, Transforms(vit.data_config, plain))),
        *(digest(Backbone(model, "other", vit.data_config), images) for model in (other, pooled, relu)),
        *(digest(partial(vit, tuner=tuner), images) for tuner in (adapter, wider, another, ssf)),
    ]
    assert None not in found and len(set(found)) == len(found)
    again = ImageSet(source, Transforms(vit.data_config, TransformConfig(augment="none")))
    assert digest(setting.backbone(), again) == found[0]  # neither the training transform nor who asks
    copied = Adapter(vit, 4)
    copied.load_state_dict(adapter.state_dict())
    assert digest(partial(vit, tuner=copied.train()), images) == digest(partial(vit, tuner=adapter.eval()), images)


class Mine(Tuner):
    """A user's own: what its code does, no digest tells."""


class Cubed(NCMLearner):
    """Has a view with custom code under the version of the frozen backbone."""

    def views(self):
        return dict.fromkeys(super().views(), lambda images: self.backbone(images) ** 3)


def test_what_cannot_be_told_is_not_kept(image_set, tmp_path):
    vit = setting.backbone()
    images = image_set(np.arange(4).repeat(3))
    compiled = setting.backbone()
    compiled.compile(backend="eager")
    assert digest(partial(vit, tuner=Mine()), images) is None
    assert digest(lambda pixels: vit(pixels), images) is None
    assert digest(compiled, images) is None
    store = FeatureStore(tmp_path / "store")
    stream = setting.stream(vit)
    run_stages(Cubed(Cubed.Config(), vit), stream, accelerator=setting.accelerator(), store=store)
    assert not store.entries()
    ctx = Context(cache=FeatureCache(setting.accelerator(), store=store))
    data = setting.stream(vit).tasks[0].train
    own, _ = ctx.features(Cubed(Cubed.Config(), vit), data)
    frozen, _ = ctx.features(vit, data)  # one version, two functions
    torch.testing.assert_close(own, frozen**3)


def test_guards_are_as_strict_over_a_full_store(tmp_path):
    store, vit = FeatureStore(tmp_path), setting.backbone()
    for _ in range(2):
        stream = setting.stream(vit)
        run_stages(NCMLearner(NCMLearner.Config(), vit), stream, accelerator=setting.accelerator(), store=store)
    assert vit.passes == sum(len(setting.draw_images(split)[1]) for split in ("train", "test"))
    ctx = Context(cache=FeatureCache(setting.accelerator(), store=store))
    with pytest.raises(StreamError, match="task 0"):
        ctx.features(vit, stream.tasks[0].train)
    with stream.open_test() as test:
        test.task(0)
    with pytest.raises(StreamError, match="evaluator only"):
        test.task(0)


# --- what lies on disk ----------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a flipped byte": flip,
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-64]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_bytes(b"not features at all"),
    "another unit's content": lambda file: file.write_bytes(next(p for p in kept() if p != file).read_bytes()),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_computed_again(tmp_path, watched, caplog, damage):
    whole = outcome(run(settings(data=DIGITS), tmp_path / "whole")[0])
    before = {p: p.read_bytes() for p in kept()}
    assert len(before) == 20  # one for each class of either split
    victim = kept()[0]
    DAMAGE[damage](victim)
    assert outcome(run(settings(data=DIGITS), tmp_path / "again")[0]) == whole
    assert 0 < watched[0][1].passes < 60
    assert {p: p.read_bytes() for p in kept()} == before
    warned = [r.getMessage() for r in caplog.records if r.name == "cil.store"]
    line = f"feature store: {victim} is damaged; its features are computed again"
    assert warned == ([] if damage == "gone" else [line])
    run(settings(data=DIGITS), tmp_path / "third")
    assert watched[0][2].passes == 0


def test_least_recently_used_goes_first(tmp_path):
    sizes = FeatureStore(tmp_path / "one")
    sizes.write(KEY, *unit(0))
    cap = 4.5 * sizes.entries()[0].size
    store = FeatureStore(tmp_path / "store", cap)
    for number in range(4):
        store.write(KEY, *unit(number))
        time.sleep(0.02)
    reader = FeatureStore(tmp_path / "store", cap)
    mapped = reader.read(KEY, unit(1)[0])
    time.sleep(0.02)
    assert reader.read(KEY, unit(0)[0]) is not None  # used: no longer the oldest
    time.sleep(0.02)
    store.write(KEY, *unit(4))
    fresh = FeatureStore(tmp_path / "store", cap)
    there = [fresh.read(KEY, unit(number)[0]) is not None for number in range(5)]
    assert there == [True, True, False, True, True]
    for number in range(5, 12):
        store.write(KEY, *unit(number))
        assert sum(entry.size for entry in store.entries()) <= cap
    assert FeatureStore(tmp_path / "store").read(KEY, unit(1)[0]) is None
    assert torch.equal(mapped, unit(1)[1])  # who has it keeps it


def test_features_are_mapped_not_loaded(tmp_path):
    FeatureStore(tmp_path).write(KEY, *unit(1))
    mapped = FeatureStore(tmp_path).read(KEY, unit(1)[0])
    if Path("/proc/self/maps").exists():
        assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert torch.equal(mapped, unit(1)[1])


def _write_all(root: Path, barrier) -> None:
    store, said, handler = FeatureStore(root), [], logging.Handler()
    handler.emit = said.append
    logging.getLogger("cil.store").addHandler(handler)
    barrier.wait()
    for number in range(60):
        store.write(KEY, *unit(number))
        assert torch.equal(FeatureStore(root).read(KEY, unit(number)[0]), unit(number)[1])
    os._exit(len(said))


def test_two_processes_write_the_same_at_once(tmp_path, caplog):
    barrier = fork.Barrier(2)
    both = [fork.Process(target=_write_all, args=(tmp_path, barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    store = FeatureStore(tmp_path)
    assert all(torch.equal(store.read(KEY, unit(number)[0]), unit(number)[1]) for number in range(60))
    assert not caplog.records and not [p for p in tmp_path.rglob(".*") if p.is_file()]


def _die_writing(root: Path) -> None:
    import safetensors.torch

    def half(tensors, path, facts):
        Path(path).write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = half
    FeatureStore(root).write(KEY, *unit(0))


def test_killed_in_the_middle_of_a_write(tmp_path):
    process = fork.Process(target=_die_writing, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    store = FeatureStore(tmp_path)
    [left] = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "key.json"]
    assert store.read(KEY, unit(0)[0]) is None
    store.write(KEY, *unit(0))
    assert torch.equal(FeatureStore(tmp_path).read(KEY, unit(0)[0]), unit(0)[1]) and left.exists()
    os.utime(left, (0, 0))
    store.entries()
    assert not left.exists()  # nobody writes for a day


def test_a_place_that_cannot_be_written_costs_one_line(tmp_path, watched, caplog):
    (tmp_path / "file").write_text("no folder")
    hardware = {"device": "cpu", "feature_store": str(tmp_path / "file")}
    [folder] = run(settings(data=DIGITS, hardware=hardware), tmp_path / "r")
    assert results.read_run(folder)["complete"] and watched[0][0].passes == 535
    [line] = [r.getMessage() for r in caplog.records]
    assert line.startswith(f"feature store: cannot write to {tmp_path / 'file'} (") and "\n" not in line


def _write_little(root: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
    logging.getLogger("cil.store").addHandler(logging.FileHandler(root / "log"))
    store = FeatureStore(root / "store")
    store.write(KEY, *unit(0))
    store.write(KEY, *unit(1))
    os._exit(0)


def test_a_full_disk_costs_one_line(tmp_path):
    process = fork.Process(target=_write_little, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert [p.name for p in (tmp_path / "store").rglob("*") if p.is_file()] == ["key.json"]


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_what_is_there_and_clears_it(cil, tmp_path):  # noqa: F811
    assert ": 0 entries, 0 B of at most 21.5 GB" in cil("cache", "info").stdout
    run(settings(data=DIGITS), tmp_path)
    found = json.loads(cil("cache", "info", "--json").stdout)
    assert found["folder"] == str(place()) and len(found["entries"]) == 2
    assert sorted(entry["images"] for entry in found["entries"]) == [90, 445]
    assert found["bytes"] == sum(p.stat().st_size for p in kept()) == sum(e["bytes"] for e in found["entries"])
    assert "vit_tiny_patch16_224" in cil("cache", "info").stdout
    old = kept()[0]
    os.utime(old, (time.time() - 9 * 86400,) * 2)
    assert "1 files removed" in cil("cache", "clear", "--older-than", 8).stdout
    assert not old.exists() and len(kept()) == 19
    assert "19 files removed" in cil("cache", "clear").stdout and not kept()
    assert "0 files removed, 0 B freed" in cil("cache", "clear", "--folder", tmp_path / "none").stdout
