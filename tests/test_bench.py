"""The benches run and write what they say they do; and what was made faster gives the same bits as before."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import sys

import numpy as np
import pytest
import torch
from comparisons import header
from comparisons import rows as rows_of
from torch import nn

from cil import results
from cil.classifiers import Mahalanobis
from cil.config import Augmentation, TransformConfig
from cil.data.images import ImageSet
from cil.data.sources import from_arrays
from cil.data.transforms import Transforms
from cil.errors import TrainingError
from cil.testing.setting import backbone, context
from cil.training import ParamGroup, Recipe, fit, loop
from cil.training.batches import TensorData


@pytest.fixture
def script(monkeypatch):
    """Import a script; its ``main`` is run with the arguments given."""
    threads = torch.get_num_threads()

    def load(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return importlib.import_module(f"scripts.{name}")

    yield load
    torch.set_num_threads(threads)


# --- the benches ----------------------------------------------------------------------------------------------------


def test_throughput(script, tmp_path):
    parts = ["--parts", "evaluation", "training", "attention", "--tuners", "adapter", "full"]
    script("bench.throughput", "--quick", "--sizes", "small", *parts, "--out", tmp_path).main()
    found = json.loads((tmp_path / "throughput_quick.json").read_text(encoding="utf-8"))
    assert found["machine"]["threads"] == 1 and found["versions"]["torch"] in torch.__version__
    for size in found["sizes"].values():
        sides = [("evaluation", "evaluation", {"steady", "decoding"})]
        sides += [("training", tuner, {"plain", "augmented"}) for tuner in ("adapter", "full")]
        sides += [("attention", what, {"explicit"}) for what in ("forward", "backward")]
        for part, what, ours in sides:
            measured = size[part][what]
            assert measured.keys() == {"bare", *ours} and measured["bare"]["images_per_second"] > 0
            assert all(0 < measured[o]["lowest"] <= measured[o]["share"] <= measured[o]["highest"] for o in ours)
    assert (tmp_path / "throughput_quick.png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(script, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        script("bench.throughput", "--device", "cuda", "--out", tmp_path).main()
    assert ended.value.code == 2 and "torch finds no cuda device here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_tuner_is_benched(script):
    from cil.tuning import configs

    names = {section.model_fields["name"].default for section in configs.TunerSection.__args__}
    assert set(script("bench.throughput").TUNERS["tiny"]) == names


@pytest.mark.slow
def test_growth(script, tmp_path, monkeypatch):
    bench = script("bench.growth", "--quick", "--out", tmp_path)

    def here(arguments, what, *numbers):
        if what == "ridge":
            return bench.ridge(arguments.width, *numbers)
        return bench.grow(what, *numbers, arguments.classes, arguments.width)

    monkeypatch.setattr(bench, "in_own_process", here)  # every process takes seconds to start
    bench.main()
    found = json.loads((tmp_path / "growth_quick.json").read_text(encoding="utf-8"))
    assert found["heads"].keys() == found["last_over_first"].keys() == found["by_nature"].keys() == set(bench.HEADS)
    for runs in found["heads"].values():
        for tasks, rows in runs.items():
            assert [row["classes"] for row in rows] == list(range(16 // int(tasks), 17, 16 // int(tasks)))
            # in this process memory of other tests is freed meanwhile, so the peak may be below the start
            assert all(row["learn"] > 0 and math.isfinite(row["peak_mib"]) for row in rows)
            assert np.mean([row["accuracy"] for row in rows]) > 0.2  # they learned something
    kept = [row["kept_mib"] for row in found["heads"]["fecam"]["4"]]
    assert kept == pytest.approx([c * (36 + 8 + 1) * 8 / 2**20 for c in (4, 8, 12, 16)])
    assert [stage["solves"] for stage in found["ridge"]["stages"]] == [1, 2]
    assert (tmp_path / "growth_quick.png").stat().st_size > 1000


def test_heads(script, tmp_path, monkeypatch):
    """Both sides of every comparison are there, and what they predict is the same where the code is."""
    bench, out = importlib.import_module("scripts.bench.heads"), tmp_path / "heads.json"
    monkeypatch.setattr(
        bench,
        "in_own_process",
        lambda head, classes, given, checkout: bench.measure(
            head, classes, given.per_class, given.width, given.projection, given.tested
        ),
    )
    size = ["--classes", 10, 15, "--width", 8, "--projection", 24, "--tested", 9]
    first = ["ranpac", "fecam"]
    for heads in first, [head for head in bench.HEADS if head not in first]:  # one after the other, into one file
        script("bench.heads", "--heads", *heads, *size, "--against", tmp_path, "--out", out).main()
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["heads"].keys() == bench.HEADS.keys()
    for head, sizes in found["heads"].items():
        assert sizes.keys() == {"10", "15"}
        for classes, sides in sizes.items():
            assert sides["ours"]["seconds"]["learn"] > 0
            if "rank" not in head:
                assert sides["ours"]["scores"] == sides["against"]["scores"]
            if head.startswith(("ranpac", "fecam")):  # one epoch of alignment teaches the others little
                assert sides["ours"]["accuracy"] > 0.2
            low = int(classes) * 8 * 9  # rank 10 of width 8 is 8 rows and a diagonal
            kept = {"ranpac": 24 * 25 // 2}.get(head, low if "rank" in head else low // 2) * 8 / 2**20
            assert kept < sides["ours"]["checkpoint_mib"] < kept + 0.03
            assert ("align" in sides["ours"]["seconds"]) == (not head.startswith(("ranpac", "fecam")))


def test_startup_takes_the_median_of_pairs(script, tmp_path):
    """The processes themselves are started by the test of the page's command."""
    from scripts.publish.benches import startup as table

    class Fixed:
        def __init__(self, *seconds):
            self.seconds = lambda case, left=list(seconds): left.pop(0)

    sides = {"ours": Fixed(1.0, 3.0, 2.0), "against": Fixed(4.0, 4.0, 20.0)}
    found = importlib.import_module("scripts.bench.startup").compare("a", sides, 3)
    assert found == {
        "ours": {"cpu_seconds": 2.0},
        "against": {"cpu_seconds": 4.0},
        "ratio": 0.25,
        "lowest": 0.1,
        "highest": 0.75,
    }
    (tmp_path / "s.json").write_text(json.dumps({"cases": {"a": found, "b": {"ours": {"cpu_seconds": 1.5}}}}))
    rows = table(tmp_path / "s.json").splitlines()[2:]
    assert rows == ["| a | 4.00 | 2.00 | 0.25 (0.10 to 0.75) |", "| b | – | 1.50 | – |"]


@pytest.mark.slow
def test_our_side_beside_pilot(script, tmp_path, monkeypatch):
    from scripts.publish.benches import pilot as table

    out, bench = tmp_path / "pilot.json", importlib.import_module("scripts.bench.pilot")
    monkeypatch.setattr(bench.stages, "time", bench.stages.time)  # put back afterwards
    for learner in "simplecil", "lae":  # one after the other, into one file
        script("bench.pilot", "--small", "--per-class", 4, "--learners", learner, "--out", out).main()
    found = json.loads(out.read_text(encoding="utf-8"))["learners"]
    assert list(found) == ["simplecil", "lae"] and found["simplecil"]["accuracy_last"] > 0.5
    for run in found.values():
        assert run["total"] == pytest.approx(run["learning"] + run["testing"] + run["rest"])
        assert min(run["learning"], run["testing"], run["rest"]) > 0
    assert found["lae"]["learning"] > found["simplecil"]["learning"] and "| lae |" in table(out)
    script("bench.pilot", "--small", "--per-class", 4, "--images", tmp_path / "images").main()
    files = sorted(path.relative_to(tmp_path / "images") for path in (tmp_path / "images").rglob("*.png"))
    assert len(files) == 20 * (4 + 2) and files[0].as_posix() == "test/class 00/0000.png"


@pytest.mark.slow
def test_records(script, tmp_path):
    out = tmp_path / "records.json"
    script("bench.records", "--tasks", "3", "--out", out).main()
    found = json.loads(out.read_text(encoding="utf-8"))
    stream = found["streams"]["3"]
    assert found["machine"]["processor"] and stream["tasks"] == 3 and stream["computing"] > 0
    assert list(stream["parts"]) == ["stage_folder", "checksum", "metrics", "tensorboard"]
    assert sum(stream["parts"].values()) > 0 and 0 < stream["recording_stage"] <= stream["recording"]
    assert stream["bytes"]["learner.safetensors"] > 0


def test_step_variants_train_the_same_weights(script, tmp_path):
    out, variants = tmp_path / "v.json", ["same", "micro", "no_graph", "prefix", "training"]
    script(
        "bench.step_variants",
        "--tuners",
        "late_adapter",
        "--variants",
        *variants,
        "--images",
        4,
        "--pairs",
        1,
        "--out",
        out,
    ).main()
    found = json.loads(out.read_text(encoding="utf-8"))["tuners"]["late_adapter"]
    assert list(found) == variants and found["training"]["images"] == 8
    assert {name: one["difference"] for name, one in found.items() if name != "micro"} == dict.fromkeys(
        ("same", "no_graph", "prefix", "training"), 0.0
    )
    assert found["micro"]["difference"] < 1e-4 and found["prefix"]["kept_bytes_per_image"] == 65 * 192 * 4


def test_the_gpu_kit_needs_a_gpu_and_says_so(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script("bench.gpu", "--out", tmp_path / "gpu.json").main()
    assert "no CUDA device here: nothing is measured" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_parts_of_the_gpu_kit(script, tmp_path, monkeypatch):
    """All of them on the CPU, with small models; the process that shares the device runs in this one."""
    out, kit = tmp_path / "gpu.json", importlib.import_module("scripts.bench.gpu")
    monkeypatch.setattr(kit.Kit, "two_processes", lambda self: {"1": [self.forwards()]})
    script("bench.gpu", "--quick", "--device", "cpu", "--out", out).main()
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["left_out"] == [] and found["equality"] == {"ncm": 0.0}  # a device equals itself
    assert list(found["shares"]) == ["small bf16", "small fp32"] and found["two_processes"]["1"][0] > 0
    assert all(found["shares"]["small fp32"][what][side]["share"] > 0 for what, side in SHARES)
    assert min(found["input"].values()) > 0 and found["memory"]["linear_probe"]["peak_mib"] >= 0
    script("bench.gpu", "--quick", "--device", "cpu", "--out", out, "--minutes", "0").main()
    rest = json.loads(out.read_text(encoding="utf-8"))
    assert rest["left_out"] == [f"{part} {what}".strip() for part, what, _ in kit.Kit(QUICK).parts()]


SHARES = (("evaluation", "steady"), ("evaluation", "decoding"), ("adapter", "plain"), ("adapter", "augmented"))
QUICK = argparse.Namespace(quick=True, device="cpu")


def test_flatness_by_hand(script):
    rows = [{"classes": 2, "learn": 9.0, "solve": 9.0}]
    rows += [{"classes": 2 + 2 * t, "learn": float(t), "solve": 1.0} for t in range(1, 10)]
    assert script("bench.growth").flatness(rows) == {"learn": 8.5 / 1.5, "learn_and_solve": 9.5 / 2.5}


def test_wide_features(script, tmp_path, monkeypatch):
    from scripts.publish.benches import wide as table

    out, bench = tmp_path / "wide.json", importlib.import_module("scripts.bench.wide")
    monkeypatch.setattr(bench, "in_own_process", lambda head, width, given: bench.measure(head, width, given.float32))
    script("bench.wide", "--widths", 16, 24, "--decomposed", 16, "--memory", 0.0003, "--float32", "--out", out).main()
    heads = json.loads(out.read_text(encoding="utf-8"))["heads"]
    for name, rows in heads.items():
        for width, row in rows.items():
            assert row["estimate_kept_mib"] <= row["estimate_mib"]
            if too_wide := (name.endswith("_gcv") and width == "24") or row["estimate_mib"] > 0.0003 * 1024:
                assert "learn" not in row
            else:  # what it keeps is its estimate, and the counts of 50 classes
                assert row["kept_mib"] * 2**20 == pytest.approx(row["estimate_kept_mib"] * 2**20 + 400, abs=16)
            assert too_wide == ("not run" in next(e for e in table(out).splitlines() if f"| {name} | {width} |" in e))
    assert "float32_moves" in heads["slda"]["16"] and "learn" not in heads["fecam"]["24"]


@pytest.mark.slow
def test_steps(script, tmp_path, monkeypatch):
    out, bench = tmp_path / "steps.json", importlib.import_module("scripts.bench.steps")
    monkeypatch.setattr(bench, "in_own_process", lambda name, given: bench.measure(name, given.model, given.images))
    for name in ("linear_probe", "ssiat"):
        script("bench.steps", "--learners", name, "--model", "vit_tiny_patch16_224", "--out", out).main()
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["machine"]["processor"] and list(found["learners"]) == ["linear_probe", "ssiat"]
    probe, ssiat = found["learners"].values()
    assert [row["trained"] for row in probe["tasks"]] == [2 * 193, 4 * 193]
    assert ssiat["settings"]["first_epochs"] == 1 and [row["passes"] for row in ssiat["tasks"]] == [2, 3]
    covariances = 2 * (192 * 193 // 2 + 192 + 1) * 8  # of two classes, in float64
    assert ssiat["grows_mib"] * 2**20 == pytest.approx(covariances + 2 * 192 * 4 + 16)
    assert all(0 < row["seconds_step"] < row["seconds"] for row in ssiat["tasks"])
    # in this process memory of other tests is freed meanwhile, so the peak may be below the start
    assert all(math.isfinite(row["peak_mib"]) for row in ssiat["tasks"])


def test_a_long_stream(script, tmp_path, picture_folder):
    root = picture_folder(train=4, test=2)
    size = ["--classes", 1, "--per-class", 3, "--tested", 1, "--projection", 16]
    script("bench.long", "--train", root / "train", "--test", root / "val", *size, "--out", tmp_path).main()
    found = json.loads((tmp_path / "long.json").read_text(encoding="utf-8"))
    for run in found["learners"].values():
        assert run["tasks"] == 3 == len(run["seconds_learn"]) == len(run["peak_memory_bytes"])
        assert len(run["seconds_between"]) == 2 and min(run["seconds_between"]) >= 0
    assert (tmp_path / "long.png").stat().st_size > 1000


# --- what was made faster -------------------------------------------------------------------------------------------


def many(count, **options):
    pixels = np.random.RandomState(0).randint(0, 256, (count, 12, 12, 3)).astype(np.uint8)
    source = from_arrays(pixels, np.arange(count) % 2, ["ant", "bee"])
    chosen = TransformConfig(augment=Augmentation(color_jitter=0.3))
    return ImageSet(source, Transforms(backbone().data_config, chosen), **options)


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize("augment", [True, False])
def test_processes_that_feed_a_gpu_give_what_one_process_gives(augment):
    images, count = many(600), 600
    items = [(i, i + 7 if augment else None) for i in range(count)]
    parts = [items[start : start + 64] for start in range(0, count, 64)]
    before = torch.get_rng_state()
    for here, ahead in zip(images.load(parts, gpu=False), images.load(parts, gpu=True), strict=True):
        assert torch.equal(here, ahead)
    assert torch.equal(before, torch.get_rng_state())


def test_a_pass_that_ends_early_transforms_no_more_than_it_gave():
    images, calls = many(20), []
    original = images.transforms.evaluate
    images.transforms.evaluate = lambda picture: calls.append(1) or original(picture)
    first = next(iter(images.batches(np.arange(20), images.labels, 4)))[0]
    assert len(calls) == 4
    repeated = np.array([0, 1, 5, 5, 6, 5])
    batches = [pixels for pixels, _ in images.batches(repeated, images.labels[repeated], 3)]
    assert len(calls) == 6 and torch.equal(batches[0][:2], first[:2]) and torch.equal(batches[0][2], batches[1][2])
    expected = torch.cat([many(20, memory_bytes=0).batches(repeated, repeated, 6).__next__()[0]])
    assert torch.equal(torch.cat(batches), expected)


@pytest.fixture
def problem():
    x = torch.randn(70, 5, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long()


@pytest.mark.parametrize("every", [2, 3, 100])
def test_losses_read_later_are_the_same(problem, every, monkeypatch):
    def trained():
        logged, weight = [], nn.Parameter(torch.zeros(2, 5))
        ctx = context(log=lambda name, value: logged.append((name, value)))

        def loss(inputs, labels):
            logits = inputs @ weight.T
            return nn.functional.cross_entropy(logits, labels), logits

        fit(loss, [ParamGroup([weight])], TensorData(*problem), Recipe(epochs=2, train_batch_size=16, lr=0.5), ctx)
        return weight.detach(), [entry for entry in logged if entry[0] != "images_per_second"]

    weight, logged = trained()
    monkeypatch.setattr(loop, "sync_interval", lambda device: every)
    assert torch.equal(weight, trained()[0]) and logged == trained()[1]


def test_a_loss_that_is_not_finite_is_found_later_too_and_named_as_it_first_was(problem, monkeypatch):
    monkeypatch.setattr(loop, "sync_interval", lambda device: 3)
    weight, values = nn.Parameter(torch.zeros(2, 5)), iter([1.0, float("inf"), float("nan"), 1.0, 1.0])

    def loss(inputs, labels):
        logits = inputs @ weight.T
        return logits.sum() * 0 + next(values), logits

    with pytest.raises(TrainingError, match="the training loss is inf"):
        fit(loss, [ParamGroup([weight])], TensorData(*problem), Recipe(train_batch_size=16), context())
    assert next(values) == 1.0  # asked after the third step, not at the epoch's end


def test_covariances_that_grow_in_place_are_those_of_one_fit(tmp_path):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(90, 6, generator=g), torch.arange(30).repeat_interleave(3)
    whole, grown, places = Mahalanobis(6).partial_fit(x, y), Mahalanobis(6), []
    for c in range(30):
        grown.grow(c + 1)
        grown.partial_fit(x[y == c], y[y == c])
        places.append(grown.triangles.data_ptr())
    assert len(set(places)) < 15  # copied now and then, not for every class
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(grown.state_dict()[name], value)
    assert torch.equal(grown.logits(x).argmax(1), whole.logits(x).argmax(1))

    other, kept = copy.deepcopy(grown), grown.triangles.clone()
    for classifier in (grown, other):
        classifier.grow(33)
        assert not classifier.triangles[30:].any()
    other.partial_fit(x[:3], torch.tensor([30, 31, 32]))
    assert not grown.triangles[30:].any() and torch.equal(grown.triangles[:30], kept)

    fresh = Mahalanobis(6)
    fresh.load_state_dict(other.state_dict())
    fresh.grow(40)
    assert torch.equal(fresh.triangles[:33], other.triangles) and not fresh.triangles[33:].any()
    assert len(fresh.to(torch.float32).triangles) == 40


def test_stage_costs_by_hand(script, tmp_path, capsys):
    """Seconds are means of five stages, the rest a stage's own; bytes of three kinds are added."""

    def stage(t, log):
        costs = {"seconds_learn": t, "seconds_test": 2 * t, "peak_memory_bytes": (t + 1) * 2**20}
        kept = {"parameter_bytes": t * 2**20, "statistics_bytes": 2**19, "exemplar_bytes": 2**19}
        costs["test_passes"] = 2 * 30 * t  # two a view, as with prompts, and 30 images; read of the first stage alone
        costs |= {"trainable_parameters": 0, "train_images": 5, "train_passes": 5, **kept}
        [row] = rows_of([[30] * t])
        counts = dict.fromkeys(("correct", "correct_within_task", "total"), [30] * t)
        return {**row, **counts, "costs": costs, "unchanged_since": list(range(t)), "log": log}

    for name, log in (("bank", []), ("closed", [["condition_number", 1e3], ["condition_number", 1e4]])):
        about = {**header(name), "tasks": [[label] for label in range(20)]}
        run = results.assemble(about, [stage(t, log) for t in range(1, 21)], 20)
        folder = tmp_path / name / "order1993-seed0"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(run), encoding="utf-8")
    bench = script("publish.stage_costs", tmp_path)
    assert bench.logged(run, "condition_number") == [1e4] * 20
    bench.main()
    head, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert "task 10, task 20" in head
    numbers = "8.0, 18.0 | 16.0, 36.0 | 20, 40 | 11.0, 21.0 | 11, 21"
    assert rows == [f"| {name} | {numbers} |" for name in ("bank", "closed")]
    assert (tmp_path / "stage_costs.png").stat().st_size > 1000
