"""Covariances of few directions plus a diagonal, against numpy's eigenvectors, covariances and inverses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import multivariate_normal

from cil.classifiers import Gaussians, Mahalanobis
from cil.classifiers.drift import AffineMap
from cil.errors import ConfigError
from cil.learners.registry import BUILTIN, resolve
from cil.testing import Case
from cil.testing.setting import backbone
from cil.utils.randomness import generator

SIZES = (4, 7, 60, 2, 9)
WIDTH = 12
EYE = torch.eye(WIDTH, dtype=torch.float64)


def classes(sizes=SIZES, width=WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features [N, F] of classes with different means, and labels [N]."""
    rng = np.random.RandomState(0)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rows = rng.randn(len(labels), width) @ rng.randn(width, width) + 3 * rng.randn(len(sizes), width)[labels]
    return torch.from_numpy(rows), torch.from_numpy(labels)


def truncated(rows: np.ndarray, rank: int) -> np.ndarray:
    """numpy: the covariance of rows [n, F] in its leading eigenvectors, with the variances that it had."""
    covariance = np.cov(rows.T)
    values, vectors = np.linalg.eigh(covariance)
    kept = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
    return kept + np.diag(np.diag(covariance) - np.diag(kept))


def covariance_of(gaussians: Gaussians, c: int) -> np.ndarray:
    """The covariance of drawn vectors, without drawing any: L Lᵀ."""
    root = gaussians.coloured(c, EYE).T
    return (root @ root.T).numpy()


@pytest.mark.parametrize("rank", [1, 3, 8, 50])
def test_gaussians_have_the_leading_directions_and_all_variances(rank):
    x, y = classes()
    ours = Gaussians(WIDTH, 1e-3, rank).partial_fit(x, y)
    scores = ours.logits(x).numpy()
    for c, size in enumerate(SIZES):
        expected = truncated(x[y == c].numpy(), min(rank, WIDTH)) + 1e-3 * np.eye(WIDTH)
        np.testing.assert_allclose(covariance_of(ours, c), expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(ours.covariance(c) + 1e-3 * EYE, expected, rtol=1e-10, atol=1e-10)
        density = multivariate_normal.logpdf(x.numpy(), x[y == c].numpy().mean(0), expected)
        np.testing.assert_allclose(scores[:, c], density, rtol=1e-7)
        if rank >= size - 1:
            np.testing.assert_allclose(ours.covariance(c), np.cov(x[y == c].numpy().T), rtol=1e-10, atol=1e-10)


def test_vectors_are_drawn_with_the_root():
    x, y = classes()
    ours, labels = Gaussians(WIDTH, rank=3).partial_fit(x, y), torch.tensor([4, 1, 1, 4, 2])
    scale = torch.tensor([0.5, 1, 2, 1, 1])
    z = torch.randn(5, WIDTH, generator=generator(3)).double()
    roots = [ours.coloured(c, EYE).T for c in range(5)]
    expected = [s * ours.means[c] + roots[c] @ one for c, s, one in zip(labels.tolist(), scale, z, strict=True)]
    drawn = ours.sample(labels, generator(3), scale)
    torch.testing.assert_close(drawn, torch.stack(expected).float())


def test_calls_that_leave_no_direction_out_are_one():
    """Samples in several calls, and classes that get some from another classifier, are those of one call."""
    x, y = classes()
    whole, parts = Gaussians(WIDTH, rank=8).partial_fit(x, y), Gaussians(WIDTH, rank=8)
    for part in torch.arange(len(y)).split(7):
        parts.partial_fit(x[part], y[part])
    for c in (0, 1, 3, 4):
        np.testing.assert_allclose(covariance_of(parts, c), covariance_of(whole, c), rtol=1e-9, atol=1e-9)
    variances = np.var(x[y == 2].numpy(), axis=0, ddof=1)
    np.testing.assert_allclose(parts.covariance(2).diagonal(), variances, rtol=1e-10)  # whatever was left out
    torch.testing.assert_close(parts.means, whole.means)


def test_a_class_of_equal_images_borrows_the_others_directions():
    x, y = classes((5, 4, 1))
    ours = Gaussians(WIDTH, 1e-3, rank=8).partial_fit(x, y)
    scatter = sum((n - 1) * np.cov(x[y == c].numpy().T) for c, n in ((0, 5), (1, 4)))
    np.testing.assert_allclose(covariance_of(ours, 2), scatter / 7 + 1e-3 * np.eye(WIDTH), rtol=1e-9, atol=1e-9)
    lone = Gaussians(WIDTH, 1e-3, rank=2).partial_fit(x[-1:], torch.tensor([0]))
    np.testing.assert_allclose(covariance_of(lone, 0), 1e-3 * np.eye(WIDTH), atol=1e-12)
    x[:, 4] = 0.1  # not a number sums of squares represent exactly
    assert not Gaussians(WIDTH, rank=3).partial_fit(x, y).covariance(0)[4].any()


@pytest.mark.parametrize("rank", [2, 12])
def test_drift_moves_and_widens(rank):
    x, y = classes((5, 6, 1))
    ours = Gaussians(WIDTH, 1e-3, rank).partial_fit(x, y)
    before = [covariance_of(ours, c) for c in range(3)]
    shifts, spreads = torch.randn(2, 3, WIDTH, generator=generator(0)).double()
    ours.translate(shifts)
    for c in range(2):
        np.testing.assert_allclose(covariance_of(ours, c), before[c], rtol=1e-9, atol=1e-9)
    ours.translate(-shifts[:2], spreads[:2, None])
    torch.testing.assert_close(ours.means[:2], Gaussians(WIDTH).partial_fit(x, y).means[:2])
    for c in range(2):
        expected = before[c] + np.outer(spreads[c], spreads[c])
        found = covariance_of(ours, c)
        np.testing.assert_allclose(np.diag(found), np.diag(expected), rtol=1e-9)
        if rank == 12:
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert not ours.covariance(2).any()


@pytest.mark.parametrize("rank", [3, 8])
def test_a_map_moves_a_gaussian_as_it_is_kept(rank):
    x, y = classes((5, 30))
    drift = AffineMap(torch.randn(WIDTH, WIDTH, generator=generator(0)).double(), x[0])
    ours = Gaussians(WIDTH, 1e-3, rank).partial_fit(x, y)
    before = [ours.covariance(c).numpy() for c in range(2)]
    ours.transport(drift)
    for c, matrix in enumerate(before):
        mapped = drift.matrix.numpy() @ matrix @ drift.matrix.numpy().T
        found, mean = ours.covariance(c).numpy(), drift(x[y == c]).mean(0)
        np.testing.assert_allclose(np.diag(found), np.diag(mapped), rtol=1e-9)
        torch.testing.assert_close(ours.means[c], mean)
        if rank == 8 and c == 0:
            np.testing.assert_allclose(found, mapped, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shrinkage", [(1.0, 0.0), (0.5, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("correlation", [True, False])
def test_distances_are_the_whole_ones_if_no_direction_is_left_out(shrinkage, correlation):
    x, y = classes((4, 7, 40, 2, 9), 48)
    whole = Mahalanobis(48, shrinkage, correlation=correlation).partial_fit(x, y)
    ours = Mahalanobis(48, shrinkage, correlation=correlation, rank=39).partial_fit(x, y)
    queries = x + torch.randn(x.shape, generator=generator(0)).double()
    torch.testing.assert_close(ours.distances(queries), whole.distances(queries), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shrinkage", [(1.0, 0.0), (0.5, 0.5), (2.0, 1.0), (0.0, 0.0)])
def test_distances_of_truncated_covariances_are_fecams(shrinkage):
    x, y = classes((30, 60, 25))
    ours, u = Mahalanobis(WIDTH, shrinkage, rank=3).partial_fit(x, y), F.normalize(x, dim=1).numpy()
    for c in range(3):
        cov = truncated(u[y == c], 3)
        off = cov - np.diag(np.diag(cov))
        cov += shrinkage[0] * np.diag(cov).mean() * np.eye(WIDTH)
        cov += shrinkage[1] * off.sum() / (WIDTH**2 - WIDTH) * (1 - np.eye(WIDTH))
        cov /= np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
        away = u - u[y == c].mean(0)
        expected = np.einsum("nf,fg,ng->n", away, np.linalg.inv(cov), away)
        np.testing.assert_allclose(ours.distances(x)[:, c], expected, rtol=1e-9)


@pytest.mark.parametrize("make", [Gaussians, Mahalanobis])
def test_what_is_kept_is_small_and_can_be_read(make):
    x, y = classes()
    ours = make(WIDTH, rank=2).partial_fit(x, y)
    kept = sum(value.nbytes for value in ours.state_dict().values())
    assert kept == ours.kept_bytes(len(SIZES), WIDTH) + 8 * len(SIZES) == 8 * len(SIZES) * (WIDTH * (1 + 2 + 1) + 1)
    read = make(WIDTH, rank=2)
    read.load_state_dict(ours.state_dict())
    assert torch.equal(read.logits(x), ours.logits(x))
    read.grow(8)
    read.remove(1)
    read.partial_fit(x[y == 1], y[y == 1])
    torch.testing.assert_close(read.logits(x)[:, :5], ours.logits(x))
    assert make(60_000, rank=2).peak_bytes(100, 60_000) < make(8_000, rank=None).peak_bytes(100, 8_000) / 50
    with pytest.raises(ConfigError, match=rf"{make.__name__}: rank is 0; it must be at least 1, or None"):
        make(WIDTH, rank=0)


def test_every_learner_with_the_key_keeps_that_many_directions():
    """The key reaches the Gaussians, whichever base builds them."""
    vit, found = backbone(), set()
    for name in BUILTIN:
        cls = resolve(name)
        if "covariance_rank" not in cls.Config.model_fields:
            continue
        found.add(name)
        optional = {"alignment_epochs": 1, "rank": 4} if name in ("inflora", "loda") else {}
        learner = Case(cls, {"covariance_rank": 3, **optional}).learner(vit)
        (rank,) = {m.rank for m in learner.modules() if isinstance(m, Gaussians | Mahalanobis)}
        assert rank == 3, name
    assert {"fecam", "slca", "ssiat", "cds", "mos", "care", "merge_lca", "e2_lora"} <= found
