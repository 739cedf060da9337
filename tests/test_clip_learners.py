"""Learners on vision-language backbones: the identities of their papers and their limits, on synthetic text vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from cil.classifiers import LDA, Gaussians
from cil.classifiers.fusion import folds, fusion_weights
from cil.classifiers.gaussians import ShrunkGaussians
from cil.classifiers.text_prior import TextLDA
from cil.errors import ConfigError
from cil.learners.bases.old_vectors import WithOldClasses
from cil.learners.rapf import RAPF, fused
from cil.learners.registry import build_learner
from cil.runner import run_stages
from cil.runner.checkpoint import state_bytes
from cil.stream import Task
from cil.stream.stream import TaskData
from cil.testing.setting import NAMES, accelerator, backbone, context, probe_images, stream


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
    weights = torch.tensor(fusion_weights([good, other], y), dtype=torch.float64, requires_grad=True)
    F.cross_entropy(weights[0] * good + weights[1] * other, y).backward()
    assert (weights > 0).all() and (weights.grad * torch.tensor([1, 40])).abs().max() < 1e-6
    # with two classes and one kind of scores it is a logistic regression without an offset
    two = y < 2
    difference = (good[two][:, 1] - good[two][:, 0]).numpy()[:, None]
    fitted = LogisticRegression(C=1e12, fit_intercept=False, tol=1e-10).fit(difference, y[two])
    a, _ = fusion_weights([good[two][:, :2], torch.zeros(int(two.sum()), 2)], y[two])
    assert a == pytest.approx(fitted.coef_.item(), rel=1e-5)


def test_scores_that_say_nothing_or_the_contrary_get_no_weight():
    rng = np.random.RandomState(2)
    y = torch.from_numpy(rng.randint(0, 4, 4000))
    good = torch.from_numpy(rng.normal(size=(4000, 4))) + 2.0 * F.one_hot(y, 4)
    noise = torch.from_numpy(rng.normal(size=(4000, 4)))
    a, b = fusion_weights([noise, good], y)
    assert a < 0.05 * b
    assert fusion_weights([noise - good, good], y)[0] < 1e-6


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


def test_single_images_leave_the_decision_to_the_texts():
    learner = build_learner("clip_gda", backbone())
    images, positions = stream(learner.backbone, sizes=(8,)).tasks[0].train.source
    first = np.array([positions[images.labels == c][0] for c in range(8)])
    task = Task(0, tuple(range(8)), tuple(range(8)), NAMES, TaskData(images, first, np.arange(8)))
    learner.begin(task, context())
    learner.learn(task, context())
    assert learner.weights.tolist() == [1, 0]
    f = features_of(learner)
    assert torch.equal(learner.logits(f), learner.text.logits(f))


def test_one_image_per_class_is_enough_to_run():
    u, y, _ = samples(count=1)
    scores = TextLDA(6, lambda: u, 2).partial_fit(u, y).logits(u)
    assert bool(scores.isfinite().all()) and torch.equal(scores.argmax(1), y)


# --- tip_adapter ------------------------------------------------------------------------------------------------------


def test_without_keys_it_is_zero_shot():
    learner, _ = learned("tip_adapter", alpha=0, beta=2)
    assert torch.equal(learner.logits(features_of(learner)), learner.text.logits(features_of(learner)))


def test_with_one_shot_it_is_the_papers_formula():
    learner, tasks = learned("tip_adapter", alpha=1.5, beta=3, shots=1)
    vit = backbone()
    keys = []
    for task in stream(vit).tasks:
        f, y = context().features(learner, task.train)
        first = [int((y == c).nonzero()[0]) for c in task.classes]
        keys.append(F.normalize(learner.text.project(f[first]), dim=1))
    f = features_of(learner)
    near = F.normalize(learner.text.project(f), dim=1) @ torch.cat(keys).T
    expected = learner.text.logits(f) + 1.5 * torch.exp(-3 * (1 - near))
    assert (learner.logits(f) - expected).abs().max() < 1e-4 and len(tasks) == 3


def test_a_key_per_image_is_the_papers_formula():
    learner, _ = learned("tip_adapter", alpha=1.5, beta=3, keys="images", shots=5)
    keys, labels = [], []
    for task in stream(learner.backbone).tasks:
        f, y = (x.numpy() for x in context().features(learner, task.train))
        for c in task.classes:
            own = f[y == c][:5] @ learner.text.projection.numpy()
            keys.append(own / np.linalg.norm(own, axis=1, keepdims=True))
            labels += [c] * len(own)
    assert learner.keys.labels.tolist() == labels
    f = features_of(learner)
    near = F.normalize(learner.text.project(f), dim=1).numpy() @ np.concatenate(keys).T
    part = np.stack([np.exp(-3 * (1 - near[:, np.array(labels) == c])).sum(1) for c in range(8)], axis=1)
    expected = learner.text.logits(f).numpy() + 1.5 * part
    np.testing.assert_allclose(learner.logits(f).numpy(), expected, atol=2e-4)
    flat = learner.keys.affinities(learner.normalised(f).double(), 1e-6)
    slope = (flat - learner.keys.counts) / 1e-6  # for β → 0 it is Σ (f̂ · k_i − 1): classes of more images score less
    sums = np.stack([(near[:, np.array(labels) == c] - 1).sum(1) for c in range(8)], axis=1)
    np.testing.assert_allclose(slope.numpy(), sums, atol=1e-4)
    nearest = torch.from_numpy(np.array(labels)[near.argmax(1)])  # for β → ∞ the nearest image decides
    assert torch.equal(learner.keys.affinities(learner.normalised(f).double(), 2e3).argmax(1), nearest)
    assert torch.equal(learner.keys.logits(learner.normalised(f)).argmax(1), nearest)


def test_keys_of_images_count_as_exemplars():
    images, means = (learned("tip_adapter", stages=1, keys=keys, shots=5)[0] for keys in ("images", "means"))
    assert images.chosen[0] > 0 and images.keys.counts.tolist() == [5, 5, 5, 5]
    assert [state_bytes(one)["exemplar_bytes"] for one in (images, means)] == [20 * 48 * 4, 0]
    total = sum(b.numel() * b.element_size() for b in images.buffers())
    assert state_bytes(images)["statistics_bytes"] == total - 20 * 48 * 4  # counted once
    assert images.keeps_samples(images.config) and not means.keeps_samples(means.config)
    one, other = (learned("tip_adapter", shots=1, keys=keys)[0] for keys in ("images", "means"))
    f = features_of(one)
    assert (one.logits(f) - other.logits(f)).abs().max() < 1e-4


def test_small_and_large_sharpness():
    """For β → 0 the keys' part is α (1 − β (1 − f · k)); for large α the nearest key decides."""
    flat, _ = learned("tip_adapter", alpha=1000.0, beta=1e-3)
    f = features_of(flat)
    part = flat.logits(f).double() - flat.text.logits(f).double()
    near = flat.keys.logits(flat.normalised(f)).double()
    assert ((part / 1000 - 1) / 1e-3 + 1 - near).abs().max() < 1e-2
    sharp, _ = learned("tip_adapter", alpha=1e9, beta=20, shots=1)
    assert torch.equal(sharp.logits(f).argmax(1), sharp.keys.logits(sharp.normalised(f)).argmax(1))


def test_keys_hold_the_first_images_and_are_chosen_on_others():
    few, _ = learned("tip_adapter", shots=5)
    assert few.keys.counts.tolist() == [5, 5, 5, 5, 5, 1, 5, 5]  # the checks' stream has a class of one image
    again, _ = learned("tip_adapter", shots=5, stages=1)
    assert torch.equal(few.chosen, again.chosen)  # by the first task alone
    one, _ = learned("tip_adapter", shots=4)
    assert one.chosen.tolist() == pytest.approx([1.17, 1.0])  # too few to hold some out


# --- rapf -------------------------------------------------------------------------------------------------------------


def test_limits_of_the_fusion():
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(7, 7, generator=generator).double() for _ in range(2))
    assert (fused(old, new, 1.0) - new).abs().max() < 1e-12
    assert fused(old, old, 0.3) is old
    u, s, vt = torch.linalg.svd(old)
    before, after = s.diag() @ vt, u.T @ new
    moved = (after - before).abs()
    assert (u.T @ fused(old, new, 0.0) - before).abs().max() == pytest.approx(float(moved.max()))  # the largest stays
    share = (moved / moved.max() + 0.2).clamp(max=1)
    signs = torch.tensor([1.0, -1, 1, -1, -1, 1, 1]).double()
    flipped = u * signs  # other signs of singular vectors are as good
    there = flipped.T @ new * share + signs[:, None] * before * (1 - share)
    assert (fused(old, new, 0.2) - flipped @ there).abs().max() < 1e-12


def after_three_classes(pairs):
    """The training data of a task of class 3: 40 images in steps of 16, with 5 vectors of two old classes each."""
    x, y, _ = samples(count=40)
    gaussians = Gaussians(6).partial_fit(x[y < 3], y[y < 3])
    return WithOldClasses(x[y == 3].float(), y[y == 3], gaussians, pairs, amount=0.5, per_step=2, size=16)


def test_steps_hold_the_vectors_of_old_classes_in_turn():
    data = after_three_classes([(1, 3)])
    steps = list(data.batches(99, generator=torch.Generator().manual_seed(0)))
    assert data.sampled == 2 * 5 + 10 and sum(len(step[-1]) for step in steps) == len(data) == 40 + 3 * 20
    turns = []
    for _, rivals, weights, own in steps:
        new, sampled, paired = own == 3, (own != 3) & (rivals < 0), rivals >= 0
        assert own[paired].unique().tolist() == [1] and rivals[paired].unique().tolist() == [3] and sampled.sum() == 10
        assert (
            float(weights[rivals < 0].sum()) == pytest.approx(len(own)) == pytest.approx(float(weights[paired].sum()))
        )
        turns += own[sampled][::5].tolist()
        assert bool(new.any())
    assert sorted(turns) == [0, 0, 1, 1, 2, 2]  # each as often as the others
    first, second = (list(data.batches(99, generator=torch.Generator().manual_seed(0), part=(r, 2))) for r in (0, 1))
    for whole, one, two in zip(steps, first, second, strict=True):
        assert torch.equal(whole[0][::2], one[0]) and torch.equal(whole[0][1::2], two[0])


def test_without_similar_texts_there_is_no_hinge():
    data = after_three_classes([])
    assert all(bool((rivals < 0).all()) for _, rivals, _, _ in data.batches(99))
    assert data.sampled == 10
    learner, tasks = learned("rapf", stages=2, threshold=0.0, epochs=1, milestones=[1])
    assert learner._hard_pairs(tasks.tasks[1]) == []
    learner.config = learner.config.model_copy(update={"threshold": 10.0})
    assert len(learner._hard_pairs(tasks.tasks[1])) == 4  # all old classes with the new one


def test_the_loss_is_that_of_the_paper():
    learner, _ = learned("rapf", stages=2, epochs=1, milestones=[1])
    t, a = learner.text.prototypes, learner.map
    e = torch.randn(6, len(a), generator=torch.Generator().manual_seed(0))
    labels, rivals = torch.tensor([0, 4, 2, 1, 0, 3]), torch.tensor([-1, -1, -1, -1, 4, 4])
    weights = torch.where(rivals < 0, 6 / 4, 6 / 2)
    value, logits = learner._loss(e, rivals, weights, labels)
    cosines = F.normalize(e @ a.T, dim=1) @ t.T
    hinge = [max(0.0, float(cosines[i, 4] - cosines[i, labels[i]] + 0.1)) for i in (4, 5)]
    expected = F.cross_entropy(100 * cosines[:4], labels[:4]) + sum(hinge) / 2
    assert float(value) == pytest.approx(float(expected), rel=1e-5) and torch.allclose(logits, 100 * cosines)


def test_an_identity_that_is_not_trained_is_zero_shot():
    vit = backbone()
    learner = build_learner({"name": "rapf", "init": "identity"}, vit)
    task = stream(vit).tasks[0]
    learner.begin(task, context())
    super(RAPF, learner).learn(task, context())  # the names alone
    f = vit(probe_images())
    assert (learner.logits(f) - learner.text.logits(f)).abs().max() < 1e-4


def test_statistics_of_old_classes_stay_bit_for_bit():
    one, _ = learned("rapf", stages=1, epochs=1, milestones=[1])
    two, _ = learned("rapf", stages=3, epochs=1, milestones=[1])
    old = len(one.gaussians.counts)
    assert torch.equal(one.gaussians.triangles, two.gaussians.triangles[:old]) and old == 4


def test_shrunk_gaussians_draw_from_fecams_covariance():
    x, y, _ = samples(count=60)
    gaussians = ShrunkGaussians(6).partial_fit(x, y)
    plain = np.cov(x[y == 2].numpy().T)
    v1, v2 = plain.diagonal().mean(), plain[~np.eye(6, dtype=bool)].mean()
    expected = plain + v1 * np.eye(6) + v2 * (1 - np.eye(6)) + 1e-4 * np.eye(6)
    factor = gaussians.factor(2)
    assert (factor @ factor.T - torch.from_numpy(expected)).abs().max() < 1e-12
    drawn = gaussians.sample(torch.full((20000,), 2), torch.Generator().manual_seed(0)).double()
    assert (drawn.T.cov() - torch.from_numpy(expected)).abs().max() < 0.03 * np.abs(expected).max()
