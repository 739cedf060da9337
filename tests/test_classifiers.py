"""Classifiers alone on tensors, against scikit-learn and under any split of the data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestCentroid

from cil.classifiers import NCM, LinearHead
from cil.randomness import generator


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
