"""Maps between feature spaces: exact where samples are there to compare, and harmless where nothing moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge

from cil.classifiers import LDA, NCM, Gaussians, Ridge
from cil.classifiers.drift import AffineMap, ridge_map, translation
from cil.errors import ConfigError, DataError

F, CLASSES = 6, 4


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(n: int = 80, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(n) % CLASSES
    return draw(n, F, seed=seed) + 2 * draw(CLASSES, F, seed=9)[labels], labels


def some_map(seed: int = 3) -> AffineMap:
    return AffineMap(torch.eye(F, dtype=torch.float64) + 0.3 * draw(F, F, seed=seed), draw(F, seed=seed + 1))


@pytest.mark.parametrize(
    "make", [NCM, LDA, lambda f: Ridge(f, strength=0.5), Gaussians], ids=["ncm", "lda", "ridge", "gaussians"]
)
def test_transported_statistics_are_those_of_mapped_samples(make):
    x, y = samples()
    drift = some_map()
    carried, mapped = make(F).partial_fit(x, y), make(F).partial_fit(drift(x), y)
    before = carried.logits(x)  # something solved that has to be forgotten
    carried.transport(drift)
    for (name, a), b in zip(carried.named_buffers(), mapped.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(carried.logits(drift(x)), mapped.logits(drift(x)))
    assert not torch.allclose(before, carried.logits(x))
    carried.partial_fit(drift(x[:8]), y[:8])  # and it goes on learning where the features are now
    assert int(carried.counts.sum()) == 88


def test_random_features_cannot_be_transported():
    ridge = Ridge(F, projection=20).partial_fit(*samples())
    with pytest.raises(ConfigError, match="random features cannot be transported"):
        ridge.transport(some_map())


def test_translation_is_the_mean_shift():
    x, _ = samples()
    shift = draw(F, seed=5)
    found = translation(x, x + shift)
    torch.testing.assert_close(found.offset, shift)
    assert torch.equal(found.matrix, torch.eye(F, dtype=torch.float64))


@pytest.mark.parametrize("shrinkage", [0.0, 0.05, 3.0])
def test_ridge_map_equals_scikit_learn(shrinkage):
    """Ridge regression of what moved on the features and a constant, the constant penalised like the rest."""
    before, _ = samples(30)
    after = some_map()(before) + 0.1 * draw(30, F, seed=8)
    x = torch.cat([before, torch.ones(30, 1, dtype=torch.float64)], dim=1).numpy()
    gamma = shrinkage * np.trace(x.T @ x) / (F + 1)
    theirs = SklearnRidge(alpha=gamma, fit_intercept=False, solver="cholesky").fit(x, (after - before).numpy())
    ours = ridge_map(before, after, shrinkage)
    np.testing.assert_allclose(ours.matrix - torch.eye(F), theirs.coef_[:, :-1], atol=1e-9)
    np.testing.assert_allclose(ours.offset, theirs.coef_[:, -1], atol=1e-9)


def test_ridge_map_finds_a_linear_change_and_leaves_alone_what_did_not_move():
    before, _ = samples(200)
    drift = some_map()
    found = ridge_map(before, drift(before), shrinkage=0)
    torch.testing.assert_close(found.matrix, drift.matrix)
    torch.testing.assert_close(found.offset, drift.offset)
    few = ridge_map(before[:3], drift(before[:3]), shrinkage=0)  # fewer images than dimensions
    torch.testing.assert_close(few(before[:3]), drift(before[:3]), atol=1e-4, rtol=1e-4)
    still = ridge_map(before[:3], before[:3])
    assert torch.equal(still.matrix, torch.eye(F, dtype=torch.float64)) and not still.offset.any()


def test_beside_leaves_the_first_features_as_they_are():
    drift = some_map()
    x = draw(5, F + 2, seed=7)
    mapped = drift.beside(2)(x)
    assert torch.equal(mapped[:, :2], x[:, :2])
    torch.testing.assert_close(mapped[:, 2:], drift(x[:, 2:]))


@pytest.mark.parametrize(("a", "b"), [((3, 2), (3, 4)), ((0, 2), (0, 2)), ((3,), (3,))])
def test_maps_need_pairs(a, b):
    for fit in (translation, ridge_map):
        with pytest.raises(DataError, match="the same images before and after"):
            fit(torch.zeros(a), torch.zeros(b))


def test_lda_of_two_blocks_is_the_sum_of_two():
    x, y = samples()
    whole = LDA(F, shrinkage=0.1, priors="uniform", blocks=2).partial_fit(x, y)
    halves = [LDA(F // 2, shrinkage=0.1, priors="uniform").partial_fit(part, y) for part in x.chunk(2, dim=1)]
    added = sum(lda.logits(part) for lda, part in zip(halves, x.chunk(2, dim=1), strict=True))
    differences = whole.logits(x) - added  # the prior counts twice in the sum
    torch.testing.assert_close(differences, differences[:, :1].expand(-1, CLASSES))
    with pytest.raises(ConfigError, match="do not divide into equal parts"):
        LDA(F, blocks=4)
