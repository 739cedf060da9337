"""Few-shot classes: balanced sums against replicated samples and scikit-learn, TEEN by its formula, and base and novel
accuracy by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.linear_model import RidgeCV

from cil import metrics
from cil.classifiers import LDA, NCM, Gaussians, Ridge
from cil.classifiers.few_shots import Calibration, Draws
from cil.classifiers.ncm import Teen
from cil.errors import ConfigError, DataError, StreamError
from cil.learners import build_learner
from cil.learners.slda import SLDA
from cil.runner import run_stages
from cil.runner.supported import require_supported
from cil.stream import Blurry, ClassIncremental, Online, Stream
from cil.testing.setting import accelerator, context
from cil.utils.randomness import generator

COUNTS = (40, 20, 5, 2)  # their least common multiple is 40


def samples(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState(seed)
    y = np.repeat(range(len(COUNTS)), COUNTS)
    return rng.randn(len(y), 6) + rng.randn(len(COUNTS), 6)[y], y


def replicated(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every class with 40 samples: each sample as often as that takes."""
    times = 40 // np.bincount(y)[y]
    return np.repeat(x, times, axis=0), np.repeat(y, times)


@pytest.mark.parametrize("projection", [None, 30])
def test_balanced_ridge_is_ridge_on_replicated_samples(projection):
    x, y = samples()
    new = samples(1)[0]
    strength = 0.7
    ours = Ridge(6, projection, strength, balance=True).draw(generator(3)).partial_fit(x, y, generator(4))
    many = Ridge(6, projection, strength * 40).draw(generator(3)).partial_fit(*replicated(x, y), generator(4))
    np.testing.assert_allclose(ours.logits(new), many.logits(new), atol=1e-10)
    if projection is None:
        weight = 1 / np.bincount(y)[y]
        theirs = SklearnRidge(strength, fit_intercept=False).fit(x, np.eye(4)[y], sample_weight=weight)
        np.testing.assert_allclose(ours.logits(new), theirs.predict(new), atol=1e-10)
    parts = Ridge(6, projection, strength, balance=True).draw(generator(3))
    for classes in ([1], [0, 3], [2]):
        parts.partial_fit(x[np.isin(y, classes)], y[np.isin(y, classes)], generator(4))
    np.testing.assert_allclose(parts.logits(new), ours.logits(new), atol=1e-10)
    assert parts.counts.tolist() == list(COUNTS)


def test_strength_of_a_balanced_ridge_by_weighted_leave_one_out():
    """PRESS on weighted samples is scikit-learn's; generalised cross-validation is its formula, by plain inversion."""
    x, y = samples()
    weight, one_hot = 1 / np.bincount(y)[y], np.eye(4)[y]
    ours = Ridge(6, strength="loo", balance=True).partial_fit(x, y)
    theirs = RidgeCV(ours.candidates, fit_intercept=False, alpha_per_target=False).fit(x, one_hot, sample_weight=weight)
    assert float(ours.strength_) == theirs.alpha_
    gcv, errors = Ridge(6, strength="gcv", balance=True).partial_fit(x, y), []
    h, t = x * np.sqrt(weight)[:, None], one_hot * np.sqrt(weight)[:, None]
    for strength in gcv.candidates:
        hat = h @ np.linalg.inv(h.T @ h + strength * np.eye(6)) @ h.T
        errors.append(((t - hat @ t) ** 2).sum() / len(y) / (1 - np.trace(hat) / len(y)) ** 2)
    np.testing.assert_allclose(gcv.generalised_errors(), errors, rtol=1e-8)
    assert float(gcv.strength_) == gcv.candidates[int(np.argmin(errors))]
    holdout = Ridge(6, strength="holdout", balance=True).partial_fit(x, y, generator(0))
    assert float(holdout.strength_) in holdout.candidates


def test_balanced_lda_has_the_mean_of_the_classes_covariances():
    x, y = samples()
    ours = LDA(6, shrinkage=0.1, priors="uniform", balance=True).partial_fit(x, y)
    covariance = np.mean([np.cov(x[y == c].T, bias=True) for c in range(4)], axis=0)
    np.testing.assert_allclose(ours.covariance, covariance, atol=1e-12)
    np.testing.assert_allclose(ours.means, [x[y == c].mean(0) for c in range(4)], atol=1e-12)
    many = LDA(6, shrinkage=0.1, priors="uniform").partial_fit(*replicated(x, y))
    np.testing.assert_allclose(ours.logits(x), many.logits(x), atol=1e-9)


@pytest.mark.parametrize("classifier", [lambda: Ridge(6, strength=0.1, balance=True), lambda: LDA(6, balance=True)])
def test_a_balanced_class_comes_once(classifier):
    x, y = samples()
    model = classifier().partial_fit(x, y)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        DataError, match="class 2 has samples already; with balance all samples of a class must come in"
    ):
        model.partial_fit(x[y == 2], y[y == 2])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_teen_by_its_formula():
    rng = np.random.RandomState(0)
    y = np.repeat([0, 1, 2, 3, 4], [30, 20, 6, 5, 1])
    x = rng.randn(len(y), 8) + rng.randn(6, 8)[y]
    new = rng.randn(9, 8)
    model = NCM(8, teen=Teen(shots=5, alpha=0.3, tau=4)).partial_fit(x, y)

    def unit(v):
        return v / np.linalg.norm(v, axis=-1, keepdims=True)

    p = unit(np.stack([x[y == c].mean(0) for c in range(5)]))
    expected = p.copy()
    for c in (3, 4):
        weights = np.exp(4 * p[:3] @ p[c])
        expected[c] = 0.7 * p[c] + 0.3 * unit(weights @ p[:3] / weights.sum())
    np.testing.assert_allclose(model.logits(new), unit(new) @ unit(expected).T, atol=1e-12)
    plain = NCM(8).partial_fit(x, y)
    np.testing.assert_allclose(model.logits(new)[:, :3], plain.logits(new)[:, :3], atol=1e-15)  # base classes stay
    parts = NCM(8, teen=Teen(shots=5, alpha=0.3, tau=4))
    for some in (y > 3, y < 2, (y > 1) & (y < 4)):  # few-shot classes first: the order of tasks changes nothing
        parts.partial_fit(x[some], y[some]).logits(new)
    np.testing.assert_allclose(parts.logits(new), model.logits(new), atol=1e-12)
    few = NCM(8, teen=Teen(shots=100)).partial_fit(x, y)  # without base classes nothing is calibrated
    np.testing.assert_allclose(few.logits(new), plain.logits(new), atol=1e-15)
    with pytest.raises(ConfigError, match="compares class means by cosine; got metric 'euclidean'"):
        NCM(8, "euclidean", Teen())


def test_learners_pass_their_keys_on(backbone):
    assert build_learner({"name": "ranpac", "projection": 20, "balance": True}, backbone).classifier.balance
    assert build_learner({"name": "slda", "balance": True}, backbone).classifier.balance
    teen = {"name": "ncm", "calibrate": "teen", "shots": 3, "alpha": 0.1, "tau": 8}
    assert build_learner(teen, backbone).classifier.teen == Teen(3, 0.1, 8.0)
    assert build_learner("ncm", backbone).classifier.teen is None


def test_few_shot_classes_are_not_drowned():
    """One-hot ridge hardly predicts classes of 3 among classes of 200 samples; balanced, it does."""
    rng = np.random.RandomState(0)
    means = rng.randn(10, 30)
    y = np.repeat(range(10), [200] * 6 + [3] * 4)
    x, y_new = means[y] + rng.randn(len(y), 30), np.repeat(range(10), 50)
    new = means[y_new] + rng.randn(len(y_new), 30)
    novel = {}
    for balance in (False, True):
        predicted = Ridge(30, strength=1.0, balance=balance).partial_fit(x, y).logits(new).argmax(1).numpy()
        novel[balance] = (predicted == y_new)[y_new >= 6].mean()
    assert novel[False] < 0.4 and novel[True] > novel[False] + 0.3


def test_base_novel_and_harmonic_accuracy_by_hand():
    nan = float("nan")
    r, total = np.array([[0.9, nan, nan], [0.5, 0.8, nan], [0.6, 0.9, 0.3]]), np.array([10, 20, 10])
    assert [metrics.base_accuracy_at(r, i) for i in range(3)] == [0.9, 0.5, 0.6]
    assert metrics.novel_accuracy_at(r, total, 1) == 0.8
    assert metrics.novel_accuracy_at(r, total) == pytest.approx((18 + 3) / 30)
    assert metrics.harmonic_accuracy_at(r, total) == pytest.approx(2 * 0.6 * 0.7 / 1.3)
    assert np.isnan([metrics.novel_accuracy_at(r, total, 0), metrics.harmonic_accuracy_at(r, total, 0)]).all()
    assert metrics.harmonic_accuracy_at(np.array([[1.0, nan], [0.0, 0.0]]), np.array([5, 5])) == 0.0


def test_calibrated_means_by_their_formulas():
    rng = np.random.RandomState(0)
    y = np.repeat(range(6), [30, 20, 40, 5, 3, 1])
    x, new = rng.randn(len(y), 5) + 2 * rng.randn(6, 5)[y], rng.randn(7, 5)
    means, few = np.stack([x[y == c].mean(0) for c in range(6)]), (3, 4, 5)
    nearest, between = means.copy(), means.copy()
    model = LDA(5, 0.1, "uniform").partial_fit(x, y)
    within = model.covariance.numpy()
    within = 0.9 * within + 0.1 * np.trace(within) / 5 * np.eye(5)
    centre, spread = means[:3].mean(0), np.cov(means[:3].T, bias=True)
    for c in few:
        order = np.argsort(np.linalg.norm(means[:3] - means[c], axis=1))[:2]
        nearest[c] = (means[c] + means[order].sum(0)) / 3
        between[c] = centre + spread @ np.linalg.inv(spread + within / (y == c).sum()) @ (means[c] - centre)
    for kind, expected in (("nearest", nearest), ("between", between)):
        calibrated = LDA(5, 0.1, "uniform", calibration=Calibration(kind)).partial_fit(x, y)
        weights = expected @ np.linalg.inv(within)
        scores = new @ weights.T - (weights * expected).sum(1) / 2 - np.log(6)
        np.testing.assert_allclose(calibrated.logits(new), scores, atol=1e-9)
        parts = LDA(5, 0.1, "uniform", calibration=Calibration(kind))
        for some in (y > 3, y < 2, (y > 1) & (y < 4)):  # few-shot classes first
            parts.partial_fit(x[some], y[some]).logits(new)
        np.testing.assert_allclose(parts.logits(new), calibrated.logits(new), atol=1e-9)
    ours = NCM(5, "euclidean", Calibration("nearest", neighbours=2)).partial_fit(x, y)
    distance = ((new[:, None] - nearest) ** 2).sum(2)
    np.testing.assert_allclose(ours.logits(new), (new**2).sum(1)[:, None] / 2 - distance / 2, atol=1e-9)
    with pytest.raises(ConfigError, match="needs a covariance within classes"):
        Calibration("between").calibrated(torch.from_numpy(means), torch.tensor([9, 9, 9, 5, 3, 1]))
    same = Calibration("between", shots=100).calibrated(torch.from_numpy(means), torch.ones(6, dtype=torch.int64))
    assert (same.numpy() == means).all()  # without base classes nothing is calibrated


def test_calibration_of_the_learners(backbone):
    learner = build_learner({"name": "slda", "calibrate": "between", "shots": 3}, backbone)
    assert learner.classifier.calibration == Calibration("between", 3, 2)
    assert build_learner("slda", backbone).classifier.calibration is None
    learner = build_learner({"name": "ncm", "calibrate": "nearest", "neighbours": 3}, backbone)
    assert learner.classifier.teen == Calibration("nearest", 5, 3)


def few_among_many(seed=0):
    """Features and labels of three base classes and of two with 5 and 2 samples."""
    rng = np.random.RandomState(seed)
    y = np.repeat(range(5), [30, 20, 40, 5, 2])
    return rng.randn(len(y), 4) * [1, 2, 0.5, 1] + 3 * rng.randn(5, 4)[y], y


def by_hand(x, y, sample, k, alpha):
    """Yang et al., eq. 6, with α in units of the mean variance, for one sample."""
    means = np.stack([x[y == c].mean(0) for c in range(3)])
    near = np.argsort(((means - sample) ** 2).sum(1))[:k]
    spread = np.mean([np.cov(x[y == c].T) for c in near], axis=0)
    return (sample + means[near].sum(0)) / (k + 1), spread + alpha * np.trace(spread) / 4 * np.eye(4)


@pytest.mark.parametrize("k", [1, 2, 9])
def test_calibrated_gaussians_by_their_formulas(k):
    x, y = few_among_many()
    base = Gaussians(4).partial_fit(x[y < 3], y[y < 3])
    means, spreads = base.calibrated(torch.from_numpy(x[y >= 3]), k, 0.3)
    for sample, mean, spread in zip(x[y >= 3], means, spreads, strict=True):
        expected = by_hand(x, y, sample, min(k, 3), 0.3)
        np.testing.assert_allclose(mean, expected[0], atol=1e-12)
        np.testing.assert_allclose(spread, expected[1], atol=1e-12)
    with pytest.raises(DataError, match="no class has samples"):
        Gaussians(4).calibrated(torch.zeros(1, 4))


def test_draws_by_hand():
    """Every draw is the calibrated Gaussian's, in order; base classes are taken from the same samples."""
    x, y = few_among_many()
    base = Gaussians(4)
    draws = Draws(shots=5, neighbours=2, alpha=0.21, draws=8)
    features, labels = draws.extended(torch.from_numpy(x), torch.from_numpy(y), base, generator(3))
    assert base.counts.tolist() == [30, 20, 40]
    assert (features[: len(y)].numpy() == x).all() and (labels[: len(y)].numpy() == y).all()
    assert labels[len(y) :].tolist() == [3] * 5 + [4] * 8  # one draw per image of five, four per image of two
    source, row = generator(3), len(y)
    for c, count in ((3, 1), (4, 4)):
        z = torch.randn((y == c).sum(), count, 4, generator=source).double().numpy()
        for sample, normal in zip(x[y == c], z, strict=True):
            mean, spread = by_hand(x, y, sample, 2, 0.21)
            root = np.linalg.cholesky(spread + 1e-4 * np.eye(4))
            np.testing.assert_allclose(features[row : row + count], mean + normal @ root.T, atol=1e-5)
            row += count
    many = base.sample_near(torch.from_numpy(x[-1:]), 20_000, generator(1), 2, 0.21).numpy()
    mean, spread = by_hand(x, y, x[-1], 2, 0.21)
    np.testing.assert_allclose(many.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(many.T), spread, atol=0.1)
    none = Draws().extended(torch.from_numpy(x[y > 2]), torch.from_numpy(y[y > 2]), Gaussians(4), generator(3))
    assert len(none[0]) == 7  # without base classes nothing is drawn


def test_slda_learns_draws_from_its_own_generator(backbone, image_set):
    train, test = image_set(np.arange(6).repeat([9, 9, 3, 3, 3, 3])), image_set(np.arange(6))
    learners = [build_learner({"name": "slda", "calibrate": "draws", "shots": 3, "draws": 30}, backbone) for _ in "ab"]
    before = torch.get_rng_state()
    for learner in learners:
        run_stages(learner, Stream(train, test, ClassIncremental("natural", increment=2)), accelerator=accelerator())
    assert torch.equal(torch.get_rng_state(), before)
    first, again = (learner.state_dict() for learner in learners)
    assert first["classifier.counts"].tolist() == [9, 9, 33, 33, 33, 33]  # three images and thirty draws
    assert first["base.counts"].tolist() == [9, 9]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert learners[0].statistics is None  # what is kept of a class is more than the sums of its images


def test_draws_need_whole_classes(backbone, image_set):
    labels = np.arange(4).repeat(12)
    learner = build_learner({"name": "slda", "calibrate": "draws"}, backbone)
    blurry = Stream(image_set(labels), image_set(labels), Blurry(1993, 2, 50, 30))
    with pytest.raises(StreamError, match="slda with calibrate=draws needs all images of a class in one task"):
        require_supported(SLDA, blurry, learner.config)
    whole = ClassIncremental(1993, increment=2)
    online = Stream(image_set(labels), image_set(labels), whole, online=Online(4, 8))
    with pytest.raises(StreamError, match=r"slda needs calibrate=none with stream\.online"):
        require_supported(SLDA, online, learner.config)
    learner.begin(blurry.tasks[0], context(0))
    learner.learn(blurry.tasks[0], context(0))
    learner.begin(blurry.tasks[1], context(1))
    with pytest.raises(DataError, match=r"slda: class \d has images already; with calibrate: draws"):
        learner.learn(blurry.tasks[1], context(1))
