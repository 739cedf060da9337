"""Classifiers alone on tensors, against independent implementations and under any split of the data."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.linalg import lapack
from scipy.stats import multivariate_normal
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier, RidgeCV
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.neighbors import NearestCentroid
from torch import nn

from cil.classifiers import (
    LDA,
    NCM,
    CosineHead,
    Gaussians,
    LinearHead,
    Mahalanobis,
    PartsLDA,
    Ridge,
    TruncatedSVD,
    quadratic,
)
from cil.classifiers.lda import RATIOS
from cil.classifiers.ridge import STRENGTHS
from cil.classifiers.selection import Selection
from cil.errors import ConfigError, DataError, TrainingError
from cil.learners.bases.alignment import SampledFeatures, mean_scales, normalized_cross_entropy
from cil.utils import packed
from cil.utils.linalg import add_gram_, eigh_, ridge_solve, symmetric_inverse
from cil.utils.randomness import generator

FROM_SUMS = {
    "ncm": lambda: NCM(12),
    "ncm euclidean": lambda: NCM(12, "euclidean"),
    "ridge": lambda: Ridge(12, strength=0.3),
    "ridge projected": lambda: Ridge(12, projection=40, strength=0.3).draw(generator(7)),
    "ridge cosine": lambda: Ridge(12, projection=40, strength=0.3, decision="cosine").draw(generator(7)),
    "ridge gcv": lambda: Ridge(12, strength="gcv"),
    "ridge gcv projected": lambda: Ridge(12, projection=40, strength="gcv").draw(generator(7)),
    "truncated svd, nothing cut": lambda: TruncatedSVD(12, truncation=0),
    "truncated svd projected, nothing cut": lambda: TruncatedSVD(12, 40, truncation=0).draw(generator(7)),
    "mahalanobis": lambda: Mahalanobis(12),
    "mahalanobis tukey": lambda: Mahalanobis(12, (10, 10), tukey=0.5),
    "mahalanobis plain": lambda: Mahalanobis(12, (0.5, 0.1), normalize=False, correlation=False),
    "lda": lambda: LDA(12),
    "lda uniform": lambda: LDA(12, 0.1, "uniform"),
    "lda gcv": lambda: LDA(12, "gcv"),
    "lda of parts": lambda: PartsLDA(12, [range(0, 12, 2), range(1, 12, 2)]),
    "ridge selected": lambda: Ridge(12, 40, "gcv", select=Selection(0.4)).draw(generator(7)),
    "lda selected": lambda: LDA(12, 0.1, "uniform", select=Selection(0.8, "f")),
    "gaussians": lambda: Gaussians(12),
}
"""Classifiers that are functions of sums, on features of width 12."""
EVERY = FROM_SUMS | {
    "ridge holdout": lambda: Ridge(12, projection=40),
    "ridge loo": lambda: Ridge(12, projection=40, strength="loo"),
    "truncated svd": lambda: TruncatedSVD(12, projection=40, block=50),
    "linear head": lambda: LinearHead(12),
    "cosine head": lambda: CosineHead(12),
}

from_sums = pytest.mark.parametrize("make", FROM_SUMS.values(), ids=FROM_SUMS)
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


def ten_classes(n=600, width=12, seed=0):
    """Ten overlapping classes with covariances of their own, float64, every class at least twice."""
    rng = np.random.RandomState(seed)
    means, shapes = rng.randn(10, width) * 1.5 + 0.5, rng.randn(10, width, width) * 0.4
    labels = np.concatenate([np.repeat(np.arange(10), 2), rng.randint(0, 10, n - 20)])
    x = means[labels] + np.einsum("nf,nfg->ng", rng.randn(n, width), shapes[labels]) + rng.randn(n, width) * 0.3
    return torch.from_numpy(x), torch.from_numpy(labels)


def one_hot(labels, classes=10):
    return np.eye(classes)[np.asarray(labels)]


@from_sums
def test_a_removed_class_was_never_learned(make):
    """Against the same classifier fitted without the class: all sums up to rounding, and all scores."""
    x, y = ten_classes()
    removed, without, kept = make().partial_fit(x, y), make(), y != 3
    if removed.removed_with is None:
        with pytest.raises(ConfigError, match="do not tell the samples of one class"):
            removed.remove(3, x[~kept])
        return
    without.partial_fit(x[kept], y[kept])
    removed.logits(x[:5])  # caches a solution with the class
    if removed.removed_with == "samples":
        with pytest.raises(DataError, match="only be removed with its"):
            removed.remove(3)
        with pytest.raises(DataError, match="samples; got 2"):
            removed.remove(3, x[:2])
    removed.remove(3, x[~kept])
    for name, expected in without.state_dict().items():
        torch.testing.assert_close(removed.state_dict()[name], expected, rtol=1e-9, atol=1e-9)
    scores = removed.logits(x[kept])
    torch.testing.assert_close(scores, without.logits(x[kept]), rtol=1e-6, atol=1e-7)
    assert bool((scores[:, 3] == -torch.inf).all())
    with pytest.raises(ConfigError, match="there is no class 10"):
        removed.remove(10)


@pytest.fixture
def data():
    rng = np.random.RandomState(0)
    means = rng.randn(6, 16) * 2
    labels = rng.randint(0, 6, 400)
    return torch.from_numpy((means[labels] + rng.randn(400, 16)).astype(np.float32)), torch.from_numpy(labels)


def test_euclidean_ncm_is_scikit_learns_nearest_centroid(data):
    features, labels = data
    ours = NCM(16, "euclidean").partial_fit(features, labels)
    theirs = NearestCentroid().fit(features.numpy(), labels.numpy())
    np.testing.assert_allclose(ours.means.numpy(), theirs.centroids_, atol=1e-5)
    queries = torch.randn(200, 16, generator=generator(1)) * 2
    np.testing.assert_array_equal(ours.logits(queries).argmax(1).numpy(), theirs.predict(queries.numpy()))


def test_cosine_ncm_by_hand(data):
    features, labels = data
    ours = NCM(16).partial_fit(features, labels)
    means = torch.stack([features[labels == c].double().mean(0) for c in range(6)]).float()
    expected = F.cosine_similarity(features[:, None], means[None], dim=2)
    torch.testing.assert_close(ours.logits(features), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_ncm_is_exact_under_any_split(data, metric):
    features, labels = data
    whole = NCM(16, metric).partial_fit(features, labels).logits(features)
    order = torch.from_numpy(np.random.RandomState(5).permutation(400))
    for cuts in ([100] * 4, [1, 399], [7] * 57 + [1]):
        parts = NCM(16, metric)
        for chunk in order.split(cuts):
            parts.partial_fit(features[chunk], labels[chunk])
        torch.testing.assert_close(parts.logits(features), whole, atol=1e-6, rtol=1e-6)
    by_class = NCM(16, metric)
    for c in range(6):
        by_class.partial_fit(features[labels == c], labels[labels == c])
    torch.testing.assert_close(by_class.logits(features), whole, atol=1e-6, rtol=1e-6)


def test_a_class_without_images_is_never_predicted(data):
    features, labels = data
    ncm = NCM(16)
    ncm.grow(9)
    ncm.partial_fit(features, labels)
    assert ncm.logits(features).shape == (400, 9)
    assert set(ncm.logits(features).argmax(1).tolist()) <= set(range(6))


def test_linear_head_grows_and_keeps_old_rows():
    head = LinearHead(8)
    head.grow(3, generator(0))
    old = head.weight.detach().clone()
    head.grow(5, generator(1))
    assert head.weight.shape == (5, 8) and head.bias.shape == (5,)
    assert torch.equal(head.weight[:3], old) and not torch.equal(head.weight[3:], torch.zeros(2, 8))
    assert head.weight.abs().max() <= 2 * 0.02 + 1e-6
    x = torch.randn(4, 8, generator=generator(2))
    torch.testing.assert_close(head(x), x @ head.weight.T + head.bias)
    before = torch.get_rng_state()
    head.grow(9, generator(3))
    assert torch.equal(before, torch.get_rng_state())


# --- every classifier -----------------------------------------------------------------------------------------------


@from_sums
@pytest.mark.parametrize("sizes", [[10], [2] * 5, [1] * 10, [4, 1, 3, 2]])
def test_tasks_in_any_order_equal_one_fit(make, sizes):
    x, y = ten_classes()
    whole = make().partial_fit(x, y).logits(x)
    tasks = np.split(np.random.RandomState(len(sizes)).permutation(10), np.cumsum(sizes)[:-1])
    parts = make()
    for task in tasks:
        mine = torch.isin(y, torch.from_numpy(task))
        parts.partial_fit(x[mine], y[mine])
        parts.logits(x)  # whatever is solved in between must not stay
    torch.testing.assert_close(parts.logits(x), whole, atol=1e-6, rtol=1e-6)


@from_sums
def test_batches_of_any_size_equal_one_fit(make):
    x, y = ten_classes(150)
    whole = make().partial_fit(x, y).logits(x)
    parts = make()
    for rows in torch.randperm(150, generator=generator(1)).split(7):
        parts.partial_fit(x[rows], y[rows])
    torch.testing.assert_close(parts.logits(x), whole, atol=1e-6, rtol=1e-6)


@every
def test_learns_ten_classes_better_than_chance(make):
    x, y = ten_classes()
    assert (make().partial_fit(x, y).logits(x).argmax(1) == y).double().mean() > 0.7


@every
def test_logits_have_the_features_precision(make):
    x, y = ten_classes()
    fitted = make().partial_fit(x, y)
    exact, single = fitted.logits(x), fitted.logits(x.float())
    assert exact.dtype == torch.float64 and single.dtype == torch.float32
    assert fitted.logits(x.bfloat16()).dtype == torch.float32
    off = (single - exact).abs().max() / exact.abs().max()
    assert 0 < off < 1e-4


@every
def test_numpy_equals_tensors(make):
    x, y = ten_classes()
    theirs, ours = make().partial_fit(x.numpy(), y.numpy()), make().partial_fit(x, y)
    frozen = x.numpy().copy()
    frozen.flags.writeable = False
    assert torch.equal(theirs.logits(frozen), ours.logits(x))


@every
def test_state_goes_through_safetensors_to_the_bit(make, tmp_path):
    x, y = ten_classes()
    fitted = make().partial_fit(x, y)
    save_file(fitted.state_dict(), tmp_path / "state.safetensors")
    fresh = make()
    fresh.grow(3)
    fresh.partial_fit(x[:50] + 1, y[:50] % 3)
    fresh.logits(x)  # solves something that loading has to drop
    fresh.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(fresh.logits(x), fitted.logits(x))
    nested = nn.ModuleDict({"inner": make()})
    nested.load_state_dict({f"inner.{k}": v for k, v in fitted.state_dict().items()})
    assert torch.equal(nested["inner"].logits(x), fitted.logits(x))
    fresh.partial_fit(x[:80] - 1, y[:80])  # and it learns on
    fitted.partial_fit(x[:80] - 1, y[:80])
    assert torch.equal(fresh.logits(x), fitted.logits(x))


@every
def test_a_state_of_another_width_is_refused(make):
    x, y = ten_classes(100)
    saved = make().partial_fit(x, y).state_dict()
    other = {k: v[..., : v.shape[-1] * 3 // 4] if v.ndim > 1 else v for k, v in saved.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        make().load_state_dict(other)


@every
def test_autocast_and_inference_mode_change_nothing(make):
    x, y = ten_classes()
    x = x.float()
    plain = make().partial_fit(x, y)
    expected, inside = plain.logits(x), make()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside.partial_fit(x.double(), y.clone())
        assert torch.equal(inside.logits(x.clone()), expected)
    assert torch.equal(inside.logits(x), expected)
    inside.partial_fit(x, y)  # what was made in inference mode can still be changed
    assert torch.equal(inside.logits(x), plain.partial_fit(x, y).logits(x))


@every
def test_predicting_changes_no_state(make):
    x, y = ten_classes()
    fitted = make().partial_fit(x, y)
    before = copy.deepcopy(fitted.state_dict())
    fitted.logits(x)
    after = fitted.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@every
def test_global_random_states_are_left_alone(make):
    x, y = ten_classes(200)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    make().partial_fit(x, y).logits(x)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()


@every
def test_a_copy_and_a_move_keep_the_logits(make):
    x, y = ten_classes(200)
    fitted = make().partial_fit(x, y)
    expected = fitted.logits(x)
    assert torch.equal(copy.deepcopy(fitted).logits(x), expected)
    assert torch.equal(fitted.to("cpu").logits(x), expected)
    twin = copy.deepcopy(fitted).partial_fit(x + 1, y)
    assert not torch.equal(twin.logits(x), expected) and torch.equal(fitted.logits(x), expected)


@every
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (x[:, :5], y), r"shape \[100, 5\]; expected \[N, 12\]"),
        (lambda x, y: (x[0], y), r"shape \[12\]"),
        (lambda x, y: (x.long(), y), "floating"),
        (lambda x, y: (x.numpy().astype(str), y), "numbers"),
        (lambda x, y: (torch.full_like(x, torch.nan), y), "NaN"),
        (lambda x, y: (x / 0, y), "infinite"),
        (lambda x, y: (x, y - 1), "smallest label is -1"),
        (lambda x, y: (x, y[:-1]), r"labels have shape \[99\] for 100"),
        (lambda x, y: (x, y[:, None]), r"labels have shape \[100, 1\]"),
        (lambda x, y: (x, y.double()), "labels are torch.float64"),
        (lambda x, y: (x[:0], y[:0]), "no samples"),
        (lambda x, y: (x, one_hot(y)), r"labels have shape \[100, 10\]"),
        (lambda x, y: (x, y > 3), "labels are torch.bool"),
        (lambda x, y: (x, y.numpy().astype(str)), "labels are of type <U.*expected numbers"),
        (lambda x, y: (x, [None] * 100), "labels are of type object"),
        (lambda x, y: (x, y + 2**40), "largest label is 10995.*number the classes"),
        (lambda x, y: ([[1.0, 2.0], [3.0]], y), "not an array"),
        (lambda x, y: (x.to(torch.complex64), y), "floating"),
    ],
)
def test_wrong_input_is_one_clear_line_and_changes_nothing(make, spoil, message):
    x, y = ten_classes(100)
    fitted = make().partial_fit(x, y)
    before = copy.deepcopy(fitted.state_dict())
    with pytest.raises(DataError, match=message) as caught:
        fitted.partial_fit(*spoil(x, y))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in fitted.state_dict().items())


@every
def test_wrong_queries_are_refused_and_none_are_fine(make):
    x, y = ten_classes(100)
    fitted = make().partial_fit(x, y)
    assert fitted.logits(x[:0]).shape == (0, 10)
    for wrong in (x[:, :5], x.long(), x * torch.nan):
        with pytest.raises(DataError):
            fitted.logits(wrong)


@from_sums
def test_classes_without_samples_score_minus_infinity(make):
    x, y = ten_classes(200)
    fitted = make()
    fitted.grow(4)
    assert fitted.logits(x).isneginf().all() and fitted.logits(x).shape == (200, 4)
    y = torch.where(y == 3, 4, y)
    fitted.partial_fit(x, y).grow(12)
    scores = fitted.logits(x)
    assert scores[:, [3, 10, 11]].isneginf().all()
    assert scores[:, [0, 1, 2, 4, 5, 6, 7, 8, 9]].isfinite().all()


@from_sums
def test_a_class_with_one_sample_is_recognised(make):
    x, y = ten_classes(200)
    lone = torch.full((1, 12), 40.0, dtype=torch.float64) * torch.tensor([1, -1] * 6)
    fitted = make().partial_fit(x, y).partial_fit(lone, torch.tensor([10]))
    assert fitted.logits(x).isfinite().all()
    assert fitted.logits(lone).argmax(1).item() == 10


def test_constructors_refuse_what_makes_no_sense():
    for wrong in (
        lambda: NCM(0),
        lambda: Ridge(4, projection=0),
        lambda: Ridge(4, strength=0.0),
        lambda: Ridge(4, strength=float("inf")),
        lambda: Ridge(4, strength="cv"),
        lambda: Ridge(4, decision="hinge"),
        lambda: TruncatedSVD(4, truncation=1.0),
        lambda: TruncatedSVD(4, rank=0),
        lambda: TruncatedSVD(4, strength=-1.0),
        lambda: TruncatedSVD(4, block=0),
        lambda: Mahalanobis(4, (-1.0, 0.0)),
        lambda: Mahalanobis(4, tukey=0),
        lambda: LDA(4, shrinkage=1.5),
        lambda: LDA(4, shrinkage="loo"),
        lambda: LDA(4, priors="flat"),
        lambda: Gaussians(4, ridge=0),
        lambda: SampledFeatures(Gaussians(4), 0),
    ):
        with pytest.raises(ConfigError):
            wrong()


# --- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("l2", "atol"), [(1.0, 1e-4), (0.01, 1e-3)])
def test_linear_head_alone_is_scikit_learns_logistic_regression(l2, atol):
    x, y = ten_classes()
    ours = LinearHead(12).partial_fit(x, y, l2=l2)
    theirs = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(ours.weight.detach().numpy(), theirs.coef_, atol=atol)
    np.testing.assert_allclose(
        ours.logits(x).softmax(1).detach().numpy(), theirs.predict_proba(x.numpy()), atol=atol / 10
    )


@pytest.mark.parametrize("kind", [LinearHead, CosineHead])
def test_a_head_goes_on_from_its_rows_and_grows_to_the_labels(kind):
    x, y = ten_classes()
    head = kind(12)
    head.grow(3, generator(0))
    head.partial_fit(x, y)
    assert head.num_classes == 10 and head.weight.requires_grad
    once = copy.deepcopy(head)
    head.partial_fit(x, y)  # already at the minimum
    torch.testing.assert_close(head.logits(x), once.logits(x), atol=1e-2, rtol=1e-3)
    still = copy.deepcopy(head).partial_fit(x, y, iterations=1)
    torch.testing.assert_close(still.logits(x), head.logits(x), atol=1e-2, rtol=1e-3)


def test_cosine_head_by_hand():
    head = CosineHead(8)
    head.grow(4, generator(0))
    assert head.sigma.item() == 1 and head.sigma.requires_grad
    assert head.weight.abs().max() <= 8**-0.5 and head.weight.abs().max() > 0.8 * 8**-0.5 and head.weight.min() < 0
    with torch.no_grad():
        head.sigma.fill_(3)
    x = torch.randn(5, 8, generator=generator(1))
    expected = 3 * F.cosine_similarity(x[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(head(x), expected)
    old = head.weight.detach().clone()
    head.grow(6, generator(2))
    assert torch.equal(head.weight[:4], old) and head.sigma.item() == 3


@pytest.mark.parametrize("kind", [LinearHead, CosineHead])
def test_masked_classes_get_no_probability_and_no_gradient(kind):
    head = kind(8)
    head.grow(6, generator(0))
    x, y = torch.randn(9, 8, generator=generator(1)), torch.tensor([1, 4, 4] * 3)
    logits = head(x, [1, 4])
    assert logits[:, [0, 2, 3, 5]].isneginf().all()
    assert torch.equal(logits[:, [1, 4]], head(x)[:, [1, 4]])
    F.cross_entropy(logits, y).backward()
    assert not head.weight.grad[[0, 2, 3, 5]].any() and head.weight.grad[[1, 4]].any(1).all()
    alone = kind(8)
    alone.grow(2, generator(3))
    with torch.no_grad():
        alone.weight.copy_(head.weight[[1, 4]])
    F.cross_entropy(alone(x), (y == 4).long()).backward()
    torch.testing.assert_close(head.weight.grad[[1, 4]], alone.weight.grad)
    assert torch.equal(head(x, range(1, 3)).isneginf(), head(x, torch.tensor([1, 2])).isneginf())


@pytest.mark.parametrize("kind", [LinearHead, CosineHead])
def test_extending_appends_the_other_heads_rows(kind):
    head, task = kind(8), kind(8)
    head.grow(3, generator(0))
    task.grow(2, generator(1))
    x = torch.randn(4, 8, generator=generator(2))
    expected = torch.cat([head(x), task(x)], 1)
    rows = torch.cat([head.weight, task.weight])
    assert head.extend(task) is head and torch.equal(head.weight, rows)
    torch.testing.assert_close(head(x), expected)  # a wider product may round otherwise
    extended = head(x)
    with torch.no_grad():
        task.weight.zero_()
    assert torch.equal(head(x), extended)
    for other in (LinearHead(7), CosineHead(7), (CosineHead if kind is LinearHead else LinearHead)(8)):
        with pytest.raises(ConfigError, match="cannot be extended"):
            head.extend(other)


def test_heads_train_under_autocast_in_its_precision():
    head = LinearHead(8)
    head.grow(3, generator(0))
    x = torch.randn(4, 8, generator=generator(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == torch.bfloat16 and head.logits(x).dtype == torch.float32


# --- ridge ----------------------------------------------------------------------------------------------------------


def hidden(ridge, x):
    """H by numpy, from the state alone."""
    return np.maximum(x.numpy() @ ridge.state_dict()["projection"].double().numpy(), 0)


def solve(h, y, strength):
    return np.linalg.solve(h.T @ h + strength * np.eye(h.shape[1]), h.T @ y)


@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e3])
def test_ridge_is_scikit_learns(strength):
    x, y = ten_classes()
    ours = Ridge(12, strength=strength).partial_fit(x, y)
    theirs = SklearnRidge(alpha=strength, fit_intercept=False, solver="cholesky").fit(x.numpy(), one_hot(y))
    np.testing.assert_allclose(ours.weights.numpy(), theirs.coef_.T, atol=1e-9)
    np.testing.assert_allclose(ours.logits(x).numpy(), theirs.predict(x.numpy()), atol=1e-9)


def test_ridge_on_random_features_by_hand():
    x, y = ten_classes()
    ridge = Ridge(12, projection=64, strength=2.0).partial_fit(x, y, generator(3))
    state = ridge.state_dict()
    assert state["projection"].shape == (12, 64) and abs(float(state["projection"].std()) - 1) < 0.1
    h = hidden(ridge, x)
    w = solve(h, one_hot(y), 2.0)
    np.testing.assert_allclose(ridge.logits(x).numpy(), h @ w, atol=1e-8)
    np.testing.assert_allclose(ridge.gram.numpy(), h.T @ h, rtol=1e-10)
    np.testing.assert_allclose(state["targets"].numpy(), one_hot(y).T @ h, rtol=1e-10)
    assert torch.equal(ridge.gram, ridge.gram.T)
    pilot = Ridge(12, projection=64, strength=2.0, decision="cosine").partial_fit(x, y, generator(3))
    np.testing.assert_allclose(pilot.logits(x).numpy(), h @ (w / np.linalg.norm(w, axis=0)), atol=1e-8)
    assert not torch.equal(pilot.logits(x).argmax(1), ridge.logits(x).argmax(1))


def test_ridge_predicts_like_the_ridge_classifier():
    """±1 targets with an intercept column give the predictions of 0/1 targets: both are affine in each other."""
    x, y = ten_classes()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    ours = Ridge(13, strength=1e-6).partial_fit(x, y)
    theirs = RidgeClassifier(alpha=1e-6, fit_intercept=False, solver="cholesky").fit(x.numpy(), y.numpy())
    np.testing.assert_array_equal(ours.logits(x).argmax(1).numpy(), theirs.predict(x.numpy()))


def test_the_projection_is_drawn_once():
    x, y = ten_classes(100)
    ridge = Ridge(12, projection=30, strength=1.0).draw(generator(1))
    drawn = ridge.projection.clone()
    assert not torch.equal(ridge.draw(generator(2)).projection, drawn)
    ridge.draw(generator(1)).partial_fit(x, y, generator(5)).partial_fit(x, y)
    assert torch.equal(ridge.projection, drawn)
    with pytest.raises(ConfigError, match="drawn again"):
        ridge.draw(generator(2))
    twin = Ridge(12, projection=30, strength=1.0).partial_fit(x, y)
    assert torch.equal(twin.logits(x), Ridge(12, projection=30, strength=1.0).partial_fit(x, y).logits(x))
    assert Ridge(12).draw(generator(1)).projection is None


@pytest.mark.parametrize("width", [24, 300])  # fewer features than samples, and more: Gram matrix and kernel
def test_holdout_equals_seventeen_solves(width):
    x, y = ten_classes(200)
    ridge = Ridge(12, projection=width).draw(generator(0))
    ridge.partial_fit(x + 1, y, generator(8))
    strengths = set()
    for seed, noise in ((1, 0.0), (2, 5.0), (3, 30.0)):
        x_now = x + noise * torch.randn(x.shape, generator=generator(seed), dtype=torch.float64)
        ridge.partial_fit(x_now, y, generator(seed))
        order = torch.randperm(200, generator=generator(seed))
        h, t = hidden(ridge, x_now[order]), one_hot(y[order])
        errors = np.array([((h[160:] @ solve(h[:160], t[:160], s) - t[160:]) ** 2).mean() for s in STRENGTHS])
        ours = np.array(ridge.holdout_errors(x_now[order], torch.from_numpy(t)))
        safe = np.array(STRENGTHS) >= (1e-6 if width == 24 else 1e-3)  # below, the explicit solves themselves are noise
        np.testing.assert_allclose(ours[safe], errors[safe], rtol=1e-5)
        assert ridge.strength_.item() == STRENGTHS[int(ours.argmin())] == STRENGTHS[int(errors.argmin())]
        strengths.add(ridge.strength_.item())
    assert len(strengths) > 1  # the data matters


def test_loo_equals_refitting_without_each_sample():
    x, y = ten_classes(90)
    noisy = x + 3 * torch.randn(x.shape, generator=generator(1), dtype=torch.float64)
    ridge = Ridge(12, projection=30, strength="loo").draw(generator(0))
    ridge.partial_fit(noisy[:50], y[:50]).partial_fit(noisy[50:], y[50:])
    h, t = hidden(ridge, noisy), one_hot(y)
    errors = np.zeros(17)
    for i in range(50, 90):  # this call's samples under all data but themselves
        rest = np.arange(90) != i
        for k, s in enumerate(STRENGTHS):
            errors[k] += ((h[i] @ solve(h[rest], t[rest], s) - t[i]) ** 2).mean() / 40
    np.testing.assert_allclose(ridge.leave_one_out_errors(noisy[50:], torch.from_numpy(t[50:])), errors, rtol=1e-6)
    assert ridge.strength_.item() == STRENGTHS[int(errors.argmin())]


def test_loo_on_one_batch_is_scikit_learns_ridge_cv():
    x, y = ten_classes(150)
    chosen = set()
    for noise in (0.0, 3.0, 20.0):
        noisy = x + noise * torch.randn(x.shape, generator=generator(2), dtype=torch.float64)
        ours = Ridge(12, projection=100, strength="loo").partial_fit(noisy, y, generator(4))
        theirs = RidgeCV(STRENGTHS, fit_intercept=False).fit(hidden(ours, noisy), one_hot(y))
        assert ours.strength_.item() == theirs.alpha_
        np.testing.assert_allclose(ours.weights.numpy(), theirs.coef_.T, atol=1e-6)
        chosen.add(theirs.alpha_)
    assert len(chosen) > 1


def test_loo_that_interpolates_is_still_finite():
    x, y = ten_classes(40)
    ridge = Ridge(12, projection=200, strength="loo").partial_fit(x, y)
    assert ridge.strength_.item() in STRENGTHS and ridge.logits(x).isfinite().all()
    errors = ridge.leave_one_out_errors(x, torch.from_numpy(one_hot(y)))
    assert errors[0] == float("inf") and min(errors) < 0.1


@pytest.mark.parametrize("n", [500, 60])  # more samples than features, and fewer
def test_gcv_by_the_hat_matrix(n):
    x, y = ten_classes(n)
    chosen = set()
    for noise in (0.0, 3.0, 30.0):
        noisy = x + noise * torch.randn(x.shape, generator=generator(3), dtype=torch.float64)
        ridge = Ridge(12, projection=100, strength="gcv").draw(generator(0))
        ridge.partial_fit(noisy[: n // 3], y[: n // 3]).partial_fit(noisy[n // 3 :], y[n // 3 :])
        h, t = hidden(ridge, noisy), one_hot(y)
        ours = np.array(ridge.generalised_errors())
        for error, strength in zip(ours, STRENGTHS, strict=True):
            if strength >= 1e-3:  # below, the explicit hat matrix itself is noise
                hat = h @ np.linalg.solve(h.T @ h + strength * np.eye(100), h.T)
                free, residual = 1 - np.trace(hat) / n, t - hat @ t
                expected = (residual**2).sum() / n / free**2 if free >= 1e-4 else math.inf
                assert error == pytest.approx(expected, rel=1e-5)
        assert ridge.strength_.item() == STRENGTHS[int(ours.argmin())]
        chosen.add(ridge.strength_.item())
    assert len(chosen) > 1


def test_gcv_that_interpolates_is_still_finite():
    x, y = ten_classes(40)
    ridge = Ridge(12, projection=200, strength="gcv").partial_fit(x, y)
    errors = ridge.generalised_errors()
    assert errors[0] == float("inf") and 0 < min(errors) < 1 and ridge.logits(x).isfinite().all()


@pytest.mark.parametrize("n", [2, 5, 20])
def test_gcv_of_single_samples_is_that_of_all_at_once(n):
    """A call with one sample chooses too, as the samples before it count: the cut is of no account."""
    x, y = ten_classes(40)
    together = Ridge(12, strength="gcv").partial_fit(x[:n], y[:n])
    one_by_one = Ridge(12, strength="gcv")
    for i in range(n):
        one_by_one.partial_fit(x[i : i + 1], y[i : i + 1])
    assert one_by_one.strength_ == together.strength_ != 1.0, "1 is what it starts with"


def test_what_the_newest_task_says_is_not_what_all_say():
    """Eight blurred classes, then two clear ones: GCV chooses as for all at once, a held-out fifth for the two."""
    x, y = ten_classes(400)
    x = x + 20 * (y < 8)[:, None] * torch.randn(x.shape, generator=generator(1), dtype=torch.float64)
    chosen = {}
    for strength in ("gcv", "holdout"):
        together = Ridge(12, projection=60, strength=strength).partial_fit(x, y, generator(0))
        cut = Ridge(12, projection=60, strength=strength).draw(generator(0))
        for task in (y < 4, (y >= 4) & (y < 8), y >= 8):
            cut.partial_fit(x[task], y[task], generator(0))
        chosen[strength] = float(together.strength_), float(cut.strength_)
    assert chosen["gcv"][0] == chosen["gcv"][1] > chosen["holdout"][1]
    assert chosen["holdout"][0] != chosen["holdout"][1]


@pytest.mark.parametrize("strength", ["holdout", "loo", "gcv"])
def test_one_sample_keeps_the_strength(strength):
    x, y = ten_classes(200)
    ridge = Ridge(12, strength=strength).partial_fit(x[:1], y[:1])
    assert ridge.strength_.item() == 1.0
    chosen = ridge.partial_fit(x, y).strength_.item()
    assert chosen != 1.0 and ridge.partial_fit(x[:1], y[:1]).strength_.item() == chosen
    ridge.partial_fit(x[:2], y[:2])


def test_a_strength_below_resolution_gives_the_least_squares_solution():
    x, y = ten_classes(30)
    ridge = Ridge(12, projection=80, strength=1e-300).partial_fit(x, y)  # rank 30 of 80, and no help from λ
    h = hidden(ridge, x)
    assert np.linalg.matrix_rank(h) < 80
    np.testing.assert_allclose(ridge.logits(x).numpy(), h @ np.linalg.pinv(h) @ one_hot(y), atol=1e-3)


# --- covariances ----------------------------------------------------------------------------------------------------


def fecam(train, labels, queries, alpha1, alpha2):
    """The authors' FeCAM_vit_cifar100.py in numpy: normalise, mean and covariance, shrink, correlation, pinv."""
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    distances = []
    for c in range(labels.max() + 1):
        mine = train[labels == c]
        mean, cov = mine.mean(0), np.cov(mine.T)
        eye = np.eye(len(cov))
        off = cov - np.diag(np.diag(cov))
        cov = cov + alpha1 * np.diag(cov).mean() * eye + alpha2 * off[off != 0].mean() * (1 - eye)
        sd = np.sqrt(np.diag(cov))
        away = queries - mean
        distances.append(np.diag(away @ np.linalg.pinv(cov / np.outer(sd, sd)) @ away.T))
    return np.stack(distances, 1)


@pytest.mark.parametrize("shrinkage", [(1.0, 0.0), (10.0, 10.0), (0.0, 0.0)])
def test_mahalanobis_is_fecam(shrinkage):
    x, y = ten_classes()
    ours = Mahalanobis(12, shrinkage).partial_fit(x, y)
    expected = fecam(x.numpy(), y.numpy(), x.numpy(), *shrinkage)
    np.testing.assert_allclose(ours.distances(x).numpy(), expected, rtol=1e-6)
    assert torch.equal(ours.logits(x), -ours.distances(x))


@pytest.mark.parametrize("correlation", [True, False])
@pytest.mark.parametrize("sizes", [(3, 3), (4, 64)], ids=["small parts", "one part"])
def test_few_samples_are_compared_by_few_directions(correlation, sizes, monkeypatch):
    """Low-rank and whole covariances, in groups and parts of any size, and after changes, are FeCAM's."""
    monkeypatch.setattr(quadratic, "GROUP", sizes[0])
    monkeypatch.setattr(quadratic, "ROWS", sizes[1])
    rng = np.random.RandomState(0)
    labels = np.repeat(np.arange(8), [4, 5, 70, 2, 6, 90, 3, 5])
    x = torch.from_numpy(rng.randn(len(labels), 48) @ rng.randn(48, 48) + 3 * rng.randn(8, 48)[labels])
    ours, y = Mahalanobis(48, (0.3, 0.0), correlation=correlation), torch.from_numpy(labels)
    for known in (labels < 3, (labels >= 3) & (labels != 7), labels == 7):  # a class between is learned last
        ours.grow(8)
        ours.partial_fit(x[known], y[known]).distances(x[:2])
    queries = x + torch.from_numpy(rng.randn(*x.shape))
    u, v = (F.normalize(one, dim=1).numpy() for one in (x, queries))
    for c in range(8):
        cov = np.cov(u[labels == c].T)
        cov += 0.3 * np.diag(cov).mean() * np.eye(48)
        if correlation:
            cov /= np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
        away = v - u[labels == c].mean(0)
        expected = np.einsum("nf,fg,ng->n", away, np.linalg.inv(cov), away)
        np.testing.assert_allclose(ours.distances(queries)[:, c].numpy(), expected, rtol=1e-9)
    ours.remove(5)
    assert bool(ours.distances(queries)[:, 5].isinf().all())
    np.testing.assert_allclose(ours.distances(queries)[:, 7].numpy(), expected, rtol=1e-9)
    assert ours.distances(queries[:0]).shape == (0, 8)


def away_from_the_span(rows, matrix):
    """Squared length of each row's part on which a singular symmetric matrix is 0."""
    return np.square(rows - rows @ (matrix @ np.linalg.pinv(matrix, hermitian=True))).sum(1)


def test_mahalanobis_with_fewer_samples_than_features_does_not_ignore_the_other_directions():
    x, y = ten_classes(80, width=12)  # about 8 a class: every covariance is singular
    ours = Mahalanobis(12, (0.0, 0.0)).partial_fit(x[:40], y[:40]).partial_fit(x[40:], y[40:])
    expected = fecam(x.numpy(), y.numpy(), x.numpy(), 0, 0)  # the pseudo-inverse ignores them
    u = F.normalize(x, dim=1).numpy()
    for c in range(10):
        mine = u[y == c]
        expected[:, c] += away_from_the_span(u - mine.mean(0), np.corrcoef(mine.T))
    np.testing.assert_allclose(ours.distances(x).numpy(), expected, rtol=1e-5)


def test_mahalanobis_transforms():
    x, y = ten_classes()
    powered = x.sign() * x.abs().sqrt()
    torch.testing.assert_close(
        Mahalanobis(12, tukey=0.5).partial_fit(x, y).distances(x),
        Mahalanobis(12).partial_fit(powered, y).distances(powered),
    )
    plain = Mahalanobis(12, (0, 0), normalize=False, correlation=False).partial_fit(x, y).distances(x)
    for c in range(10):
        inverse = np.linalg.inv(np.cov(x[y == c].numpy().T))
        away = (x - x[y == c].mean(0)).numpy()
        np.testing.assert_allclose(plain[:, c], np.einsum("nf,fg,ng->n", away, inverse, away), rtol=1e-6)


def test_a_constant_feature_or_a_lone_sample_is_compared_by_the_euclidean_distance():
    x, y = ten_classes(60)
    lone = Mahalanobis(12).partial_fit(x[:1], y[:1] * 0)
    u = F.normalize(x, dim=1)
    torch.testing.assert_close(lone.distances(x)[:, 0], (u - u[0]).square().sum(1))
    x[:, 3] = 0.1  # not a number sums of squares represent exactly
    flat = Mahalanobis(12, (0, 0), normalize=False).partial_fit(x[:50], y[:50] * 0)
    rest = Mahalanobis(11, (0, 0), normalize=False)
    others = [i for i in range(12) if i != 3]
    rest.partial_fit(x[:50, others], y[:50] * 0)
    x[:, 3] += 2
    torch.testing.assert_close(flat.distances(x), rest.distances(x[:, others]) + 4)


@pytest.mark.parametrize("make", [Mahalanobis, Gaussians])
def test_only_changed_classes_are_solved_again(make, monkeypatch):
    x, y = ten_classes()
    solved = []
    original = make.covariance
    monkeypatch.setattr(make, "covariance", lambda self, c: solved.append(c) or original(self, c))
    fitted = make(12).partial_fit(x, y)
    fitted.logits(x), fitted.logits(x)
    assert sorted(solved) == list(range(10))
    solved.clear()
    fitted.partial_fit(x[y == 4], y[y == 4]).partial_fit(x[:5], torch.full((5,), 11))
    fitted.logits(x)
    assert sorted(solved) == [4, 11]


@pytest.mark.parametrize("shrinkage", [0.0, 1e-4, 0.3, 1.0])
def test_lda_is_scikit_learns(shrinkage):
    x, y = ten_classes()
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x.numpy(), y.numpy())
    ours = LDA(12, shrinkage).partial_fit(x, y)
    np.testing.assert_allclose(ours.logits(x).numpy(), theirs.decision_function(x.numpy()), rtol=1e-7, atol=1e-7)
    uniform = LDA(12, shrinkage, "uniform").partial_fit(x, y)
    by_hand = ours.logits(x) - (y.bincount() / len(y)).log() + np.log(0.1)
    torch.testing.assert_close(uniform.logits(x), by_hand, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [600, 60, 25])
def test_shrinkage_by_the_hat_matrix(n):
    """GCV is that of ridge regression with intercept of the classes' scores, and this regression is LDA with s."""
    x, y = ten_classes(n)
    x = x.repeat(1, 3) + torch.randn(n, 36, generator=generator(2), dtype=torch.float64)  # wider than 25 samples
    lda = LDA(36, "gcv", "uniform").partial_fit(x[: n // 3], y[: n // 3]).partial_fit(x[n // 3 :], y[n // 3 :])
    scale = float(lda.covariance.diagonal().mean())
    ours = lda.generalised_errors(lda.covariance, slice(None), scale)
    centred = (x - x.mean(0)).numpy()
    targets = one_hot(y) / np.sqrt(np.bincount(y))  # optimal scores up to a rotation; the intercept fits one
    for error, ratio in zip(ours, RATIOS, strict=True):
        penalty = ratio * scale * n
        hat = centred @ np.linalg.solve(centred.T @ centred + penalty * np.eye(36), centred.T) + 1 / n
        free = 1 - np.trace(hat) / n
        expected = ((targets - hat @ targets) ** 2).sum() / n / free**2 if free >= 1e-4 else math.inf
        assert error == pytest.approx(expected, rel=1e-6)
    best = RATIOS[int(np.argmin(ours))]
    assert lda.shrinkages == [best / (1 + best)]
    fixed = LDA(36, best / (1 + best), "uniform").partial_fit(x, y)
    torch.testing.assert_close(lda.logits(x), fixed.logits(x))
    # the rule's directions are those of the regression with this penalty
    slopes = np.linalg.solve(centred.T @ centred + best * scale * n * np.eye(36), centred.T @ targets)
    directions = fixed.cached("rule", fixed._solve)[0].numpy().T
    directions = directions - directions.mean(1, keepdims=True)
    residual = directions - slopes @ np.linalg.lstsq(slopes, directions, rcond=None)[0]
    assert np.abs(residual).max() < 1e-8 * np.abs(directions).max()


def test_shrinkage_is_that_of_joint_training_and_grows_with_noise():
    x, y = ten_classes(200)
    chosen = []
    for noise in (0.0, 3.0, 30.0):
        noisy = x + noise * torch.randn(x.shape, generator=generator(3), dtype=torch.float64)
        together = LDA(12, "gcv").partial_fit(noisy, y)
        cut = LDA(12, "gcv")
        for task in (y >= 6, y < 2, (y >= 2) & (y < 6)):
            cut.partial_fit(noisy[task], y[task]).logits(noisy)
        assert cut.shrinkages == together.shrinkages
        chosen += together.shrinkages
    assert chosen[0] < chosen[1] < chosen[2] < 1


def test_parts_are_the_mean_of_their_discriminants():
    x, y = ten_classes(200)
    parts = [[0, 3, 5], [7, 1], [3]]
    alone = [LDA(len(part), 0.1, "uniform").partial_fit(x[:, part], y).logits(x[:, part]) for part in parts]
    torch.testing.assert_close(PartsLDA(12, parts, 0.1).partial_fit(x, y).logits(x), sum(alone) / 3)
    for wrong in ([], [[]], [[12]], [[0], [-1]]):
        with pytest.raises(ConfigError, match="columns are from 0 to 11"):
            PartsLDA(12, wrong)


def test_parts_choose_their_own_shrinkage():
    x, y = ten_classes(200)
    noisy = torch.cat([x, x + 20 * torch.randn(x.shape, generator=generator(3), dtype=torch.float64)], dim=1)
    both = LDA(24, "gcv", blocks=2).partial_fit(noisy, y)
    alone = [LDA(12, "gcv").partial_fit(part, y).shrinkages[0] for part in noisy.chunk(2, dim=1)]
    assert both.shrinkages == alone and alone[0] < alone[1]


def test_lda_without_enough_samples_and_without_shrinkage():
    x, y = ten_classes(20)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.0).fit(x[:8].numpy(), y[:8].numpy())  # rank 4 of 12
    ours = LDA(12, 0.0).partial_fit(x[:8], y[:8])
    within = ours.covariance.numpy()
    expected = theirs.decision_function(x.numpy())  # the pseudo-inverse ignores eight directions
    for c in range(4):
        away = x.numpy() - ours.means[c].numpy()
        expected[:, c] -= away_from_the_span(away, within) / within.diagonal().mean() / 2
    found = ours.logits(x).numpy()
    np.testing.assert_allclose(found - found[:, :1], expected - expected[:, :1], rtol=1e-5, atol=1e-5)


# --- alignment ------------------------------------------------------------------------------------------------------


def test_gaussians_are_scipys():
    x, y = ten_classes()
    ours = Gaussians(12).partial_fit(x, y)
    for c in range(10):
        cov = np.cov(x[y == c].numpy().T) + 1e-4 * np.eye(12)
        expected = multivariate_normal.logpdf(x.numpy(), x[y == c].mean(0).numpy(), cov)
        np.testing.assert_allclose(ours.logits(x)[:, c].numpy(), expected, rtol=1e-7)
    lone = Gaussians(12, ridge=0.5).partial_fit(x[:1], y[:1] * 0)
    expected = multivariate_normal.logpdf(x.numpy(), x[0].numpy(), 0.5 * np.eye(12))
    np.testing.assert_allclose(lone.logits(x)[:, 0].numpy(), expected, rtol=1e-9)


def test_samples_have_the_classes_moments():
    x, y = ten_classes()
    gaussians = Gaussians(12).partial_fit(x, y)
    labels = torch.tensor([3, 7]).repeat(20_000)
    scale = torch.tensor([0.9, 1.0]).repeat(20_000)
    drawn = gaussians.sample(labels, generator(0), scale)
    assert drawn.dtype == torch.float32 and drawn.shape == (40_000, 12)
    for c, s in ((3, 0.9), (7, 1.0)):
        mine = drawn[labels == c].double()
        np.testing.assert_allclose(mine.mean(0), s * gaussians.means[c], atol=0.06)
        np.testing.assert_allclose(np.cov(mine.T), np.cov(x[y == c].T), atol=0.15)
    assert torch.equal(drawn, gaussians.sample(labels, generator(0), scale))
    assert not torch.equal(drawn, gaussians.sample(labels, generator(1), scale))
    gaussians.grow(12)
    with pytest.raises(DataError, match=r"classes \[10\].* no samples"):
        gaussians.sample(torch.tensor([0, 10]), generator(0))


def whole_moments(x, y):
    """Sums [C, F] and Σ x xᵀ [C, F, F] as they were kept before triangles were."""
    sums = torch.zeros(10, x.shape[1], dtype=torch.float64).index_add_(0, y, x)
    return sums, torch.stack([torch.zeros_like(x.T @ x).addmm_(x[y == c].T, x[y == c]) for c in range(10)])


def test_samples_are_those_of_whole_matrices_bit_for_bit():
    """Triangles, and drawing class by class in place, change no bit of what whole matrices at once give."""
    x, y = ten_classes(width=20)
    labels = torch.arange(10).repeat_interleave(17)[torch.randperm(170, generator=generator(1))]
    scale = torch.rand(170, generator=generator(2))
    z = torch.randn(170, 20, generator=generator(0)).double()
    (sums, outers), counts = whole_moments(x, y), y.bincount()
    expected = (sums / counts[:, None])[labels] * scale.double()[:, None]
    for c, n in enumerate(counts.tolist()):
        centred = (outers[c] + outers[c].T) / 2 - torch.outer(sums[c], sums[c]) / n
        factor = torch.linalg.cholesky(centred / (n - 1) + 1e-4 * torch.eye(20))
        expected[labels == c] += z[labels == c] @ factor.T
    drawn = Gaussians(20).partial_fit(x, y).sample(labels, generator(0), scale)
    assert torch.equal(drawn, expected.float())


@pytest.mark.parametrize("make", [Mahalanobis, Gaussians])
def test_whole_matrices_of_earlier_versions_are_read(make):
    x, y = ten_classes()
    known = make(12).partial_fit(x, y)
    outers = whole_moments(known.transform(x), y)[1]
    state = {**known.state_dict(), "outers": outers}
    del state["triangles"]
    read = make(12)
    read.load_state_dict(state)
    assert torch.equal(read.triangles, known.triangles) and "outers" in state
    assert torch.equal(read.logits(x), known.logits(x))
    for c in (0, 9):
        assert torch.equal(known.outer(c), (outers[c] + outers[c].T) / 2)


def test_older_means_are_shrunk():
    tasks = torch.tensor([0, 0, 1, 2])
    torch.testing.assert_close(mean_scales(tasks, 2), torch.tensor([0.9 + 0.1 / 3, 0.9 + 0.1 / 3, 0.9 + 0.2 / 3, 1.0]))
    torch.testing.assert_close(mean_scales(tasks[:2], 0), torch.ones(2))


def test_normalized_cross_entropy_is_the_authors_loop():
    sizes = [1, 5, 2]
    tasks = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    logits = (torch.randn(6, 8, generator=generator(0)) * 4).requires_grad_()
    labels = torch.tensor([0, 3, 5, 6, 7, 1])
    loss = normalized_cross_entropy(logits, labels, tasks, 0.2)
    norms = torch.stack([part.norm(dim=1) + 1e-7 for part in logits.split(sizes, dim=1)], 1).mean(1, keepdim=True)
    expected = F.cross_entropy(logits / norms / 0.2, labels)
    torch.testing.assert_close(loss, expected)
    [ours], [theirs] = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, theirs)
    mixed = torch.randperm(8, generator=generator(1))  # classes of a task need not be neighbours
    back = mixed.argsort()
    torch.testing.assert_close(normalized_cross_entropy(logits[:, mixed], back[labels], tasks[mixed], 0.2), expected)
    zero = torch.zeros(2, 8, requires_grad=True)
    normalized_cross_entropy(zero, labels[:2], tasks).backward()
    assert zero.grad.isfinite().all()


def passes(data, batch_size, seed, part=(0, 1)):
    return list(data.batches(batch_size, generator=generator(seed), augment=True, device="cpu", part=part))


def test_sampled_features_are_balanced_fresh_and_shuffled():
    x, y = ten_classes()
    data = SampledFeatures(Gaussians(12).partial_fit(x, y), per_class=7)
    assert len(data) == 70
    batches = passes(data, 16, 0)
    assert [len(b) for _, b in batches] == [16, 16, 16, 16, 6] and batches[0][0].shape == (16, 12)
    labels = torch.cat([b for _, b in batches])
    assert labels.bincount().tolist() == [7] * 10 and not torch.equal(labels, labels.sort().values)
    rng = generator(0)
    first, second = (
        torch.cat([a for a, _ in data.batches(16, generator=rng, augment=True, device="cpu")]) for _ in range(2)
    )
    assert torch.equal(first, torch.cat([a for a, _ in batches])) and not torch.equal(first, second)
    shrunk = SampledFeatures(data.gaussians, 7, scale=torch.full((10,), 0.5))
    moved = torch.cat([a for a, _ in batches]) - torch.cat([a for a, _ in passes(shrunk, 16, 0)])
    torch.testing.assert_close(moved, (0.5 * data.gaussians.means[labels]).float(), atol=1e-5, rtol=1e-5)


def test_processes_share_the_batches_of_sampled_features():
    x, y = ten_classes()
    data = SampledFeatures(Gaussians(12).partial_fit(x, y), per_class=3)
    whole = passes(data, 7, 0)
    ranks = [passes(data, 7, 0, (rank, 3)) for rank in range(3)]
    for (a, b), *parts in zip(whole, *ranks, strict=True):
        for rank, (x_part, y_part) in enumerate(parts):
            assert torch.equal(x_part, a[rank::3]) and torch.equal(y_part, b[rank::3])
    assert len(whole[-1][1]) == 2 and ranks[2][-1][0].shape == (0, 12)


def test_whole_gram_matrices_of_earlier_versions_are_read():
    x, y = ten_classes()
    known = Ridge(12, 40).partial_fit(x, y)
    state = {**known.state_dict(), "gram": known.gram}
    del state["triangle"]
    read = Ridge(12, 40)
    read.load_state_dict(state)
    assert torch.equal(read.triangle, known.triangle) and torch.equal(read.logits(x), known.logits(x))


# --- linear algebra -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [3, 7, 100])
def test_packed_triangles_are_lapacks(block, monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", block)
    matrix = torch.randn(7, 7, generator=generator(0), dtype=torch.float64)
    triangle = packed.pack(matrix)
    np.testing.assert_array_equal(triangle, lapack.dtrttp(matrix.T.numpy(), uplo="U")[0])
    assert torch.equal(packed.unpack_lower(triangle, 7), matrix.tril())
    assert torch.equal(packed.unpack(triangle, 7), matrix.tril() + matrix.tril(-1).T)
    rows, gram = torch.randn(5, 7, generator=generator(1), dtype=torch.float64), matrix @ matrix.T
    gram = (gram + gram.T) / 2
    sums = packed.pack(gram)
    add_gram_(gram, rows, block)
    packed.add_packed_gram_(sums, rows)
    assert torch.equal(packed.unpack(sums, 7), gram)
    two = torch.stack([triangle, -triangle])
    assert packed.pack(-matrix, out=two[0]) is not None and torch.equal(two[0], two[1])
    assert torch.equal(packed.diagonals(two, 7), -matrix.diagonal().expand(2, 7))


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_packed_ridge_regression_solves_the_normal_equations(width):
    rows = torch.randn(3, width, generator=generator(0), dtype=torch.float64)  # fewer than 5 or 8: G alone is singular
    triangle = packed.pack(rows.T @ rows)
    targets = torch.randn(4, width, generator=generator(1), dtype=torch.float64)
    before = triangle.clone(), targets.clone()
    expected = np.linalg.solve((rows.T @ rows).numpy() + 0.1 * np.eye(width), targets.T.numpy()).T
    np.testing.assert_allclose(packed.packed_ridge_solve(triangle, targets, 0.1), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(triangle, before[0]) and torch.equal(targets, before[1])


def test_packed_ridge_regression_raises_a_strength_that_float64_cannot_resolve():
    ones = torch.ones(1, 6, dtype=torch.float64)
    gram = 1e8 * ones.T @ ones
    triangle = packed.pack(gram)
    torch.testing.assert_close(packed.packed_ridge_solve(triangle, ones, 1e-12) @ gram, ones, rtol=1e-6, atol=0)
    with pytest.raises(TrainingError, match="too large"):
        packed.packed_ridge_solve(torch.full_like(triangle, math.nan), ones, 1.0)
    with pytest.raises(TrainingError, match="too large"):
        packed.packed_ridge_solve(triangle * math.inf, ones, 1.0)


def test_matrices_larger_than_a_block(monkeypatch):
    monkeypatch.setattr("cil.utils.linalg.BLOCK", 8)
    rows = torch.randn(40, 27, generator=generator(0), dtype=torch.float64)
    gram = torch.zeros(27, 27, dtype=torch.float64)
    add_gram_(gram, rows)
    add_gram_(gram, rows[:5])
    torch.testing.assert_close(gram, rows.T @ rows + rows[:5].T @ rows[:5])
    assert torch.equal(gram, gram.T)
    before = gram.clone()
    right = torch.randn(27, 3, generator=generator(1), dtype=torch.float64)
    torch.testing.assert_close(ridge_solve(gram, right, 0.1), torch.linalg.solve(gram + 0.1 * torch.eye(27), right))
    torch.testing.assert_close(symmetric_inverse(gram), torch.linalg.inv(gram))
    assert torch.equal(gram, before)
    factor = torch.linalg.cholesky(gram + 0.1 * torch.eye(27))
    torch.testing.assert_close(ridge_solve(gram.clone, right, 0.1), torch.cholesky_solve(right, factor))
    values, vectors = eigh_(gram)
    torch.testing.assert_close(vectors @ values.diag() @ vectors.T, before)


def test_ridge_on_more_rows_and_columns_than_a_block(monkeypatch):
    x, y = ten_classes(100)
    expected = {}
    for strength in ("holdout", "loo", "gcv"):
        ridge = Ridge(12, projection=30, strength=strength).partial_fit(x, y, generator(0))
        wide = Ridge(12, projection=130).partial_fit(x, y, generator(0))
        expected[strength] = ridge.logits(x), wide.logits(x), ridge.strength_, wide.strength_
    monkeypatch.setattr("cil.utils.linalg.BLOCK", 7)
    monkeypatch.setattr("cil.classifiers.ridge.BLOCK", 7)
    for strength in ("holdout", "loo", "gcv"):
        ridge = Ridge(12, projection=30, strength=strength).partial_fit(x, y, generator(0))
        wide = Ridge(12, projection=130).partial_fit(x, y, generator(0))
        got = ridge.logits(x), wide.logits(x), ridge.strength_, wide.strength_
        torch.testing.assert_close(got, expected[strength], atol=1e-6, rtol=1e-6)


def test_a_class_with_one_sample_borrows_the_pooled_covariance():
    rng = np.random.RandomState(3)
    x, y = rng.randn(41, 5) @ rng.randn(5, 5), np.array([0] * 15 + [1] * 25 + [2])
    fitted = Mahalanobis(5, shrinkage=(0.5, 0.0), normalize=False).partial_fit(x[-1:], y[-1:])
    alone = fitted.distances(x)[:, 2]
    fitted.partial_fit(x[:-1], y[:-1])
    pooled = (14 * np.cov(x[:15].T) + 24 * np.cov(x[15:40].T)) / 38
    pooled += 0.5 * np.diag(pooled).mean() * np.eye(5)
    pooled /= np.sqrt(np.outer(np.diag(pooled), np.diag(pooled)))
    away = x - x[-1]
    expected = np.einsum("nd,de,ne->n", away, np.linalg.inv(pooled), away)
    np.testing.assert_allclose(fitted.distances(x)[:, 2], expected, atol=1e-9)
    assert not torch.allclose(fitted.distances(x)[:, 2], alone)
    fitted.partial_fit(x[-1:], y[-1:])  # two equal samples have no covariance either
    np.testing.assert_allclose(fitted.distances(x)[:, 2], expected, atol=1e-9)
