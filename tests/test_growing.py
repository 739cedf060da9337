"""Models that keep learning: equal to one run, exact forgetting, undoing, and what bad input leaves behind."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from marks import slow_beyond
from PIL import Image
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from test_cli import cil  # noqa: F401 - a fixture
from test_runner import TINY

from cil import history, metrics, results
from cil.backbone import load_backbone
from cil.config import BackboneConfig, Config
from cil.errors import CilError, ConfigError, DataError, RunError
from cil.export import export, load
from cil.growing import GrowingModel, setting
from cil.growing.events import read
from cil.growing.records import read_contents
from cil.growing.summary import facts
from cil.prediction import open_run, predict
from cil.runner import run
from cil.runner.tensorboard import Tracker

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox")


def picture(path: Path, seed: int) -> None:
    """Noise in a colour of its class, so that a random backbone tells classes apart, though not always."""
    rng, hue = np.random.RandomState(seed), np.random.RandomState(sum(map(ord, path.parent.name))).randint(0, 200, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((hue + rng.randint(0, 56, (16, 16, 3))).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """``all/<class>/<i>.png`` with nine images of each class, and the same two classes at a time in 0, 1 and 2."""
    root = tmp_path_factory.mktemp("images")
    for c, name in enumerate(CLASSES):
        for i in range(9):
            picture(root / "all" / name / f"{i}.png", 100 * c + i)
        shutil.copytree(root / "all" / name, root / str(c // 2) / name)
    return root


@pytest.fixture(autouse=True)
def _no_figure(request, monkeypatch):
    """TensorBoard's figure of the matrix takes two thirds of a lesson's time here; one test draws it."""
    if request.node.name != "test_the_folder_is_read_as_any_run":
        monkeypatch.setattr(Tracker, "_matrix", lambda self, r, stage: None)


@pytest.fixture
def model(tmp_path):
    def make(learner="ncm", folder="model", **options) -> GrowingModel:
        return GrowingModel(tmp_path / folder, learner, TINY, device="cpu", **options)

    return make


def state(folder: Path, stage: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"stage-{stage:02d}" / "learner.safetensors")


def scores(model: GrowingModel, images: Path) -> dict[str, np.ndarray]:
    """The logits of some images by class name, float [N]."""
    trained = model.predictor()
    files = sorted((images / "all").rglob("0.png"))
    ranked = [dict(found) for _, found in predict(trained, files, top=len(trained.names))]
    return {name: np.array([row[name] for row in ranked]) for name in trained.names}


LEARNERS = [
    "ncm",
    {"name": "ranpac", "projection": 16},
    "slda",
    "fecam",
    "layer_lda",
    {"name": "aper", "epochs": 1, "tuner": "ssf"},
    {"name": "linear_probe", "epochs": 2},
    {"name": "finetune", "epochs": 1},
    {"name": "ease", "epochs": 1, "bottleneck": 2},
]


@pytest.mark.parametrize("learner", slow_beyond(["layer_lda"] + LEARNERS[6:8], LEARNERS), ids=str)
def test_three_lessons_equal_one_run_of_the_same_tasks(learner, images, model, tmp_path):
    """Bit for bit: weights, statistics and predictions; and all counts that a model without old images can have."""
    settings = {
        "name": "t",
        "backbone": TINY,
        "data": {"dataset": "folder", "root": images, "train": "all"},
        "stream": {"sizes": [2, 2, 2], "validation": 0.34, "test_on": "validation"},
        "orders": ["natural"],
        "learners": [learner],
        "hardware": {"device": "cpu", "feature_store": "off"},
    }
    [whole] = run(Config.model_validate(settings), tmp_path)
    growing = model(learner)
    for i in range(3):
        growing.learn(images / str(i), holdout=0.34)
    frozen = growing.predictor().learner.name not in ("finetune", "ease")
    for stage in range(3):
        expected, found = state(whole, stage), state(growing.path, stage)
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
        rows = [results.read_stage(folder, stage).row for folder in (whole, growing.path)]
        tested = slice(0 if frozen else stage, None)
        assert rows[0]["correct"][tested] == rows[1]["correct"][tested]
        assert rows[1]["total"][:stage] == ([6] * stage if frozen else [0] * stage)
        if frozen:
            answers = [results.read_predictions(folder, stage) for folder in (whole, growing.path)]
            for key in ("label", "predicted", "top", "task", "within_task"):
                np.testing.assert_array_equal(answers[0][key], answers[1][key])
            for key in ("train_passes", "test_passes", "statistics_bytes"):
                assert rows[0]["costs"][key] == rows[1]["costs"][key], key
    assert growing.classes == CLASSES


FROM_SUMS = ["ncm", "slda", "fecam", "layer_lda", {"name": "ranpac", "projection": 16, "strength": "gcv"}]


@pytest.mark.parametrize("learner", slow_beyond(["slda"], FROM_SUMS), ids=str)
def test_the_split_into_calls_changes_nothing(learner, images, model, tmp_path):
    """New classes, more images of known ones, and both, against all images in one call."""
    for name, kept in (("ant", 4), ("bee", 9), ("cat", 2)):
        shutil.copytree(images / "all" / name, tmp_path / "some" / name)
        for file in sorted((tmp_path / "some" / name).iterdir())[kept:]:
            file.unlink()
    calls = model(learner, "calls")
    for place, known in ((tmp_path / "some", 0), (images / "1", 2), (images / "0", 13), (images / "2", 0)):
        taught = calls.learn(place, holdout=0)
        assert taught.lesson is not None and taught.lesson["known"] == known
    once = model(learner, "once")
    once.learn(images / "all", holdout=0)
    assert calls.classes == ("ant", "bee", "cat", "dog", "elk", "fox") == once.classes
    for name, expected in scores(once, images).items():
        np.testing.assert_allclose(scores(calls, images)[name], expected, rtol=1e-4, atol=1e-5)
    assert [len(task) for task in read(calls.path)["tasks"]] == [3, 2, 1, 2]
    assert calls.learn(images / "all").stage is None  # nothing is new
    assert facts(calls.path)["accuracy"] is None  # nothing was held out


@pytest.mark.parametrize("learner", slow_beyond(["fecam", "layer_lda"], FROM_SUMS), ids=str)
def test_a_class_is_forgotten_as_if_it_had_never_been_taught(learner, images, model, tmp_path):
    shutil.copytree(images / "1", tmp_path / "without")
    shutil.rmtree(tmp_path / "without" / "cat")
    forgot, never = model(learner, "forgot"), model(learner, "never")
    for growing, middle in ((forgot, images / "1"), (never, tmp_path / "without")):
        for place in (images / "0", middle, images / "2"):
            growing.learn(place, holdout=0)
    needed = learner in ("slda", "layer_lda") or isinstance(learner, dict)
    if needed:
        with pytest.raises(DataError, match="only be forgotten exactly with its 9 images"):
            forgot.forget("cat")
    before = scores(forgot, images)
    change = forgot.forget("cat", images / "all" if needed else None)
    assert (change["kind"], change["stages"]) == ("forgotten", 3)
    assert forgot.classes == never.classes == ("ant", "bee", "dog", "elk", "fox")
    found, expected = scores(forgot, images), scores(never, images)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert forgot.learn(images / "1", holdout=0).lesson["train"] == {"2": 9}  # taught again, under its old label
    again = scores(forgot, images)
    for name in before:
        np.testing.assert_allclose(again[name], before[name], rtol=1e-4, atol=1e-5)
    for _ in range(2):
        forgot.undo()
    undone = scores(forgot, images)
    assert all(np.array_equal(undone[name], before[name]) for name in before)


def test_kept_features_stand_for_the_images(images, model):
    """The same sums as with the images, and only if every lesson of the class has kept them."""
    kept, given = model("slda", "kept"), model("slda", "given")
    for growing in (kept, given):
        for i in range(3):
            growing.learn(images / str(i), holdout=0.34, keep_features=growing is kept and i < 2)
    kept.forget("dog")
    given.forget("dog", images / "1")
    for name, expected in scores(given, images).items():
        np.testing.assert_allclose(scores(kept, images)[name], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="only be forgotten exactly with its 6 images"):
        kept.forget("elk")


def test_what_cannot_be_forgotten_exactly_can_be_hidden(images, model):
    growing = model({"name": "linear_probe", "epochs": 1})
    growing.learn(images / "0")
    growing.learn(images / "1")
    with pytest.raises(RunError, match="keeps more of a class than sums of its own; give --hide"):
        growing.forget("bee")
    before = scores(growing, images)
    assert growing.forget("bee", hide=True)["kind"] == "hidden"
    after = scores(growing, images)
    assert list(after) == ["ant", "cat", "dog"]
    assert all(np.array_equal(after[name], before[name]) for name in after)
    with pytest.raises(RunError, match="predicts no class 'bee'"):
        growing.forget("bee")
    row = growing.learn(images / "2").rows[-1]
    assert row["total"] == [2, 4, 4]  # what is held out of bee is not tested any more
    assert facts(growing.path)["not_predicted"] == {"bee": "hidden"}
    predicted = results.read_predictions(growing.path, 2)
    assert 1 not in predicted["predicted"] and 1 not in predicted["label"]
    growing.undo(), growing.undo()
    assert growing.classes == ("ant", "bee", "cat", "dog")


@pytest.mark.parametrize("hide", [False, True])
def test_accuracy_without_a_class_is_that_of_its_predictions(hide, images, model):
    """The held-out images are found again by their content, and classified from their files."""
    growing = model("fecam")
    for i in range(3):
        growing.learn(images / str(i), holdout=0.34)
    growing.forget("cat", hide=hide)
    known = {hashlib.sha256(file.read_bytes()).digest()[:16]: file for file in (images / "all").rglob("*.png")}
    trained, expected = growing.predictor(), []
    for one in read_contents(growing.path, 3):
        files = [known[one.content[i]] for i in np.flatnonzero(one.held_out)]
        answers = [found[0][0] == path.parent.name for path, found in predict(trained, files)]
        expected.append(
            np.mean([right for right, file in zip(answers, files, strict=True) if file.parent.name != "cat"])
        )
    shown = facts(growing.path)
    assert [lesson["accuracy_now"] for lesson in shown["lessons"]] == pytest.approx(expected)
    assert shown["accuracy"] == pytest.approx(np.average(expected, weights=[6, 3, 6]))


def test_a_class_that_trained_the_features_cannot_be_forgotten_exactly(images, model):
    growing = model({"name": "aper", "epochs": 1, "tuner": "ssf"})
    growing.learn(images / "0")
    growing.learn(images / "1")
    with pytest.raises(RunError, match="have trained the features"):
        growing.forget("ant")
    growing.forget("cat")
    assert growing.classes == ("ant", "bee", "dog")


def test_a_class_that_set_the_scales_cannot_be_forgotten_exactly(images, model):
    """Scales that are those of each image by itself hold nothing of a class."""
    for scale in ("rms", "unit"):
        growing = model({"name": "layer_lda", "layers": {"blocks": "all", "scale": scale}}, scale)
        growing.learn(images / "0")
        if scale == "rms":
            with pytest.raises(RunError, match="have set the scales of the features; give --hide"):
                growing.forget("ant", images / "0")
    growing.forget("ant", images / "0")
    assert growing.classes == ("bee",)


def test_the_default_learner_fits_the_backbone(images, model, monkeypatch):
    """All blocks where they can be collected and their matrices are small; otherwise the backbone's own feature."""
    assert model(None).learn(images / "0").stage == 0
    assert facts(model(None).path)["learner"]["layers"]["blocks"] == "all"
    monkeypatch.setattr(setting, "MOST_BYTES", 3 * 8 * 24**2 - 1)  # three kinds of token of one block of width 24
    model(None, "wide").learn(images / "0")
    assert facts(model(None, "wide").path)["learner"]["layers"] is None
    monkeypatch.setattr(setting, "MOST_BYTES", 3 * 8 * 24**2)
    assert setting.default_learner(model(None).predictor().learner.backbone) == {"name": "layer_lda"}
    maps = {"name": "convnext_atto", "weights": "random", "options": {"dims": [4, 4, 4, 4], "depths": [1, 1, 1, 1]}}
    convolutional = load_backbone(BackboneConfig.model_validate(maps))
    assert setting.default_learner(convolutional) == {"name": "layer_lda", "layers": None}


def held_out_files(growing: GrowingModel, images: Path) -> list[Path]:
    """The files that a model holds out, in the order of its lessons, found again by their content."""
    known = {hashlib.sha256(file.read_bytes()).digest()[:16]: file for file in (images / "all").rglob("*.png")}
    contents = read_contents(growing.path, len(read(growing.path)["tasks"]))
    return [known[one.content[i]] for one in contents for i in np.flatnonzero(one.held_out)]


def test_probabilities_are_calibrated_on_what_is_held_out(model, tmp_path):
    """Against scipy's minimum of the cross-entropy, on scores that are computed from the files again."""
    growing = model("ncm")
    for c, name in enumerate(CLASSES):  # noise that hardly differs, so that some of it is mistaken
        for i in range(9):
            file = tmp_path / str(c // 2) / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.RandomState(9 * c + i).randint(0, 150, (16, 16, 3))
            Image.fromarray((noise + [14 * c, 0, 28 * (c % 2)]).astype(np.uint8)).save(file)
    for i in range(3):
        shutil.copytree(tmp_path / str(i), tmp_path / "all", dirs_exist_ok=True)
        growing.learn(tmp_path / str(i), holdout=0.45)

    def scores_of(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        names = list(growing.classes)
        plain = [dict(ranked) for _, ranked in predict(growing.predictor(), files, top=len(names))]
        logits = np.array([[row[name] for name in names] for row in plain])
        return logits, np.array([names.index(file.parent.name) for file in files])

    def temperature_of(logits: np.ndarray, own: np.ndarray) -> float:
        def loss(t: float) -> float:
            return -np.mean(log_softmax(logits / np.exp(t), axis=1)[np.arange(len(own)), own])

        return np.exp(minimize_scalar(loss, bounds=(-9, 9), method="bounded").x)

    files, names = held_out_files(growing, tmp_path), list(growing.classes)
    logits, own = scores_of(files)
    sure = growing.confident()
    assert 0.3 < (logits.argmax(1) == own).mean() < 1
    assert float(sure.confidence.temperature) == pytest.approx(temperature_of(logits, own), rel=1e-3)
    found = [dict(ranked) for _, ranked in predict(sure, files[:5], top=6)]
    expected = softmax(logits[:5] / float(sure.confidence.temperature), axis=1)
    np.testing.assert_allclose([[row[name] for name in names] for row in found], expected, rtol=1e-3)

    row = results.read_stage(growing.path, 2).row["confidence"]
    assert (row["held_out_images"], row["temperature"]) == (24, float(sure.confidence.temperature))
    best, halves = np.zeros(24), np.arange(24) % 2
    for half in (0, 1):  # every second image at the temperature of the others
        at = halves != half
        best[~at] = softmax(logits[~at] / temperature_of(logits[at], own[at]), axis=1).max(1)
    assert row["calibration_error"] == pytest.approx(metrics.calibration_error(best, logits.argmax(1) == own), abs=5e-3)
    assert facts(growing.path)["lessons"][2]["calibration_error"] == row["calibration_error"]

    growing.forget("cat", hide=True)
    left = [file for file in files if file.parent.name != "cat"]
    temperature = float(growing.confident().confidence.temperature)
    assert temperature == pytest.approx(temperature_of(*scores_of(left)), rel=1e-3)
    refused = [ranked.known for _, ranked in predict(growing.confident(reject=0.1), left, top=1)]
    assert refused.count(False) <= 2  # of twenty, counting one itself
    with pytest.raises(RunError, match=r"cannot be told from 20 held-out ones; allowed: 0\.048"):
        list(predict(growing.confident(reject=0.01), left[:1]))
    with pytest.raises(ConfigError, match=r"mahalanobis needs statistics of frozen features.*max_probability, energy"):
        growing.confident(reject=0.1, score="mahalanobis")


def test_what_cannot_be_calibrated_says_so_in_one_line(images, model, cil):  # noqa: F811
    growing = model({"name": "finetune", "epochs": 1})
    growing.learn(images / "0")
    assert len(growing.confident().confidence.known[0]) == 4
    growing.learn(images / "1", holdout=0)
    with pytest.raises(RunError, match="features have changed since images were held out, so it cannot say how sure"):
        growing.confident(reject=0.2)
    ended = cil("predict", growing.path, images / "all" / "cat" / "0.png", "--device", "cpu")
    assert ended.returncode == 0 and ended.stderr.count("scores are not calibrated, because the learner's") == 1
    assert "probabilities are not calibrated" in cil("show", growing.path).stdout
    ended = cil("predict", growing.path, images / "all" / "cat" / "0.png", "--probabilities", "--device", "cpu")
    assert ended.returncode == 2 and "so it cannot say how sure it is" in ended.stderr


def test_undo_takes_back_one_event_at_a_time(images, model):
    growing = model()
    taught = [growing.learn(images / "0"), growing.learn(images / "1")]
    one = (growing.path / "metrics.json").read_bytes()
    growing.rename("bee", "wasp")
    growing.forget("cat")
    assert growing.classes == ("ant", "wasp", "dog")
    assert growing.undo()["kind"] == "forgotten" and growing.classes == ("ant", "wasp", "cat", "dog")
    assert growing.undo()["kind"] == "renamed" and growing.classes == ("ant", "bee", "cat", "dog")
    assert json.loads((growing.path / "metrics.json").read_bytes()) == json.loads(one)
    assert growing.undo() == taught[1].lesson and growing.classes == ("ant", "bee")
    assert sorted(p.name for p in growing.path.iterdir() if p.is_dir()) == ["stage-00"]
    growing.undo()
    with pytest.raises(RunError, match="has learned nothing that could be undone"):
        growing.undo()
    GrowingModel(growing.path, "slda", TINY, device="cpu").learn(images / "2")  # an empty model may change its learner
    assert growing.classes == ("elk", "fox")


def test_the_folder_is_read_as_any_run(images, model, tmp_path, cil):  # noqa: F811
    """compare, TensorBoard, predict and export, also of a model that has forgotten a class."""
    growing = model("fecam")
    growing.learn(images / "0")
    growing.learn(images / "1", holdout=0)
    growing.forget("bee")
    ended = cil("compare", growing.path, "--out", tmp_path / "page")
    assert ended.returncode == 0 and "fecam" in ended.stdout
    assert list(growing.path.glob("events.out.tfevents.*"))
    photo = images / "all" / "cat" / "0.png"
    ended = cil("predict", growing.path, photo, "--device", "cpu")
    assert ended.returncode == 0 and "bee" not in ended.stdout and "cat" in ended.stdout
    for kind in ("safetensors", "torch.export"):
        exported = load(export(growing.path, tmp_path / kind, kind))
        assert exported.names == growing.classes == ("ant", "cat", "dog")
        [(_, found)] = predict(exported, [photo])
        [(_, expected)] = predict(open_run(growing.path), [photo])
        assert [name for name, _ in found] == [name for name, _ in expected]
        np.testing.assert_allclose([x for _, x in found], [x for _, x in expected], rtol=1e-4)


def test_a_model_that_holds_out_nothing_is_compared_and_exported(images, model, tmp_path, cil):  # noqa: F811
    growing = model()
    for i in range(2):
        growing.learn(images / str(i), holdout=0)
    ended = cil("compare", growing.path, "--out", tmp_path / "page", "--export", tmp_path / "table.csv")
    assert ended.returncode == 0 and "ncm" in ended.stdout, ended.stderr
    assert results.read_run(growing.path)["summary"]["accuracy_last"] is None
    exported = export(growing.path, tmp_path / "exported")
    assert load(exported).names == CLASSES[:4] and "accuracy" in (exported / "README.md").read_text()
    assert "–" in cil("show", growing.path).stdout


def test_the_commands_end_with_what_they_did(images, tmp_path, cil):  # noqa: F811
    place = tmp_path / "m"
    options = ("--learner", "ranpac", "--set", "projection=16", "--device", "cpu")
    ended = cil("learn", place, "--images", images / "0", *options)
    assert ended.returncode == 0 and "lesson 1 taught 2 classes (ant, bee) with 14 images, 4 held out" in ended.stdout
    ended = cil("learn", place, "--images", images / "0", "--device", "cpu")
    assert ended.returncode == 0 and "nothing new" in ended.stderr and not ended.stdout
    ended = cil("learn", place, "--images", images / "1", *options[:2], "--device", "cpu")
    assert ended.returncode == 2 and "its learner is 'ranpac'" in ended.stderr
    ended = cil("rename", place, "ant", "Bee")
    assert ended.returncode == 2 and "the model has the class 'bee'" in ended.stderr
    assert cil("rename", place, "ant", "emmet").returncode == 0
    ended = cil("show", place)
    assert ended.returncode == 0 and "emmet (7 + 2), bee (7 + 2)" in ended.stdout
    assert json.loads(cil("show", place, "--json").stdout)["classes"]["bee"]["train"] == 7
    assert cil("forget", place, "--class", "bee", "--hide").returncode == 0
    assert "bee is hidden" in cil("show", place).stdout
    assert "bee is no longer hidden" in cil("undo", place).stdout


def messages(root: Path) -> dict[str, tuple[str, ...]]:
    """Input that is refused, made below ``root`` → words of the message."""
    for name in ("nothing", "hollow/ant", "alike/ant", "alike/Ant", "known/Bee"):
        (root / name).mkdir(parents=True)
    (root / "hollow" / "ant" / "notes.txt").write_text("no image")
    for place in ("alike/ant/0.png", "alike/Ant/1.png", "known/Bee/0.png", "flat/0.png", "broken/ant/0.png"):
        picture(root / place, 5000)
    picture(root / "broken" / "ant" / "1.png", 6000)
    whole = (root / "broken" / "ant" / "1.png").read_bytes()
    (root / "broken" / "ant" / "1.png").write_bytes(whole[: len(whole) // 2])
    (root / "twice.csv").write_text("path,label\nflat/0.png,ant\nflat/0.png,bee\n")
    (root / "gone.csv").write_text("flat/0.png,ant\nflat/7.png,ant\n")
    (root / "short.csv").write_text("flat/0.png\n")
    return {
        "nowhere": ("no such folder, tar file or CSV file",),
        "nothing": ("no class folders",),
        "hollow": ("'ant'", "holds no images"),
        "flat": ("no class folders",),
        "alike": ("'Ant'", "'ant'", "only in case"),
        "known": ("'Bee'", "the model's class 'bee'", "only in case"),
        "broken": ("1.png", "--on-error skip"),
        "twice.csv": ("line 3", "again, after line 2"),
        "gone.csv": ("line 2", "there is no file"),
        "short.csv": ("line 1", "expected path,label"),
    }


def test_bad_images_are_refused_in_one_line_and_change_nothing(images, model, tmp_path):
    growing = model()
    growing.learn(images / "0")
    before = {file.name: file.read_bytes() for file in growing.path.rglob("*") if file.is_file()}
    for place, words in messages(tmp_path / "bad").items():
        with pytest.raises(CilError) as caught:
            growing.learn(tmp_path / "bad" / place)
        text = str(caught.value)
        assert "\n" not in text and all(word in text for word in words), (place, text)
        after = {file.name: file.read_bytes() for file in growing.path.rglob("*") if file.is_file()}
        assert after == before, place
    taught = growing.learn(tmp_path / "bad" / "broken", on_error="skip")
    assert (
        taught.lesson["train"] == {"0": 1} and taught.lesson["held_out"] == {} and len(taught.lesson["unreadable"]) == 1
    )
    assert any("nothing is held out of 1 classes" in note for note in taught.notes)


def test_one_image_other_modes_and_lists_can_be_taught(model, tmp_path):
    """One image per class, held out of nothing; grey, palette, transparent and 16-bit images; a CSV file; a tar."""
    growing = model()
    (tmp_path / "x").mkdir()
    rng = np.random.RandomState(0)
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        image = Image.fromarray(rng.randint(0, 256, (20, 18, 3)).astype(np.uint8)).convert(mode)
        image.save(tmp_path / "x" / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    Image.fromarray(rng.randint(0, 2**16, (20, 18)).astype(np.uint16)).save(tmp_path / "x" / "16.png")
    files = sorted((tmp_path / "x").iterdir())
    listing = "path,label\n" + "".join(f"x/{file.name},class {i}\n" for i, file in enumerate(files))
    (tmp_path / "list.csv").write_text(listing)
    taught = growing.learn(tmp_path / "list.csv")
    assert len(growing.classes) == 6 and taught.rows[0]["total"] == [0] and taught.rows[0]["top5_accuracy"] is None
    assert [found[0][0] for _, found in predict(growing.predictor(), files)] == [f"class {i}" for i in range(6)]


def test_a_benchmark_reads_the_same_list_as_the_folder(images, tmp_path):
    """`data.train` may name a CSV file; the features, and so the learner, are those of the folder."""
    rows = [f"all/{name}/{i}.png,{name}\n" for name in CLASSES for i in range(9)]
    (images / "list.csv").write_text("".join(rows))
    settings = {
        "name": "t",
        "backbone": TINY,
        "stream": {"sizes": [2, 2, 2], "validation": 0.34, "test_on": "validation"},
        "orders": ["natural"],
        "learners": ["ncm"],
        "hardware": {"device": "cpu", "feature_store": "off"},
    }
    folders = []
    for train in ("all", "list.csv"):
        data = {"dataset": "folder", "root": images, "train": train}
        folders += run(Config.model_validate({**settings, "data": data}), tmp_path / train)
    assert all(torch.equal(state(folders[0], 2)[key], value) for key, value in state(folders[1], 2).items())


def test_models_of_other_versions_and_runs_are_refused(images, model, tmp_path):
    growing = model()
    growing.learn(images / "0")
    file = growing.path / "metrics.json"
    content = json.loads(file.read_text())
    del content["checksum"]
    for changed, words in (
        ({**content, "growing": history.VERSION + 1, "lessons": {}}, "made by a later version of cil"),
        ({key: value for key, value in content.items() if key != "growing"}, "is a run of `cil run`"),
        ({**content, "lessons": []}, "0 lessons of 1 tasks"),
    ):
        file.write_text(json.dumps(changed))
        for call in (lambda: growing.learn(images / "1"), growing.undo, lambda: facts(growing.path)):
            with pytest.raises(RunError, match=words) as caught:
                call()
            assert "\n" not in str(caught.value)
        assert json.loads(file.read_text()) == changed
    with pytest.raises(RunError, match="no model there"):
        GrowingModel(tmp_path / "none").undo()
    with pytest.raises(CilError, match="keeps old images"):
        model("joint", "other").learn(images / "0")
    with pytest.raises(CilError, match="defined for lessons of new classes only"):
        other = model({"name": "ease", "epochs": 1}, "new")
        other.learn(images / "0")
        picture(images.parent / "more" / "ant" / "77.png", 77)
        other.learn(images.parent / "more")


def test_a_second_writer_is_refused(images, model):
    growing = model()
    growing.learn(images / "0")
    with growing._folder.locked(), pytest.raises(RunError, match="another process is running in this folder"):
        GrowingModel(growing.path, device="cpu").learn(images / "1")
    assert growing.classes == ("ant", "bee")


def test_a_model_of_a_thousand_classes_is_shown_at_once(images, model):
    """Without torch, which test_layout checks; here what is left: reading and adding up."""
    growing = model()
    growing.learn(images / "0")
    header = read(growing.path)
    names = [f"class {i}" for i in range(1000)]
    counts = {str(label): 5 for label in range(1000)}
    lesson = {**header["lessons"][0], "train": counts, "held_out": counts}
    growing._folder.commit({**header, "class_names": names, "tasks": [list(range(1000))], "lessons": [lesson]})
    started = time.perf_counter()
    known = facts(growing.path)
    assert time.perf_counter() - started < 2 and len(known["classes"]) == 1000
    assert known["classes"]["class 999"] == {"train": 5, "held_out": 5, "lessons": [1]}


def test_absent_classes_follow_from_the_events():
    def change(kind, label, stages):
        return {
            "kind": kind,
            "label": label,
            "stages": stages,
            "folder": f"{kind}{label}" if kind == "forgotten" else "",
        }

    header = {"tasks": [[0, 1], [2], [1, 3]]}
    assert history.absent(header) == [] and history.predicted(header) == [0, 1, 2, 3]
    header["changes"] = [change("forgotten", 1, 2), change("hidden", 0, 2), change("renamed", 2, 3)]
    assert history.absent(header) == [0]  # the third lesson taught 1 again
    assert history.changed_state(header, 2)["label"] == 1 and history.changed_state(header, 3) is None
    header["changes"].append(change("forgotten", 3, 3))
    assert history.absent(header, "forgotten") == [3] and history.absent(header, "hidden") == [0]
    assert history.predicted(header) == [1, 2]


def test_accuracy_counts_only_what_was_tested():
    """A hand case: lesson 0 has two test images, of which one is gone at stage 2, and lesson 1 has none."""

    def row(correct, total):
        return {"correct": correct, "correct_within_task": correct, "total": total, "top5_accuracy": None}

    rows = [
        {**one, "class_mean_accuracy": None, "task_id_accuracy": None}
        for one in (row([2], [2]), row([1, 0], [2, 0]), row([1, 0, 1], [1, 0, 4]))
    ]
    found = results.curves(rows)
    assert found["accuracy/seen"] == [1, 0.5, 0.4]
    np.testing.assert_array_equal(found["accuracy/new"], [1, np.nan, 0.25])
    np.testing.assert_array_equal(found["forgetting/mean"], [np.nan, 0.5, 0.0])
    matrix = results.derived(rows)["accuracy_matrix"]
    assert matrix == [[1, None, None], [0.5, None, None], [1, None, 0.25]]
