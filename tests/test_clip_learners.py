"""Learners on vision-language backbones: the identities of their papers and their limits, on synthetic text vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from cil.classifiers import LDA
from cil.classifiers.fusion import folds, fusion_weights
from cil.classifiers.text import TextLDA
from cil.errors import ConfigError
from cil.learners.registry import build_learner
from cil.runner import run_stages
from cil.testing.setting import accelerator, backbone, context, probe_images, stream


def samples(classes=4, count=30, width=6, seed=0, spread=1.0):
    """Normalised features [N, F] of Gaussian classes, with labels, and their centres."""
    rng = np.random.RandomState(seed)
    centres = rng.normal(size=(classes, width))
    labels = np.repeat(np.arange(classes), count)
    x = centres[labels] + spread * rng.normal(size=(len(labels), width)) * np.linspace(0.2, 1, width)
    return F.normalize(torch.from_numpy(x), dim=1), torch.from_numpy(labels), torch.from_numpy(centres)


def learned(name, stages=3, vit=None, **parameters):
    """A learner after the checks' stream, and the stream."""
    vit = vit or backbone()
    learner, tasks = build_learner({"name": name, **parameters}, vit), stream(vit)
    run_stages(learner, tasks, accelerator=accelerator(), batch_size=16, stop_after=stages)
    return learner, tasks


def features_of(learner):
    with torch.inference_mode():
        return learner.features(probe_images())


def apart(scores):
    """Scores up to a constant per image."""
    return scores - scores.mean(1, keepdim=True)


# --- clip_gda ---------------------------------------------------------------------------------------------------------


def test_the_papers_estimator_is_a_shrunk_lda_times_its_shrinkage():
    u, y, _ = samples(count=9, width=6)
    x, labels = u.numpy(), y.numpy()
    means = np.stack([x[labels == c].mean(0) for c in range(4)])
    covariance = np.cov((x - means[labels]).T)  # divides by N − 1, as torch.cov does in the authors' code
    count, width = x.shape
    precision = width * np.linalg.pinv((count - 1) * covariance + np.trace(covariance) * np.eye(width))
    theirs = x @ precision @ means.T - 0.5 * np.einsum("cf,fg,cg->c", means, precision, means)
    lda = LDA(width, "samples", "uniform").partial_fit(u, y)
    [shrinkage] = lda.shrinkages
    assert shrinkage == pytest.approx(width / (count - 1 + width))
    mine = lda.logits(u) * shrinkage * (count - 1) / count
    assert (apart(mine) - apart(torch.from_numpy(theirs))).abs().max() < 1e-12


def test_published_scores_are_the_papers():
    learner, tasks = learned("clip_gda", published=True, weight=3.0)
    f = features_of(learner)
    u = torch.cat([F.normalize(context().features(learner, t.train)[0], dim=1) for t in stream(backbone()).tasks])
    y = torch.cat([context().features(learner, t.train)[1] for t in stream(backbone()).tasks])
    x, labels = u.double().numpy(), y.numpy()
    means = np.stack([x[labels == c].mean(0) for c in range(8)])
    covariance = np.cov((x - means[labels]).T)
    count, width = x.shape
    precision = width * np.linalg.pinv((count - 1) * covariance + np.trace(covariance) * np.eye(width))
    v = F.normalize(f, dim=1).double().numpy()
    theirs = v @ precision @ means.T - 0.5 * np.einsum("cf,fg,cg->c", means, precision, means)
    expected = apart(learner.text.logits(f).double() + 3 * torch.from_numpy(theirs))
    assert (apart(learner.logits(f)).double() - expected).abs().max() < 1e-3 * expected.abs().max()
    assert len(tasks) == 3


def test_the_split_into_tasks_and_the_order_of_classes_do_not_matter_with_a_number():
    one, _ = learned("clip_gda", weight=2.0, space="joint", text_prior=3)
    f = features_of(one)
    vit = backbone()
    whole = build_learner({"name": "clip_gda", "weight": 2.0, "space": "joint", "text_prior": 3}, vit)
    run_stages(whole, stream(vit, sizes=(8,)), accelerator=accelerator(), batch_size=16)
    assert (whole.logits(f) - one.logits(f)).abs().max() < 1e-4 * one.logits(f).abs().max()


def test_weights_are_at_the_minimum():
    rng = np.random.RandomState(1)
    y = torch.from_numpy(rng.randint(0, 3, 200))
    good = torch.from_numpy(rng.normal(size=(200, 3))) + 1.5 * F.one_hot(y, 3)
    other = torch.from_numpy(40 * rng.normal(size=(200, 3))) + 50 * F.one_hot(y, 3)
    weights = torch.tensor(fusion_weights(good, other, y), dtype=torch.float64, requires_grad=True)
    F.cross_entropy(weights[0] * good + weights[1] * other, y).backward()
    assert (weights > 0).all() and (weights.grad * torch.tensor([1, 40])).abs().max() < 1e-6
    # with two classes and one kind of scores it is a logistic regression without an offset
    two = y < 2
    difference = (good[two][:, 1] - good[two][:, 0]).numpy()[:, None]
    fitted = LogisticRegression(C=1e12, fit_intercept=False, tol=1e-10).fit(difference, y[two])
    a, _ = fusion_weights(good[two][:, :2], torch.zeros(int(two.sum()), 2), y[two])
    assert a == pytest.approx(fitted.coef_.item(), rel=1e-5)


def test_scores_that_say_nothing_or_the_contrary_get_no_weight():
    rng = np.random.RandomState(2)
    y = torch.from_numpy(rng.randint(0, 4, 4000))
    good = torch.from_numpy(rng.normal(size=(4000, 4))) + 2.0 * F.one_hot(y, 4)
    noise = torch.from_numpy(rng.normal(size=(4000, 4)))
    a, b = fusion_weights(noise, good, y)
    assert a < 0.05 * b
    assert fusion_weights(noise - good, good, y)[0] < 1e-6


def test_weights_come_from_images_that_were_held_out(monkeypatch):
    """Every image is scored by statistics that hold all old tasks and the other images of its own."""
    seen = []
    fit = TextLDA.partial_fit

    def spy(self, features, labels):
        seen.append((int(self.counts.sum()), len(labels)))
        return fit(self, features, labels)

    monkeypatch.setattr(TextLDA, "partial_fit", spy)
    learner, tasks = learned("clip_gda", stages=1)
    total = len(tasks.tasks[0].classes) * 12
    *parts, last = seen
    assert len(parts) == 5 and last == (0, total) and {old for old, _ in parts} == {0}
    assert sum(total - own for _, own in parts) == total
    before = learner.weights.clone()
    monkeypatch.undo()
    after, _ = learned("clip_gda", stages=3)  # the last task has a class of one image: the weights stay
    middle, _ = learned("clip_gda", stages=2)
    assert torch.equal(after.weights, middle.weights) and not torch.equal(before, middle.weights)
    assert not list(folds(torch.tensor([0, 0, 0, 0, 0, 1]), torch.Generator()))


def test_limits_of_the_text_prior():
    x, y, centres = samples()
    texts = F.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).double(), dim=1)

    def fitted(prior):
        return TextLDA(6, lambda: texts, prior).partial_fit(x, y)

    plain = LDA(6, "samples", "uniform").partial_fit(x, y)
    assert torch.equal(fitted(0).logits(x), plain.logits(x))
    means = plain.means
    middle, t = x.mean(0), texts - texts.mean(0)
    gamma = ((means - middle) * t).sum() / t.square().sum()  # classes of equal size
    alone = middle + gamma * t
    assert (fitted(1e12).decision_means - alone).abs().max() < 1e-9
    assert (fitted(30).decision_means - (means + alone) / 2).abs().max() < 1e-12  # 30 images a class
    assert torch.equal(fitted(30).covariance, plain.covariance) and len(centres) == 4
    with pytest.raises(ConfigError, match="set space: joint, or text_prior: 0"):
        build_learner({"name": "clip_gda", "text_prior": 2}, backbone())


def test_one_image_per_class_is_enough_to_run():
    u, y, _ = samples(count=1)
    scores = TextLDA(6, lambda: u, 2).partial_fit(u, y).logits(u)
    assert bool(scores.isfinite().all()) and torch.equal(scores.argmax(1), y)
