"""CDS: its loss and its drift rule against numpy, and what each of its switches leaves of SSIAT."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from test_ssiat import LEARNS, QUICK, draw, images_of, vector

from cil.classifiers import Gaussians
from cil.classifiers.drift import similarities
from cil.errors import DataError
from cil.learners.bases.steering import similarity_change
from cil.learners.cds import CDS
from cil.learners.ssiat import SSIAT
from cil.testing import Case, parametrize_learner
from cil.testing.setting import draw_images


@pytest.mark.slow
@parametrize_learner([("cds", {**LEARNS, "consistency": 0.5, "covariance_rank": 3})])
def test_common_checks(case, check):
    check(case)


@lru_cache
def shared(cls: type, **parameters) -> Case:
    return Case(cls, {**QUICK, **parameters})


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_change_of_similarities_by_numpy():
    new, old, means = draw(4, 5), draw(4, 5, seed=1), draw(3, 5, seed=2)
    x, z, m = new.numpy(), old.numpy(), means.numpy()
    changes = [[(cosine(x[i], c) - cosine(z[i], c)) ** 2 for c in m] for i in range(4)]
    assert similarity_change(new, old, means).item() == pytest.approx(np.sum(changes) / 4)
    assert similarity_change(3 * new, 0.2 * old, 7 * means).item() == pytest.approx(np.sum(changes) / 4)
    assert similarity_change(new, new, means) == 0
    with torch.autocast("cpu", torch.bfloat16):
        mixed = similarity_change(new.float(), old.float(), means.float())
    assert mixed.item() == pytest.approx(np.sum(changes) / 4, rel=1e-5), "bfloat16 has two digits"


def test_an_old_class_follows_the_new_ones_it_resembles():
    points, prototypes = draw(3, 5), draw(2, 5, seed=1)
    found = similarities(points, prototypes, sharpness=4.0).numpy()
    for c in range(3):
        powers = [math.exp(4 * cosine(points[c].numpy(), q)) for q in prototypes.numpy()]
        np.testing.assert_allclose(found[c], np.array(powers) / sum(powers), rtol=1e-12)
    assert torch.equal(similarities(points, prototypes[:1]), torch.ones(3, 1, dtype=torch.float64)), "one: all of it"


def test_a_widened_gaussian_stays_symmetric_and_positive():
    labels = torch.tensor([0] * 9 + [1] * 7 + [2])
    x, shifts, spreads = draw(17, 6) + 3, draw(3, 6, seed=5), draw(3, 2, 6, seed=6)
    gaussians = Gaussians(6, 1e-3).partial_fit(x, labels)
    means, before = gaussians.means.clone(), [gaussians.covariance(c) for c in range(3)]
    gaussians.logits(x)  # factors that must be solved again
    gaussians.translate(shifts, spreads)
    torch.testing.assert_close(gaussians.means, means + shifts)
    for c in (0, 1):
        covariance = gaussians.covariance(c)
        torch.testing.assert_close(covariance, before[c] + spreads[c].T @ spreads[c], atol=1e-12, rtol=1e-12)
        assert torch.equal(covariance, covariance.T)
        factor = gaussians.factor(c)
        eye = 1e-3 * torch.eye(6, dtype=torch.float64)
        torch.testing.assert_close(factor @ factor.T, covariance + eye, atol=1e-10, rtol=1e-10)
    assert gaussians.covariance(2).count_nonzero() == 0, "a single sample goes on borrowing from the others"
    with pytest.raises(DataError, match=r"spreads have shape \[2, 2, 6\]; expected \[3, directions, 6\]"):
        gaussians.translate(shifts, spreads[:2])


def test_old_gaussians_move_and_widen_as_the_paper_says():
    one, two = (shared(CDS, sharpness=5.0, spread=3.0).after(n).learner for n in (2, 3))
    images, (_, labels) = images_of(2), draw_images("train")
    labels = labels[np.isin(labels, [5, 6, 7])]
    with torch.inference_mode():
        before, after = (learner.features(images).double().numpy() for learner in (one, two))
    start, end = (np.stack([x[labels == c].mean(0) for c in (5, 6, 7)]) for x in (before, after))
    means, drifts = one.gaussians.means.numpy(), end - start
    assert np.abs(drifts).max() > 1e-3
    for c in range(5):
        powers = np.exp([5 * cosine(means[c], q) for q in start])
        weights = powers / powers.sum()
        np.testing.assert_allclose(two.gaussians.means[c].numpy(), means[c] + weights @ drifts, atol=1e-5)
        wider = 3 * sum(w**2 * np.outer(d, d) for w, d in zip(weights, drifts, strict=True))
        grown = (two.gaussians.covariance(c) - one.gaussians.covariance(c)).numpy()
        np.testing.assert_allclose(grown, wider, atol=1e-5 * max(1, np.abs(wider).max()))


def test_without_its_parts_it_is_ssiat():
    plain = {"consistency": 0.0, "drift_bandwidth": 4.0, "first_head_lr_factor": 1.0}
    ours, theirs = shared(CDS, **plain).after(3).learner, shared(SSIAT).after(3).learner
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, atol=0, rtol=0)


def test_the_loss_holds_similarities_to_old_classes():
    changes = {}
    for weight in (0.0, 50.0):
        one, two = (shared(CDS, consistency=weight, alignment_epochs=0).after(n).learner for n in (2, 3))
        with torch.inference_mode():
            new, old = two.features(images_of(2)), one.features(images_of(2))
        changes[weight] = float(similarity_change(new, old, one.gaussians.means))
    assert 0 < changes[50.0] < 0.7 * changes[0.0]


@pytest.mark.slow
def test_the_first_head_learns_faster_and_nothing_of_the_snapshot_is_kept():
    slow = shared(CDS, first_head_lr_factor=1.0).after(1).learner
    fast = shared(CDS, first_head_lr_factor=10.0).after(1).learner
    assert not torch.equal(slow.head.weight, fast.head.weight)
    rows = shared(CDS).run().rows
    # 48, 12 and 25 images: 3 epochs, a pass after; from the second task on also one before, and the snapshot's 3
    assert [row["costs"]["train_passes"] for row in rows] == [48 * 4, 12 * 8, 25 * 8]
    kept = shared(CDS).run().learner
    assert {key.split(".")[0] for key in kept.state_dict()} == {"tuner", "head", "gaussians", "task_of"}
    assert vector(kept.tuner).isfinite().all()
