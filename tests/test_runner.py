"""The stage loop: passes counted, what a run leaves, resuming, refusing, and the evaluator against plain counting."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cil import metrics, results
from cil.config import Config
from cil.errors import CilError, RunError
from cil.features import FeatureCache
from cil.learners.ncm import NCMLearner
from cil.prediction import restore
from cil.runner import checkpoint, run, run_stages
from cil.runner.checkpoint import RunFolder, split_state
from cil.runner.evaluation import evaluate
from cil.stream import Stream
from cil.stream.protocol import ClassIncremental, DomainIncremental
from cil.testing import Case
from cil.testing.setting import SIZES, accelerator, backbone

TINY = {
    "name": "vit_tiny_patch16_224",
    "weights": "random",
    "options": {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2},
}
VOLATILE = (
    *("seconds", "seconds_learn", "seconds_test", "peak_memory_bytes", "features_from_store"),
    *("log", "machine", "versions"),
)


FAST = {
    "name": "t",
    "backbone": TINY,
    "stream": {"increment": 4},
    "learners": ["ncm"],
    "hardware": {"device": "cpu"},
}
"""A fast benchmark on the digits with a one-block random backbone."""


def settings(**changes) -> Config:
    return Config.model_validate({**FAST, **changes})


def stable(value):
    """A result without what time and machine decide."""
    if isinstance(value, dict):
        return {k: stable(v) for k, v in value.items() if k not in VOLATILE}
    return [stable(v) for v in value] if isinstance(value, list) else value


def count_images(vit):
    seen: Counter[bytes] = Counter()
    vit.register_forward_pre_hook(lambda module, args: seen.update(image.numpy().tobytes() for image in args[0]))
    return seen


def test_ncm_sends_every_image_through_exactly_once(image_set):
    """Ten tasks, each train and each test image once, counted image by image at the backbone's door."""
    vit = backbone()
    train, test = image_set(np.arange(10).repeat(7), seed=1), image_set(np.arange(10).repeat(5), seed=2)
    seen = count_images(vit)
    stream = Stream(train, test, ClassIncremental(1993, increment=1))
    rows = run_stages(NCMLearner(NCMLearner.Config(), vit), stream, accelerator=accelerator(), batch_size=16)
    assert len(rows) == 10
    assert len(seen) == 120 and set(seen.values()) == {1}
    assert vit.passes == 120
    assert [r["costs"]["train_passes"] for r in rows] == [7] * 10 and [r["costs"]["test_passes"] for r in rows] == [
        5
    ] * 10


def test_a_learner_whose_eyes_change_is_recomputed_and_only_it():
    from cil.learners.finetune import Finetune

    rows = Case(Finetune, {"epochs": 1}).finished.rows
    seen = np.cumsum(SIZES)
    assert [r["costs"]["test_passes"] for r in rows] == (seen * 6).tolist()
    assert [r["unchanged_since"] for r in rows] == [[0], [1], [2]]


def test_evaluator_against_plain_counting():
    done = Case(NCMLearner).run(stop_after=2)
    learner, stream = done.learner, done.stream
    found = evaluate(learner, stream, 1, FeatureCache(accelerator(), 16))
    with stream.open_test() as test:
        for j in range(2):
            indices, labels = test.task(j)
            images = next(test.images.batches(indices, labels, 999))[0]
            scores = learner.logits(learner.features(images))
            predicted = scores.argmax(1).numpy()
            own = list(stream.tasks[j].classes)
            within = np.array(own)[scores[:, own].argmax(1).numpy()]
            assert done.rows[1]["correct"][j] == (predicted == labels).sum()
            assert done.rows[1]["correct_within_task"][j] == (within == labels).sum()
            mine = {i: (p, w) for i, p, w in zip(found.index, found.predicted, found.within, strict=True)}
            assert [mine[i] for i in indices] == list(zip(predicted, within, strict=True))
    task_of = np.array([0, 0, 0, 0, 1])
    assert done.rows[1]["task_id_accuracy"] == pytest.approx((task_of[found.predicted] == task_of[found.label]).mean())
    assert done.rows[1]["top5_accuracy"] == 1.0  # five classes
    assert len(set(np.flatnonzero(np.diff(found.task)))) > 3  # tasks are mixed, not one after the other


def test_accuracy_splits_into_task_and_within():
    """A = TP × accuracy given the right task, exactly."""
    done = Case(NCMLearner).finished
    found = evaluate(done.learner, done.stream, 2, FeatureCache(accelerator(), 16))
    task_of = np.repeat(range(3), SIZES)
    right_task = task_of[found.predicted] == found.task
    hit = found.predicted == found.label
    assert hit.mean() == pytest.approx(right_task.mean() * hit[right_task].mean())


def test_domain_incremental_run(image_set):
    train, test = image_set(np.tile([0, 1], 10)), image_set(np.tile([0, 1], 6), seed=1)
    train.domains, test.domains = np.arange(2).repeat(10), np.arange(2).repeat(6)
    rows = run_stages(
        NCMLearner(NCMLearner.Config(), backbone()), Stream(train, test, DomainIncremental()), accelerator=accelerator()
    )
    assert rows[1]["total"] == [6, 6] and rows[1]["correct"] == rows[1]["correct_within_task"]
    assert rows[1]["task_id_accuracy"] is None


def test_domains_from_folders_to_metrics(picture_folder, tmp_path):
    root = tmp_path / "domains"
    for name in ("photo", "sketch", "clip"):
        picture_folder(root=root / name, train=6, test=4)
    data = {"dataset": "folder", "root": str(root), "domains": ["photo", "sketch", "clip"]}
    [folder] = run(settings(data=data, stream={"type": "domain_incremental"}), tmp_path)
    found = results.read_run(folder)
    assert found["tasks"] == [[0, 1, 2]] * 3 and found["stages"][-1]["total"] == [12, 12, 12]
    assert found["summary"]["task_id_accuracy"] is None
    learner, _, names = restore(folder, accelerator())
    assert learner.seen == len(names) == 3


@pytest.mark.parametrize("entry", [{"name": "ncm"}, {"name": "finetune", "epochs": 1, "train_batch_size": 32}])
def test_streaming_from_disk_gives_the_same_results_as_memory(picture_folder, tmp_path, entry):
    """hardware.memory_gib is no part of the experiment: worker processes that decode on the fly change no bit."""
    data = {"dataset": "folder", "root": str(picture_folder(train=30, test=25))}
    found = []
    for memory in (4, 0):
        config = settings(
            data=data,
            stream={"increment": 2},
            learners=[entry],
            hardware={"device": "cpu", "memory_gib": memory, "feature_store": "off"},
        )
        found.append(results.read_run(run(config, tmp_path / str(memory))[0]))
    for result in found:
        result["config"].pop("hardware")
    assert stable(found[0]) == stable(found[1])


def test_what_a_run_leaves(tmp_path):
    [folder] = run(settings(), tmp_path)
    assert folder == tmp_path / "t" / "ncm" / "order1993-seed0"
    names = {p.name for p in folder.iterdir() if not p.name.startswith("events.")}
    assert names == {"config.yaml", "metrics.json", "run.lock", "stage-00", "stage-01", "stage-02"}
    assert {p.name for p in (folder / "stage-02").iterdir()} == {
        "learner.safetensors",
        "learner.json",
        "predictions.safetensors",
        "stage.json",
    }
    found = results.read_run(folder)
    assert found["complete"] and [len(t) for t in found["tasks"]] == [4, 4, 2]
    assert found["class_order"] == np.random.RandomState(1993).permutation(10).tolist()
    assert (
        found["class_names"][0]
        == ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"][found["class_order"][0]]
    )
    assert len(found["backbone"]["sha256"]) == len(found["data"]["train"]["sha256"]) == 64
    assert found["versions"]["timm"] and found["chosen_by"] == "default"
    predictions = load_file(folder / "stage-02" / "predictions.safetensors")
    hits = (predictions["predicted"] == predictions["label"]).float().mean().item()
    assert found["summary"]["accuracy_last"] == pytest.approx(hits)
    r = np.array(found["accuracy_matrix"], dtype=float)
    assert metrics.forgetting(r) == pytest.approx(found["summary"]["forgetting"])
    counts = results.confusion(folder, 2)
    assert counts.shape == (10, 10) and counts.sum() == len(predictions["label"]) == 445
    assert counts.diagonal().sum() == (predictions["predicted"] == predictions["label"]).sum()
    files = [p for p in folder.rglob("*") if p.is_file()]
    plain = {".json", ".yaml", ".safetensors", ".lock"}
    assert all(p.suffix in plain or p.name.startswith("events.out.tfevents.") for p in files)
    assert not any(
        p.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK") for p in files
    )  # pickle, torch zip


def test_class_order_and_training_seed_are_separate_axes(tmp_path):
    config = settings(learners=[{"name": "linear_probe", "epochs": 1}], orders=[1, 2], seeds=[0, 1])
    found = [results.read_run(f) for f in run(config, tmp_path)]
    orders = [tuple(f["class_order"]) for f in found]
    assert orders[0] == orders[1] != orders[2] == orders[3]
    assert stable(found[0]["stages"]) != stable(found[1]["stages"])


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "ncm"},
        {"name": "linear_probe", "epochs": 2},
        {"name": "finetune", "epochs": 1, "train_batch_size": 256},
    ],
)
def test_a_resumed_run_ends_with_the_same_metrics(tmp_path, entry, monkeypatch):
    import cil.runner.benchmark as runner

    config = settings(learners=[entry])
    [whole] = run(config, tmp_path / "whole")
    original = runner.run_stages
    for stop in (1, 2):
        part = tmp_path / f"stopped after {stop}"
        monkeypatch.setattr(runner, "run_stages", lambda *a, n=stop, **k: original(*a, **{**k, "stop_after": n}))
        [half] = run(config, part)
        assert not results.read_run(half)["complete"] and RunFolder(half).finished() == stop
        monkeypatch.setattr(runner, "run_stages", original)
        run(config, part)
        assert stable(results.read_run(half)) == stable(results.read_run(whole))
        for stage in range(3):
            for name in ("learner.safetensors", "predictions.safetensors"):
                one, two = (load_file(f / f"stage-{stage:02d}" / name) for f in (whole, half))
                assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_finished_runs_are_skipped(tmp_path, monkeypatch):
    import cil.runner.benchmark as runner

    [folder] = run(settings(), tmp_path)
    before = (folder / "metrics.json").stat().st_mtime_ns
    monkeypatch.setattr(runner, "run_stages", lambda *a, **k: pytest.fail("a finished run was run again"))
    run(settings(hardware={"device": "cpu", "workers": 0}), tmp_path)  # another machine is not another run
    assert (folder / "metrics.json").stat().st_mtime_ns == before
    (folder / "stage-02" / "learner.safetensors").unlink()  # nor are weights needed to know it is finished
    run(settings(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"stream": {"increment": 5}}, "stream.increment = 4, now 5"),
        ({"learners": [{"name": "ncm", "metric": "euclidean"}]}, "learners.0.metric = 'cosine', now 'euclidean'"),
        ({"transform": {"normalize": "none"}}, "transform.normalize = 'backbone', now 'none'"),
        (
            {"backbone": {**TINY, "options": {**TINY["options"], "depth": 2}}},
            "backbone weights|backbone.options.depth = 1, now 2",
        ),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path, changes, key):
    [folder] = run(settings(), tmp_path)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match=f"holds a run with .*({key}).*another --results"):
        run(settings(**changes), tmp_path)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("value", ["timm", "explicit"])
def test_a_folder_from_before_a_key_was_there_holds_the_run_at_its_default(tmp_path, value):
    [folder] = run(settings(), tmp_path)
    found = json.loads((folder / "metrics.json").read_text())
    del found["config"]["backbone"]["attention"], found["checksum"]
    del found["config"]["learners"][0]["metric"], found["config"]["learners"][0]["layers"]
    (folder / "metrics.json").write_text(json.dumps(found))
    again = settings(backbone={**TINY, "attention": value})
    if value == "timm":
        assert run(again, tmp_path) == [folder]
    else:
        with pytest.raises(RunError, match=r"backbone\.attention = 'timm', now 'explicit'"):
            run(again, tmp_path)


def test_a_later_run_that_cannot_be_is_found_before_the_first_starts(tmp_path):
    with pytest.raises(CilError, match="must have each of the 10 classes once"):
        run(settings(orders=[1993, [0, 1, 2]]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_results_are_named(tmp_path):
    [folder] = run(settings(), tmp_path)
    (folder / "metrics.json").write_text("{")
    with pytest.raises(RunError, match=r"metrics\.json: damaged"):
        run(settings(), tmp_path)
    (folder / "metrics.json").unlink()
    with pytest.raises(RunError, match=r"no metrics\.json"):
        run(settings(), tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path):
    [folder] = run(settings(), tmp_path)
    file = folder / "stage-02" / "learner.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(RunError, match=r"stage-02.learner\.safetensors: is damaged"):
        restore(folder, accelerator())
    file.unlink()
    with pytest.raises(RunError, match="weights were not kept"):
        restore(folder, accelerator())


@pytest.mark.parametrize("keep", ["last", "auto"])
def test_only_the_last_weights_are_kept_when_asked_or_large(keep, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LARGE", 0 if keep == "auto" else checkpoint.LARGE)
    [folder] = run(settings(hardware={"device": "cpu", "checkpoints": keep}), tmp_path)
    assert [(folder / f"stage-{i:02d}" / "learner.safetensors").exists() for i in range(3)] == [False, False, True]
    learner, _, names = restore(folder, accelerator())
    assert len(names) == 10 and learner.seen == 10


def test_restored_learner_predicts_as_it_did(tmp_path):
    [folder] = run(settings(), tmp_path)
    learner, transforms, _ = restore(folder, accelerator())
    from cil.data.images import ImageSet
    from cil.data.sources import digits

    images = ImageSet(digits("test"), transforms)
    saved = load_file(folder / "stage-02" / "predictions.safetensors")
    batch, _ = next(images.batches(saved["index"].numpy(), saved["label"].numpy(), 999))
    assert torch.equal(learner.predict(batch), saved["predicted"])


def test_validation_instead_of_test(tmp_path):
    config = settings(stream={"increment": 4, "validation": 0.25, "test_on": "validation"})
    found = results.read_run(run(config, tmp_path)[0])
    assert found["tested_on"] == "validation"
    assert sum(found["stages"][-1]["total"]) == pytest.approx(0.25 * 1352, abs=10)
    assert sum(s["costs"]["train_images"] for s in found["stages"]) + sum(found["stages"][-1]["total"]) == 1352


NAN_LEARNER = """
from cil.learners.linear_probe import LinearProbe
from cil.training.batches import TensorData
from cil.training import ParamGroup, fit

class Nan(LinearProbe):
    def learn(self, task, ctx):
        if task.index == 2:
            def loss(inputs, labels):
                logits = self.head(inputs)
                return logits.sum() * float("nan"), logits
            data = TensorData(*ctx.features(self, task.train))
            fit(loss, [ParamGroup(self.head.parameters())], data, self.config, ctx)
        super().learn(task, ctx)
"""


def test_nan_loss_stops_and_keeps_the_last_good_stage(tmp_path):
    (tmp_path / "nan.py").write_text(NAN_LEARNER)
    config = settings(learners=[{"class": f"{tmp_path / 'nan.py'}:Nan", "epochs": 1}])
    with pytest.raises(CilError, match="stage 2, epoch 0: the training loss is nan"):
        run(config, tmp_path)
    folder = tmp_path / "t" / "Nan" / "order1993-seed0"
    found = results.read_run(folder)
    assert not found["complete"] and len(found["stages"]) == 2
    learner, _, names = restore(folder, accelerator())
    assert learner.seen == len(names) == 8


def test_extra_state_must_be_json():
    with pytest.raises(RunError, match="not JSON"):
        split_state({"a": torch.zeros(1), "_extra_state": object()})
    tensors, extra = split_state({"a": torch.zeros(1), "_extra_state": {"k": [1, 2]}})
    assert list(tensors) == ["a"] and json.dumps(extra)


def test_per_image_counts_are_integers_everywhere(tmp_path):
    found = results.read_run(run(settings(), tmp_path)[0])
    for row in found["stages"]:
        assert all(isinstance(v, int) for v in row["correct"] + row["correct_within_task"] + row["total"])
        assert all(
            c <= w <= t for c, w, t in zip(row["correct"], row["correct_within_task"], row["total"], strict=True)
        )
