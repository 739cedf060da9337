"""ACIL, AIR, DS-AL and GKEAL: their published recursions and sums in numpy give the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as Joint
from sklearn.metrics.pairwise import rbf_kernel

from cil.classifiers import Ridge
from cil.learners import build_learner
from cil.testing import Case, parametrize_learner
from cil.testing.setting import backbone, context, probe_images, stream


@parametrize_learner([("ds_al", {"projection": 60})])
def test_common_checks(case, check):
    check(case)


@pytest.mark.slow
@parametrize_learner(
    [
        ("acil", {"projection": 60}),
        ("air", {"projection": 60}),
        ("air", {"projection": None, "strength": "gcv"}),
        ("ds_al", {"projection": None, "layers": "last", "compensation_strength": 1}),
        ("gkeal", {"centres": 40}),
        ("gkeal", {"centres": 60, "bandwidth": 5, "layers": "last", "balance": True}),
    ]
)
def test_common_checks_of_variants(case, check):
    check(case)


def rows(n, f=5, seed=0):
    return np.random.RandomState(seed).randn(n, f)


def recursive(h, y, gamma, splits):
    """The authors' recursion: W and S = (HᵀH + γI)⁻¹ by Woodbury's identity, batch after batch."""
    s, w = np.eye(h.shape[1]) / gamma, np.zeros((h.shape[1], y.shape[1]))
    for part, target in zip(np.split(h, splits), np.split(y, splits), strict=True):
        k = np.linalg.inv(np.eye(len(part)) + part @ s @ part.T)
        s = s - s @ part.T @ k @ part @ s
        w = w + s @ part.T @ (target - part @ w)
    return w


@pytest.mark.parametrize("splits", [[], [1, 7, 30], list(range(5, 60, 5))])
def test_recursive_least_squares_is_ridge_whatever_the_batches(splits):
    """With U ~ U(±1/√F) and γ; here R = √(3F) U and λ = 3Fγ."""
    x, labels, gamma = rows(60), np.arange(60) % 4, 0.1
    u = np.random.RandomState(1).uniform(-1, 1, (5, 20)) / np.sqrt(5)
    w = recursive(np.maximum(x @ u, 0), np.eye(4)[labels], gamma, splits)
    ridge = Ridge(5, 20, 15 * gamma)
    ridge.projection = torch.from_numpy(np.sqrt(15) * u).float()
    for part, target in zip(np.split(x, splits), np.split(labels, splits), strict=True):
        ridge.partial_fit(part, target)
    np.testing.assert_allclose(ridge.logits(x).numpy(), np.maximum(x @ u, 0) @ w, atol=1e-5)


def test_rows_count_as_often_as_they_are_given():
    """MIN's ridge sees every image of a task four times."""
    x, labels = rows(30), np.arange(30) % 3
    often = Ridge(5, None, 2.0).partial_fit(np.repeat(x, 4, 0), np.repeat(labels, 4))
    once = Ridge(5, None, 0.5).partial_fit(x, labels)
    np.testing.assert_allclose(often.weights.numpy(), once.weights.numpy(), atol=1e-12)


def learned(name, tasks=2, **parameters):
    """A learner after the first tasks of the checks, with the features and labels of their images in float64."""
    vit = backbone()
    data, learner, features = stream(vit), build_learner({"name": name, **parameters}, vit), []
    for task in data.tasks[:tasks]:
        ctx = context()
        learner.begin(task, ctx)
        learner.learn(task, ctx)
        x, y = ctx.features(vit, task.train)
        features.append((x.double().numpy(), y.numpy()))
    return learner.eval(), features


def test_acil_uses_the_unit_of_the_authors_projection():
    acil = learned("acil", 1, projection=30)[0]
    assert acil.classifier.strength_ == pytest.approx(3 * 48 * 0.1)
    assert learned("acil", 1, projection=None)[0].classifier.strength_ == pytest.approx(0.1)
    assert isinstance(learned("acil", 1, projection=30, strength="gcv")[0].classifier.strength, str)


@pytest.mark.parametrize("projection", [None, 30])
def test_air_weighs_each_class_gram_by_its_size(projection):
    """All three tasks, of 4, 1 and 3 classes, one of which has one image and the others twelve."""
    air, parts = learned("air", 3, projection=projection)
    x, y = (np.concatenate(part) for part in zip(*parts, strict=True))
    u = np.eye(48) if projection is None else air.classifier.projection.double().numpy() / np.sqrt(144)
    h = x @ u if projection is None else np.maximum(x @ u, 0)
    counts = np.bincount(y)
    weights = (1 / counts) / (1 / counts).mean()
    gram = sum(weights[c] * h[y == c].T @ h[y == c] for c in range(8))
    targets = np.stack([weights[c] * h[y == c].sum(0) for c in range(8)], 1)
    w = np.linalg.solve(gram + 0.1 * np.eye(len(gram)), targets)
    found = air.classifier.logits(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, h @ w, atol=1e-5)


def test_air_is_acil_on_balanced_data_and_ignores_repetitions():
    x, labels = rows(40), np.arange(40) % 4
    balanced = Ridge(5, None, 0.1 / 10, balance=True).partial_fit(x, labels)
    np.testing.assert_allclose(
        balanced.weights.numpy(), Ridge(5, None, 0.1).partial_fit(x, labels).weights.numpy(), atol=1e-12
    )
    twice = np.concatenate([np.arange(40), np.flatnonzero(labels == 2)])
    repeated = Ridge(5, None, 0.1 / 10, balance=True).partial_fit(x[twice], labels[twice])
    np.testing.assert_allclose(repeated.weights.numpy(), balanced.weights.numpy(), atol=1e-12)


def test_ds_al_learns_the_residuals_of_new_classes():
    learner, parts = learned("ds_al", projection=30, compensation=0.5)
    u = learner.classifier.projection.double().numpy() / np.sqrt(144)
    gram, targets, second, residuals = np.zeros((30, 30)), np.zeros((30, 5)), np.zeros((30, 30)), np.zeros((30, 5))
    for task, (x, y) in enumerate(parts):
        h, t, onehot = np.maximum(x @ u, 0), np.tanh(x @ u), np.eye(5)[y]
        gram, targets = gram + h.T @ h, targets + h.T @ onehot
        w = np.linalg.solve(gram + 0.1 * np.eye(30), targets)
        left = onehot - h @ w
        left[:, [4] if task == 0 else range(4)] = 0  # class 4 is not there yet, classes 0 to 3 are old
        second, residuals = second + t.T @ t, residuals + t.T @ left
    x = np.concatenate([part[0] for part in parts])
    v = np.linalg.solve(second + 0.1 * np.eye(30), residuals)
    expected = np.maximum(x @ u, 0) @ w + 0.5 * np.tanh(x @ u) @ v
    np.testing.assert_allclose(learner.logits(torch.from_numpy(x)).numpy(), expected, atol=1e-4)
    assert np.abs(v).max() > 1e-3


def test_without_compensation_ds_al_is_acil():
    images = probe_images()
    scores = [
        learner.logits(learner.features(images))
        for learner, _ in (learned("ds_al", projection=30, compensation=0), learned("acil", projection=30))
    ]
    assert torch.equal(*scores)


def test_gkeal_is_ridge_on_the_kernels_around_the_centres():
    learner, parts = learned("gkeal", centres=20, strength=0.3)
    (first, _), (second, _) = parts
    centres, sigma = learner.centres.double().numpy(), float(learner.bandwidth)
    taken = [int(np.abs(first - centre).sum(1).argmin()) for centre in centres]
    assert len(set(taken)) == 20 and max(taken) > 20  # the authors' draw takes the first ones only
    np.testing.assert_allclose(centres, first[taken], atol=1e-6)
    distances = np.sqrt(np.square(centres[:, None] - centres[None]).sum(2))[np.triu_indices(20, 1)]
    assert np.isclose(sigma, np.sort(distances)[(len(distances) - 1) // 2], rtol=1e-5)
    x, y = np.concatenate([first, second]), np.concatenate([part[1] for part in parts])
    h = rbf_kernel(x, centres, gamma=1 / (2 * sigma**2))
    joint = Joint(0.3, fit_intercept=False).fit(h, np.eye(5)[y])
    np.testing.assert_allclose(learner.logits(torch.from_numpy(x)).numpy(), joint.predict(h), atol=1e-4)


def test_more_centres_than_images_repeat_them():
    learner, [(first, _)] = learned("gkeal", 1, centres=100)
    taken = [int(np.abs(first - centre).sum(1).argmin()) for centre in learner.centres.double().numpy()]
    assert sorted(np.bincount(taken, minlength=48)) == [2] * 44 + [3] * 4
    assert Case(type(learner), {"centres": 100}).config.bandwidth is None
