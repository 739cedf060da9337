"""LoRanPAC's classifier against numpy's least squares, ridge regression and batch decompositions."""

import math

import numpy as np
import pytest
import torch

from cil.classifiers import Ridge, TruncatedSVD
from cil.utils.randomness import generator


def samples(n=120, width=12, classes=6, seed=0):
    rng = np.random.RandomState(seed)
    labels = rng.randint(0, classes, n)
    x = rng.randn(classes, width)[labels] * 2 + rng.randn(n, width)
    return torch.from_numpy(x), torch.from_numpy(labels)


def make(width=60, **options):
    return TruncatedSVD(12, width, **options).draw(generator(3))


def hidden(model, x):
    return np.maximum(x.numpy() @ model.projection.double().numpy(), 0)


def one_hot(labels, classes=6):
    return np.eye(classes)[labels.numpy()]


@pytest.mark.parametrize("n", [30, 60, 400])  # fewer samples than random features, as many, and more
@pytest.mark.parametrize("block", [7, 50, 1000])
def test_nothing_cut_is_least_squares_however_the_data_is_cut(n, block):
    x, y = samples(n)
    model = make(truncation=0, rank=None, block=block)
    for rows in torch.arange(n).split(23):
        model.partial_fit(x[rows], y[rows])
    h = hidden(model, x)
    np.testing.assert_allclose(model.weights.numpy(), np.linalg.pinv(h) @ one_hot(y), atol=1e-8)
    values = np.linalg.svd(h, compute_uv=False)
    np.testing.assert_allclose(model.singular_values.numpy(), values, rtol=1e-10)
    assert model.condition_number == pytest.approx((values[0] / values[-1]) ** 2, rel=1e-6)
    assert model.uncut_condition_number == model.condition_number
    basis = model.basis.numpy()
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-12)


def test_nothing_cut_is_the_limit_of_ridge_regression():
    x, y = samples(200)
    model = make(truncation=0, block=64).partial_fit(x, y)
    gaps = []
    for strength in (1e-2, 1e-4, 1e-6):
        ridge = Ridge(12, 60, strength).draw(generator(3)).partial_fit(x, y)
        gaps.append((ridge.logits(x) - model.logits(x)).abs().max().item())
    assert gaps[0] > 50 * gaps[1] > 2500 * gaps[2] and gaps[2] < 1e-6
    same = make(truncation=0, block=64, strength=0.7).partial_fit(x, y)
    torch.testing.assert_close(same.logits(x), Ridge(12, 60, 0.7).draw(generator(3)).partial_fit(x, y).logits(x))


def test_one_block_is_a_batch_svd_cut_at_its_rank():
    x, y = samples(40)
    model = make(truncation=0.25).partial_fit(x, y)
    h = hidden(model, x)
    u, s, v = np.linalg.svd(h, full_matrices=False)
    assert len(model.singular_values) == 30  # (1 − τ) n
    expected = (v[:30].T / s[:30]) @ u[:, :30].T @ one_hot(y)
    np.testing.assert_allclose(model.weights.numpy(), expected, atol=1e-10)
    assert model.condition_number == pytest.approx((s[0] / s[29]) ** 2)
    assert model.uncut_condition_number == pytest.approx((s[0] / s[-1]) ** 2)
    assert make(truncation=0.25, rank=11).partial_fit(x, y).basis.shape == (11, 60)


def test_two_blocks_by_the_papers_steps():
    """Every step with numpy's own decompositions of the whole matrices, where the update works on small ones."""
    x, y = samples(90)
    model = make(truncation=0.5, block=50).partial_fit(x, y)
    h = hidden(model, x)
    u, s, _ = np.linalg.svd(h[:50].T, full_matrices=False)
    first = u[:, :25] * s[:25]  # round((1 − τ) 50) pairs of the first block
    u, s, _ = np.linalg.svd(np.concatenate([first, h[50:].T], 1), full_matrices=False)
    kept = 30  # the smaller of round((1 − τ) 90) = 45 and round((1 − τ) 60) = 30
    np.testing.assert_allclose(model.singular_values.numpy(), s[:kept], rtol=1e-10)
    expected = (u[:, :kept] / s[:kept] ** 2) @ u[:, :kept].T @ h.T @ one_hot(y)
    np.testing.assert_allclose(model.weights.numpy(), expected, atol=1e-9)


def test_what_is_kept_does_not_grow():
    model = make(rank=20, block=25)
    for seed in range(8):
        model.partial_fit(*samples(60, seed=seed))
        assert model.basis.shape == (20, 60) and model.singular_values.shape == (20,)
        basis = model.basis
        torch.testing.assert_close(basis @ basis.T, torch.eye(20, dtype=torch.float64), atol=1e-12, rtol=0)


def test_samples_that_repeat_add_no_directions():
    x, y = samples(15)
    model = make(truncation=0, block=15)
    for _ in range(4):
        model.partial_fit(x, y)
    assert len(model.singular_values) == 15
    once = make(truncation=0).partial_fit(x, y)
    np.testing.assert_allclose(model.singular_values.numpy(), 2 * once.singular_values.numpy(), rtol=1e-10)
    np.testing.assert_allclose(model.weights.numpy(), once.weights.numpy(), atol=1e-9)


def test_images_that_light_no_feature():
    nothing = torch.zeros(5, 12, dtype=torch.float64)
    model = make().partial_fit(nothing, torch.arange(5))
    assert model.logits(nothing).eq(0).all() and math.isnan(model.condition_number)
    x, y = samples(80)
    model.partial_fit(x, y)
    assert (model.logits(x).argmax(1) == y).double().mean() > 0.8 and model.condition_number > 1


@pytest.mark.parametrize("strength", [0.0, 5.0])
def test_leave_one_out_is_refitting_without_each_sample(strength):
    """Nothing cut, more samples than directions: the formula is exact."""
    x, y = samples(130)
    x = x + 4 * torch.randn(x.shape, generator=generator(5), dtype=torch.float64)
    model = make(width=20, truncation=0, strength=strength, block=31).partial_fit(x, y)
    h, t = hidden(model, x), one_hot(y)
    hits = 0
    for i in range(90, 130):
        rest = np.arange(130) != i
        gram = h[rest].T @ h[rest] + strength * np.eye(20)
        hits += int((h[i] @ np.linalg.solve(gram, h[rest].T @ t[rest])).argmax() == int(y[i]))
    assert model.leave_one_out_accuracy(x[90:], y[90:]) == hits / 40
    assert hits / 40 < (model.logits(x[90:]).argmax(1) == y[90:]).double().mean().item()


def test_leave_one_out_of_a_model_that_interpolates_is_not_a_number():
    x, y = samples(30)
    assert math.isnan(make(truncation=0).partial_fit(x, y).leave_one_out_accuracy(x, y))
    assert 0 < make(truncation=0.25).partial_fit(x, y).leave_one_out_accuracy(x, y) <= 1
