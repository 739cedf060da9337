"""Scores of frozen features against explicit refits and scipy; and what ranking backbones opens and writes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import multivariate_normal
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.linear_model import RidgeCV
from test_cli import cil, write  # noqa: F401 (a fixture)
from test_tune import WATCHED

from cil import load_config, rank_backbones
from cil.backbone import EMBEDDED, load_backbone
from cil.classifiers import NCM, Ridge
from cil.classifiers.leave_one_out import fixed_point, log_evidence
from cil.classifiers.ridge import STRENGTHS
from cil.config import BackboneConfig
from cil.errors import BackboneError, ConfigError, DataError
from cil.selection.transferability import (
    agreement,
    effective_rank,
    logme,
    ncm_leave_one_out,
    ridge_leave_one_out,
    scores,
)

RANDOM = f"{{name: {EMBEDDED}, weights: random}}"


def blobs(n, width, classes=3, *, rank=None, seed=0, spread=1.0):
    """Overlapping classes, features [n, width] of that rank, labels [n]."""
    rng = np.random.RandomState(seed)
    labels = np.concatenate([np.arange(classes), rng.randint(classes, size=n - classes)])
    rank = rank or width
    x = spread * rng.randn(classes, rank)[labels] + rng.randn(n, rank)
    x += 0.3
    return torch.from_numpy(x @ rng.randn(rank, width) if rank < width else x), torch.from_numpy(labels)


SHAPES = {"N > F": (40, 6, None), "N < F": (25, 60, None), "dependent": (40, 12, 5), "dependent, N < F": (20, 50, 7)}


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("shape", SHAPES)
def test_ncm_is_the_librarys_own_head_fitted_without_each_sample(shape, metric):
    n, width, rank = SHAPES[shape]
    x, y = blobs(n, width, classes=4, rank=rank, spread=0.7)
    hits = []
    for i in range(n):
        rest = torch.arange(n) != i
        hits.append(int(NCM(width, metric).partial_fit(x[rest], y[rest]).logits(x[i : i + 1]).argmax()) == int(y[i]))
    found = ncm_leave_one_out(x, y, metric)
    assert found == np.mean(hits) and 0 < found < 1
    whole = (NCM(width, metric).partial_fit(x, y).logits(x).argmax(1) == y).double().mean()
    assert found < whole  # a sample that is in its own mean looks closer than it is


def test_a_class_of_one_is_not_counted_but_competes():
    x = torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.1, 1.0], [0.0, 1.0], [1.0, 0.2]]).double()
    y = torch.tensor([0, 0, 1, 1, 2])
    assert ncm_leave_one_out(x, y) == 3 / 4  # the first is nearer to the one of class 2 than to its neighbour
    assert ncm_leave_one_out(x[:4], y[:4]) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_ridge_is_every_sample_predicted_by_a_fit_to_the_others(shape):
    """Explicit refits at the chosen λ by scikit-learn; and no other λ has a smaller leave-one-out error."""
    n, width, rank = SHAPES[shape]
    x, y = (part.numpy() for part in blobs(n, width, classes=4, rank=rank, spread=0.7))
    targets = np.eye(4)[y]
    accuracy, strength = ridge_leave_one_out(x, y)
    errors = {}
    for tried in {strength, strength / 10, strength * 10}:
        predicted = np.empty_like(targets)
        for i in range(n):
            rest = np.arange(n) != i
            fitted = SklearnRidge(alpha=tried, fit_intercept=False, solver="svd").fit(x[rest], targets[rest])
            predicted[i] = fitted.predict(x[i : i + 1])[0]
        errors[tried] = np.square(predicted - targets).mean()
        if tried == strength:
            assert accuracy == (predicted.argmax(1) == y).mean()
    assert min(errors, key=errors.__getitem__) == strength
    assert 1 / 4 < accuracy <= 1


@pytest.mark.parametrize("shape", ["N > F", "N < F"])
def test_the_strength_is_the_one_the_library_and_scikit_learn_choose(shape):
    n, width, rank = SHAPES[shape]
    x, y = blobs(n, width, classes=4, rank=rank, spread=0.7)
    _, strength = ridge_leave_one_out(x, y)
    assert strength == float(Ridge(width, None, "loo").partial_fit(x, y).strength_)
    among = [s for s in STRENGTHS if s >= 1e-4]
    cv = RidgeCV(among, fit_intercept=False, scoring=None).fit(x.numpy(), np.eye(4)[y.numpy()])
    assert strength == cv.alpha_


@pytest.mark.parametrize("shape", SHAPES)
def test_the_log_evidence_is_the_exact_marginal_density(shape):
    """ln N(t; 0, β⁻¹I + α⁻¹FFᵀ) by scipy, at the fixed point and away from it."""
    n, width, rank = SHAPES[shape]
    x, y = blobs(n, width, rank=rank)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    k = int(torch.linalg.matrix_rank(x))
    assert k == min(n, rank or width)
    u, s, targets = u[:, :k], s[:k], torch.eye(3).double()[y]
    fixed = fixed_point(u, s, targets)
    exact = []
    for alpha, beta in (fixed, (torch.tensor([0.3, 2.0, 11.0]).double(), torch.tensor([4.0, 0.5, 1.0]).double())):
        found = log_evidence(u, s, width, targets, alpha, beta)
        for c in range(3):
            covariance = np.eye(n) / float(beta[c]) + (x @ x.T).numpy() / float(alpha[c])
            exact.append(multivariate_normal.logpdf(targets[:, c].numpy(), np.zeros(n), covariance))
            assert math.isclose(float(found[c]), exact[-1], rel_tol=1e-8), (shape, c)
    assert math.isclose(logme(x, y), np.mean(exact[:3]) / n, rel_tol=1e-8)


def test_the_fixed_point_is_where_the_evidence_is_largest():
    x, y = blobs(60, 5)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    targets = torch.eye(3).double()[y]
    alpha, beta = fixed_point(u, s, targets)
    top = log_evidence(u, s, 5, targets, alpha, beta)
    for a, b in ((1.1, 1), (0.9, 1), (1, 1.1), (1, 0.9)):
        assert bool((log_evidence(u, s, 5, targets, alpha * a, beta * b) < top).all())


def test_effective_rank_by_hand():
    """Singular values 2, 1, 1: p = (4, 1, 1)/6; equal ones count as many as there are."""
    x = torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    assert math.isclose(effective_rank(x), math.exp(4 / 6 * math.log(6 / 4) + 2 / 6 * math.log(6)))
    assert math.isclose(effective_rank(torch.eye(7, 4)), 4) and math.isclose(effective_rank(torch.ones(5, 3)), 1)


def test_all_scores_are_those_of_the_single_functions_and_better_features_score_higher():
    x, y = blobs(60, 8, spread=0.5)
    found = scores(x.float(), y)
    x32 = x.float().double()
    assert (found.ridge, found.ridge_strength) == ridge_leave_one_out(x32, y)
    assert found.ncm == ncm_leave_one_out(x32, y) and found.logme == logme(x32, y)
    assert math.isclose(found.effective_rank, effective_rank(x32))
    better = scores(blobs(60, 8, spread=2.0)[0], y)
    assert better.ncm > found.ncm and better.ridge > found.ridge and better.logme > found.logme
    assert scores(x, y * 5 + 3) == scores(x, y)  # labels need not be without gaps


def test_agreement_is_kendalls_tau():
    columns = {"a": [3, 1, 2, 0], "b": [3.0, 2.0, 2.0, 0.0], "constant": [1, 1, 1, 1]}
    found = agreement(columns)
    assert found["a"]["b"] == pytest.approx(5 / math.sqrt(6 * 5)) == found["b"]["a"]  # by hand: five agree, one ties
    assert found["a"]["constant"] is None and "a" not in found["a"]
    assert agreement({"a": [1], "b": [2]}) == {"a": {"b": None}, "b": {"a": None}}


WRONG = {
    "one class": (torch.randn(4, 2), torch.zeros(4, dtype=torch.int64), "at least two classes"),
    "no pair": (torch.randn(3, 2), torch.arange(3), "no class has two"),
    "not finite": (torch.full((4, 2), math.nan), torch.tensor([0, 0, 1, 1]), "NaN or infinite"),
    "nothing": (torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), "all features are zero"),
    "shape": (torch.zeros(4), torch.tensor([0, 0, 1, 1]), "expected"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_scored_is_refused(case):
    x, y, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        scores(x, y)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(place, **changes):
    return write(place / "c.yaml", **{"backbone": {}, "data": {"dataset": "digits", "per_class": 12}, **changes})


def test_pretrained_weights_rank_before_random_ones(cil, place):  # noqa: F811
    file = config(place, learners=["ncm", {"name": "linear_probe", "orders": [5]}], orders=[7, 1993])
    found = cil("rank-backbones", file, "--backbone", RANDOM, "--backbone", EMBEDDED)
    assert found.returncode == 0, found.stderr
    rows = found.stdout.split("rank ", 1)[1].splitlines()[1:3]
    assert rows[0].startswith(f"1     {EMBEDDED} ") and rows[1].startswith("2     {name: ") and "random" in rows[1]
    record = json.loads((place / "results/t/backbones.json").read_text())
    assert "record:    results/t/backbones.json" in found.stdout and "Kendall's τ: ncm and ridge 1.00" in found.stdout
    shipped, random = record["ranked"]
    assert shipped["candidate"] == {"name": EMBEDDED} and random["candidate"] == yaml.safe_load(RANDOM)
    for one in (shipped, random):
        loaded = load_backbone(BackboneConfig(**one["candidate"]))
        assert (one["name"], one["sha256"], one["feature_dim"]) == (loaded.name, loaded.fingerprint, 192)
    for score in ("ncm", "ridge", "logme"):
        assert shipped[score] > random[score]
    assert min(shipped["seconds"].values()) > 0
    assert record["agreement"]["ncm"]["logme"] == 1
    order = np.random.RandomState(7).permutation(10)[:4]  # the first class order, whatever a learner lists
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert record["tasks"] == [[names[c] for c in order]] and record["order"] == 7
    assert record["images"]["training"] == [48] and record["data"]["test"] == "not opened"
    assert len(record["data"]["train"]["sha256"]) == 64 and {"torch", "timm"} <= record["versions"].keys()


def test_the_score_that_ranks_can_be_chosen(cil, place, monkeypatch):  # noqa: F811
    """Scores that disagree; of equals the one given first comes first."""
    from cil.selection import backbones
    from cil.selection.transferability import Scores

    pretended = iter([Scores(0.5, 0.5, -1.0, 2.0, 1.0), Scores(0.6, 0.4, -1.0, 3.0, 1.0)] * 4)
    monkeypatch.setattr(backbones, "scores", lambda *_: next(pretended))
    file, options = config(place), ["--backbone", RANDOM, "--backbone", EMBEDDED]
    for chosen, first in (([], 1), (["--by=ncm"], 1), (["--by=ridge"], 0), (["--by=logme"], 0)):
        assert cil("rank-backbones", file, *options, *chosen).returncode == 0
        record = json.loads((place / "results/t/backbones.json").read_text())
        assert record["by"] == (chosen or ["--by=ncm"])[0][5:]
        assert ("weights" in record["ranked"][0]["candidate"]) == (first == 0)
    assert cil("rank-backbones", file, *options, "--by", "effective_rank").returncode == 2


def test_the_scores_are_those_of_the_first_tasks_frozen_features(place):
    from cil.data.opening import open_source
    from cil.data.transforms import Transforms

    file = config(place)
    settings = load_config(str(file))
    [one] = rank_backbones(settings, [EMBEDDED]).ranked
    source = open_source(settings.data, "train")
    order = np.random.RandomState(1993).permutation(10)[:4]
    members = np.concatenate([np.flatnonzero(source.labels == c)[:12] for c in order])
    backbone = load_backbone()
    transform = Transforms(backbone.data_config)
    assert transform.size == 64
    from cil.data.images import ImageSet

    pixels, _ = next(iter(ImageSet(source, transform).batches(members, members, len(members))))
    with torch.inference_mode():
        expected = scores(backbone(pixels), np.repeat(np.arange(4), 12))
    assert (one.scores.ncm, one.scores.ridge, one.scores.ridge_strength) == (
        expected.ncm,
        expected.ridge,
        expected.ridge_strength,
    )
    assert math.isclose(one.scores.logme, expected.logme, rel_tol=1e-4)
    assert math.isclose(one.scores.effective_rank, expected.effective_rank, rel_tol=1e-4)


@pytest.mark.parametrize("memory", [4, 0])
def test_no_test_image_and_no_later_image_is_opened(place, memory):
    (place / "watched.py").write_text(WATCHED)
    hardware = {"device": "cpu", "memory_gib": memory, "workers": 0}
    data = {"dataset": "watched.py:load", "per_class": 6}
    file = config(place, data=data, hardware=hardware)
    rank_backbones(load_config(str(file)), [EMBEDDED, RANDOM])
    from cil.config.plugins import load_object
    from cil.data.sources import digits

    labels = digits("train").labels
    order = np.random.RandomState(1993).permutation(10)
    read = np.array(load_object("watched.py:load", "dataset").__globals__["read"])
    assert set(labels[read]) == set(order[:4]) and len(set(read)) == 4 * 6


def test_one_that_cannot_be_loaded_stops_all_before_anything_is_scored(cil, place, monkeypatch):  # noqa: F811
    """An hour of features of the others would be lost, or a ranking without it taken for the whole."""
    from cil.features import FeatureCache

    monkeypatch.setattr(FeatureCache, "get", lambda *_: pytest.fail("features were computed"))
    missing = f"{{name: {EMBEDDED}, weights: none.safetensors}}"
    found = cil("rank-backbones", config(place), "--backbone", EMBEDDED, "--backbone", missing)
    assert found.returncode == 2 and len(found.stderr.strip().splitlines()) == 1
    assert f"--backbone {missing}: backbone.weights: none.safetensors: no such file" in found.stderr
    assert not (place / "results").exists()


MISTAKES = {
    "no candidate": ([], [], "needs candidates, e.g. --backbone"),
    "twice": ([], [EMBEDDED, f"{{name: {EMBEDDED}}}"], "given twice"),
    "unknown name": ([], ["vit_tiny_patch8_46.x"], "--backbone vit_tiny_patch8_46.x: backbone.name: timm knows no"),
    "unknown key": ([], [f"{{name: {EMBEDDED}, weigths: random}}"], "did you mean 'weights'?"),
    "no name": ([], ["{weights: random}"], "expected a name or a section with one"),
    "a number": ([], ["3"], "expected a name or a section with one"),
    "no YAML": ([], ["{name: "], "not valid YAML"),
    "one task": (["stream.increment=10"], [EMBEDDED], "the stream is a single task"),
    "one class": (["stream.increment=1"], [EMBEDDED], "the first task has one class"),
    "single images": (["data.per_class=1"], [EMBEDDED], f"--backbone {EMBEDDED}: scores of features leave samples out"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(cil, place, mistake):  # noqa: F811
    overrides, candidates, message = MISTAKES[mistake]
    options = [part for candidate in candidates for part in ("--backbone", candidate)]
    found = cil("rank-backbones", config(place), *overrides, *options)
    assert found.returncode == 2 and message in found.stderr and len(found.stderr.strip().splitlines()) == 1
    assert not (place / "results").exists()


def test_a_mistake_in_python(place):
    settings = load_config(str(config(place)))
    with pytest.raises(ConfigError, match="--by effective_rank: unknown; allowed: ncm, ridge, logme, leep"):
        rank_backbones(settings, [EMBEDDED], by="effective_rank")
    with pytest.raises(BackboneError, match="timm knows no"):
        rank_backbones(settings, [{"name": "no_such_model"}])
