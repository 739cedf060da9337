"""Calibration and unknown classes: against scipy, scikit-learn, closed forms and hand cases, and in runs."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import roc_auc_score, roc_curve
from test_cli import cil  # noqa: F401 - a fixture
from test_runner import settings, stable

from cil import metrics, results
from cil.classifiers.calibration import LARGEST, fit_temperature
from cil.classifiers.distances import ClassDistances
from cil.data.sources import digits
from cil.errors import CilError, ConfigError, RunError
from cil.prediction import find_images, open_confident, open_run, predict
from cil.rows import REJECT_BY, SCORES
from cil.runner import run


@pytest.mark.parametrize("scale", [1e-4, 0.05, 1.0, 30.0, 1e5])
def test_temperature_is_the_minimum_that_scipy_finds(scale):
    rng = np.random.RandomState(0)
    logits = rng.randn(300, 7)
    labels = np.array([rng.choice(7, p=p) for p in softmax(logits * 1.7, axis=1)])
    logits = logits * scale + rng.randn(300, 1) * scale  # a shift of an image's scores changes nothing

    def loss(log_beta):
        return -log_softmax(logits * np.exp(log_beta), axis=1)[np.arange(300), labels].mean()

    low = np.log(0.1 / scale)
    best = minimize_scalar(loss, bounds=(low, low + 6), method="bounded", options={"xatol": 1e-10})
    found = fit_temperature(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found == pytest.approx(np.exp(-best.x), rel=1e-5)
    assert found == pytest.approx(scale / 1.7, rel=0.25)


def test_temperature_where_there_is_nothing_to_fit():
    ones = torch.zeros(4, dtype=torch.int64)
    assert fit_temperature(torch.zeros(0, 3), ones[:0]) == 1.0
    assert fit_temperature(torch.full((4, 3), 2.5), ones) == 1.0
    assert fit_temperature(torch.randn(4, 1), ones) == 1.0
    right = torch.eye(4)
    spread = float(right[0].std(correction=0))
    sure = fit_temperature(right, torch.arange(4))  # all right: so sure that the loss is 0 within rounding
    assert spread / LARGEST <= sure < 0.05 and float((right / sure).softmax(1).diagonal().min()) > 1 - 1e-8
    assert fit_temperature(-right, torch.arange(4)) == pytest.approx(spread * LARGEST)  # all wrong: not sure at all
    absent = torch.cat([torch.randn(50, 3), torch.full((50, 1), float("-inf"))], dim=1)
    labels = torch.arange(50) % 3
    assert fit_temperature(absent, labels) == pytest.approx(fit_temperature(absent[:, :3], labels), rel=1e-9)


def test_calibration_error_by_hand():
    confidence, correct = np.array([0.9, 0.8, 0.55, 0.6, 0.3]), np.array([1, 0, 1, 1, 0], dtype=bool)
    # two bins: (0.5, 1] has 4 images, accuracy 0.75, confidence 0.7125; (0, 0.5] has one, 0 and 0.3
    assert metrics.calibration_error(confidence, correct, bins=2) == pytest.approx(0.8 * 0.0375 + 0.2 * 0.3)
    assert metrics.calibration_error(np.array([0.5, 1.0]), np.array([True, True]), bins=2) == pytest.approx(0.25)
    rng = np.random.RandomState(0)
    sure = rng.uniform(0.2, 1, 20000)
    assert metrics.calibration_error(sure, rng.rand(20000) < sure) < 0.02
    assert metrics.calibration_error(sure, rng.rand(20000) < sure / 2) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("decimals", [1, 8])
def test_auroc_and_fpr_are_scikit_learns(decimals):
    rng = np.random.RandomState(1)
    known, unknown = np.round(rng.randn(83) + 1, decimals), np.round(rng.randn(57), decimals)  # with and without ties
    truth, scores = np.repeat([1, 0], [83, 57]), np.concatenate([known, unknown])
    assert metrics.unknown_auroc(known, unknown) == pytest.approx(roc_auc_score(truth, scores))
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert metrics.unknown_fpr95(known, unknown) == pytest.approx(false[np.argmax(true >= 0.95)])
    assert metrics.unknown_auroc(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == 3.5 / 4
    assert metrics.unknown_fpr95(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == 0.5


def test_rejected_by_hand_and_at_the_promised_rate():
    held_out = np.arange(1.0, 20.0)  # 19 images: the smallest p is 1/20
    assert metrics.rejected(np.array([0.5, 1.0, 1.5, 5.0]), held_out, 0.05).tolist() == [True, False, False, False]
    assert metrics.rejected(np.array([0.5, 1.5, 2.0, 5.0]), held_out, 0.10).tolist() == [True, True, False, False]
    assert not metrics.rejected(np.array([-9.0]), held_out[:18], 0.05).any()
    rng = np.random.RandomState(0)
    rates = [metrics.rejected(rng.randn(100), rng.randn(99), 0.1).mean() for _ in range(300)]
    assert np.mean(rates) == pytest.approx(0.1, abs=0.01)


def test_distances_by_the_formula_and_in_parts():
    rng = np.random.RandomState(0)
    x, y = rng.randn(90, 5) + np.repeat(rng.randn(3, 5) * 4, 30, axis=0), np.repeat([0, 1, 3], 30)
    new = rng.randn(11, 5) * 3
    found = ClassDistances(5, shrinkage=0.2).partial_fit(x, y).distances(new)
    means = {c: x[y == c].mean(0) for c in (0, 1, 3)}
    centred = x - np.stack([means[c] for c in y])

    def shrunk(cov):
        return 0.8 * cov + 0.2 * np.trace(cov) / 5 * np.eye(5)

    within, total = np.linalg.inv(shrunk(centred.T @ centred / 90)), np.linalg.inv(shrunk(np.cov(x.T, bias=True)))
    nearest = np.min([np.einsum("bi,ij,bj->b", new - m, within, new - m) for m in means.values()], axis=0)
    background = np.einsum("bi,ij,bj->b", new - x.mean(0), total, new - x.mean(0))
    np.testing.assert_allclose(found[0], nearest, rtol=1e-9)
    np.testing.assert_allclose(found[1], background, rtol=1e-9)
    parts = ClassDistances(5, shrinkage=0.2).partial_fit(x[y < 2], y[y < 2]).partial_fit(x[y == 3], y[y == 3])
    np.testing.assert_allclose(parts.distances(new)[0], nearest, rtol=1e-9)
    flat = ClassDistances(5).partial_fit(np.ones((4, 5)), np.zeros(4, int)).distances(np.stack([np.ones(5), new[0]]))
    assert flat[0][0] < flat[0][1] and all(torch.isfinite(part).all() for part in flat)


LEARNED = {"stream": {"increment": 4, "validation": 0.25}, "data": {"per_class": 40}, "confidence": True}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    [folder] = run(settings(**LEARNED), tmp_path_factory.mktemp("runs"))
    return folder


def test_a_run_reports_what_the_stored_scores_say(trained):
    """Temperature and metrics of every stage, from the model and plain numpy."""
    rows = results.read_run(trained)["stages"]
    assert [row["confidence"]["held_out_images"] for row in rows] == [40, 80, 100]
    last = rows[-1]["confidence"]
    assert last["unknown_auroc"] == dict.fromkeys(SCORES) == last["unknown_fpr95"]
    for row in rows[:-1]:
        assert set(row["confidence"]["unknown_auroc"]) == set(SCORES)
        assert all(0 <= value <= 1 for value in row["confidence"]["unknown_auroc"].values())
    model = open_confident(trained)
    source, names = digits("test"), list(model.names)
    positions = np.arange(len(source))
    images = torch.cat([read(model, source, i) for i in positions])
    labels = np.array([names.index(source.class_names[c]) for c in source.labels])
    with torch.inference_mode():
        logits = model(images)[0]
    p = softmax(logits.double().numpy() / last["temperature"], axis=1)
    assert last["calibration_error"] == pytest.approx(
        metrics.calibration_error(p.max(1), p.argmax(1) == labels), abs=1e-6
    )
    assert last["calibration_error"] < last["calibration_error_uncalibrated"]  # cosines at temperature 1 say nothing
    curves = results.curves(rows)
    assert curves["calibration/error"][-1] == last["calibration_error"]
    assert np.isnan(curves[f"unknown/auroc_{REJECT_BY}"]).tolist() == [False, False, True]
    summary = results.read_header(trained)["summary"]
    assert summary[f"unknown_auroc_{REJECT_BY}"] == pytest.approx(np.nanmean(curves[f"unknown/auroc_{REJECT_BY}"]))
    assert summary["calibration_error"] == last["calibration_error"]


def read(model, source, index):
    return model.transforms.normalize(torch.from_numpy(np.asarray(model.transforms.evaluate(source.read(index))))[None])


def test_nothing_else_changes_and_an_interrupted_run_is_the_same(trained, tmp_path):
    plain_settings = {**LEARNED, "confidence": False}
    [plain] = run(settings(**plain_settings), tmp_path / "plain")
    for one, two in zip(results.read_run(plain)["stages"], results.read_run(trained)["stages"], strict=True):
        assert stable(one) == stable({key: value for key, value in two.items() if key != "confidence"})
    assert not list(plain.glob("stage-*/confidence.safetensors"))
    [folder] = run(settings(**LEARNED), tmp_path / "again")
    (folder / "metrics.json").write_bytes((folder / "metrics.json").read_bytes())
    for stage in ("stage-02", "stage-01"):
        for file in (folder / stage).iterdir():
            file.unlink()
        (folder / stage).rmdir()
    header = json.loads((folder / "metrics.json").read_text())
    assert header["complete"]
    [resumed] = run(settings(**LEARNED), tmp_path / "again", redo=True)
    assert [row["confidence"] for row in results.read_run(resumed)["stages"]] == [
        row["confidence"] for row in results.read_run(trained)["stages"]
    ]
    a, b = (load_file(place / "stage-02" / "confidence.safetensors") for place in (resumed, trained))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_features_that_change_leave_the_newest_held_out_images(tmp_path):
    settings_of = settings(**{**LEARNED, "learners": [{"name": "finetune", "epochs": 1}]})
    [folder] = run(settings_of, tmp_path)
    rows = results.read_run(folder)["stages"]
    assert [row["confidence"]["held_out_images"] for row in rows] == [40, 40, 20]
    state = load_file(folder / "stage-01" / "confidence.safetensors")
    assert set(state["tasks"].tolist()) == {1} and len(state["frozen"]) == 40
    assert set(state["labels"].tolist()) == {4, 5, 6, 7}


def test_predictions_with_probabilities_and_unknown_images(cil, trained, tmp_path):  # noqa: F811
    from PIL import Image

    source = digits("test")
    for i in range(12):
        source.read(30 * i).save(tmp_path / f"{i:02d}.png")
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)).save(tmp_path / "99.png")
    paths = find_images([tmp_path])
    plain = list(predict(trained, paths, top=10))
    sure = list(predict(open_confident(trained), paths, top=10))
    for (_, scores), (_, ranked) in zip(plain, sure, strict=True):
        assert ranked.known is None and [name for name, _ in ranked] == [name for name, _ in scores]
        assert sum(p for _, p in ranked) == pytest.approx(1)
    out = tmp_path / "found.csv"
    done = cil("predict", trained, tmp_path, "--reject", "0.1", "--top", "1", "--out", out)
    assert done.returncode == 0, done.stderr
    with out.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["path", "known", "class_1", "score_1"] and rows[-1][:2] == [str(paths[-1]), "false"]
    asked = list(predict(open_confident(trained, reject=0.1), paths, top=1))
    assert [row[1] == "true" for row in rows] == [ranked.known for _, ranked in asked]
    assert sum(ranked.known for _, ranked in asked) >= 9
    done = cil("predict", trained, paths[-1], "--reject", "0.1", "--top", "1")
    assert done.stdout.startswith(f"{paths[-1]}: unknown; ")
    done = cil("predict", trained, paths[0], "--probabilities", "--top", "1")
    assert done.stdout.strip() == f"{paths[0]}: {sure[0][1][0][0]} ({sure[0][1][0][1]:.3f})"


def test_what_cannot_be_asked_is_one_line(cil, trained, tmp_path):  # noqa: F811
    with pytest.raises(
        RunError, match=r"0\.001 of the known images cannot be told from 100 held-out ones; allowed: 0\.0099"
    ):
        list(predict(open_confident(trained, reject=0.001), find_images([_image(tmp_path)])))
    with pytest.raises(ConfigError, match=r"reject: 1\.5; allowed: above 0 and below 1"):
        open_confident(trained, reject=1.5)
    with pytest.raises(ConfigError, match=r"unknown score 'enrgy' \(did you mean 'energy'\?\)"):
        open_confident(trained, reject=0.1, score="enrgy")
    with pytest.raises(CilError, match=r"confidence: true needs held-out training images .* stream\.validation"):
        from cil.config import Config
        from cil.config.reading import validated

        validated(Config, {"learners": ["ncm"], "confidence": True})
    [plain] = run(settings(data={"per_class": 10}), tmp_path / "plain")
    done = cil("predict", plain, _image(tmp_path), "--reject", "0.1")
    assert done.returncode == 2 and "run it with confidence=true and stream.validation=0.1" in done.stderr
    (trained / "stage-02" / "confidence.safetensors").rename(tmp_path / "kept")
    try:
        with pytest.raises(RunError, match=r"confidence\.safetensors: not there"):
            open_confident(trained)
    finally:
        (tmp_path / "kept").rename(trained / "stage-02" / "confidence.safetensors")
    assert open_run(trained).judged(torch.zeros(1, 3, 16, 16))[1] is None


def _image(folder):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(folder / "one.png")
    return folder / "one.png"
