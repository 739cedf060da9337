"""TUNA and MOS: what the adapters learn, how they are merged, and which of them an image takes, against formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from cil.learners.bases import alignment
from cil.learners.mos import MOS, contrast
from cil.learners.tuna import TUNA, fused, overlap, upward
from cil.merging import TIES
from cil.testing import Case, parametrize_learner
from cil.testing.setting import SIZES, backbone, context, probe_images, stream
from cil.tuning import Adapter

SMALL = {"epochs": 3, "lr": 0.01, "bottleneck": 4, "alignment_epochs": 3, "alignment_lr": 0.05, "samples": 16}


@parametrize_learner(
    [
        ("tuna", {**SMALL, "margin": 0.1}),
        ("mos", {**SMALL, "lr": 0.05}),
    ]
)
def test_common_checks(case, check):
    check(case)


def vector(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def untrained(cls, tasks=3, **parameters):
    """A learner that has begun the stream's tasks and learned none of them."""
    learner = cls(cls.Config.model_validate({**SMALL, **parameters}), backbone())
    for task in stream(learner.backbone).tasks[:tasks]:
        learner.begin(task, context(task.index))
    return learner


# --- the bank


@pytest.mark.parametrize("cls", [TUNA, MOS])
def test_stage_t_trains_adapter_t_only_and_takes_the_gaussians_through_it(cls):
    after = [Case(cls, SMALL).run(stop_after=n).learner for n in (1, 2, 3)]
    for earlier, later in pairwise(after):
        assert len(later.adapters) == len(earlier.adapters) + 1
        for old, same in zip(earlier.adapters, later.adapters, strict=False):
            assert torch.equal(vector(old), vector(same))
    assert not torch.equal(vector(after[2].adapters[2]), vector(after[2].adapters[0]))
    learner, data = after[2], stream(after[2].backbone).tasks
    for task in data:
        images, indices = task.train.source
        pixels = torch.cat([p for p, _ in images.batches(indices, indices, 64)])
        with torch.inference_mode():
            own = learner.backbone(pixels, learner.adapters[task.index]).double()
        for c in task.classes:
            mine = own[torch.as_tensor(task.train.labels) == c]
            torch.testing.assert_close(learner.gaussians.means[c], mine.mean(0), atol=1e-5, rtol=1e-4)
            if len(mine) > 1:
                torch.testing.assert_close(learner.gaussians.covariance(c), torch.cov(mine.T), atol=1e-5, rtol=1e-3)
    assert learner.task_of.tolist() == [0] * SIZES[0] + [1] * SIZES[1] + [2] * SIZES[2]


@pytest.mark.parametrize("warm", [True, False])
def test_an_adapter_starts_where_the_one_before_ended_or_afresh(warm):
    learner = Case(TUNA, {**SMALL, "warm_start": warm}).run(stop_after=2).learner
    learner.begin(stream(learner.backbone).tasks[2], context(2))
    assert torch.equal(vector(learner.adapters[2]), vector(learner.adapters[1])) == warm
    ups = torch.cat([block.up.weight.flatten() for block in learner.adapters[2].adapters])
    assert bool(ups.any()) == warm
    assert learner.adapters[2].adapters[0].up.weight is not learner.adapters[1].adapters[0].up.weight


@pytest.mark.parametrize(("cls", "extra"), [(TUNA, [0, 1, 1]), (MOS, [1, 1, 1])])
def test_every_image_passes_once_through_each_adapter_and_one_view_beside_them(cls, extra):
    done = Case(cls, SMALL).run()
    tests = [6 * n for n in SIZES]
    changing = cls is TUNA  # the universal adapter sees all test images anew, the frozen backbone only new ones
    for t, row in enumerate(done.rows):
        new_views = sum(tests[: t + 1])  # adapter t
        old_views = t * tests[t]
        beside = extra[t] * (sum(tests[: t + 1]) if changing else tests[t])
        assert row["costs"]["test_passes"] == new_views + old_views + beside
        trained = (SMALL["epochs"] + 1 + (cls is MOS)) * len(done.stream.tasks[t].train)
        assert row["costs"]["train_passes"] == trained
    width = done.learner.features(probe_images()[:1]).shape[1]
    assert width == (len(SIZES) + 1) * done.learner.backbone.feature_dim


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("cls", [TUNA, MOS])
def test_alignment_draws_from_all_gaussians_older_means_nearer_to_zero(cls, shrink, monkeypatch):
    asked, recipes = [], []
    original, fit = alignment.SampledFeatures, alignment.fit
    monkeypatch.setattr(alignment, "SampledFeatures", lambda *a, **k: asked.append(a) or original(*a, **k))
    monkeypatch.setattr(alignment, "fit", lambda *a, **k: recipes.append(a[3]) or fit(*a, **k))
    Case(cls, {**SMALL, "shrink_means": shrink}).run()
    assert len(asked) == 2, "the first task's rows were trained together"
    for current, (gaussians, samples, scales) in enumerate(asked, start=1):
        assert samples == SMALL["samples"]
        assert gaussians.num_classes == sum(SIZES) or current == 1
        if shrink:  # 0.9 + 0.1 (τ + 1) / (t + 1): rises with the task, to 1 for the newest
            expected = [0.9 + 0.1 * (tau + 1) / (current + 1) for tau in range(current + 1) for _ in range(SIZES[tau])]
            assert scales.tolist() == pytest.approx(expected)
        else:
            assert scales is None
    aligned = [recipe for recipe in recipes if recipe.train_batch_size == SMALL["samples"]]
    assert [recipe.epochs for recipe in aligned] == [3, 3] and {r.schedule for r in aligned} == {"cosine"}


def test_alignment_trains_all_rows_and_nothing_else(monkeypatch):
    learner = Case(TUNA, SMALL).run(stop_after=2).learner.train()
    before = learner.head.weight.detach().clone()
    adapters = [vector(a) for a in learner.adapters]
    learner.align(context(1))
    assert bool((learner.head.weight != before).any(1).all()) and learner.head.sigma.item() == 1
    assert all(torch.equal(vector(a), old) for a, old in zip(learner.adapters, adapters, strict=True))


# --- the routers in the results


@pytest.mark.parametrize("cls", [TUNA, MOS])
def test_router_and_oracle_accuracy_by_hand(cls, tmp_path):
    from cil import results
    from cil.features import FeatureCache
    from cil.runner.evaluation import evaluate
    from cil.testing.setting import accelerator

    done = Case(cls, {**SMALL, "epochs": 1}).run()
    found = evaluate(done.learner, done.stream, 2, FeatureCache(accelerator(), 16))
    images, task_of = probe_images(), np.repeat(np.arange(3), SIZES)
    with torch.inference_mode():
        features = done.learner.features(images)
        taken = done.learner.route(features).numpy()
        truth = np.repeat(np.arange(sum(SIZES)), 6)
        told = done.learner.routed_logits(features, torch.from_numpy(task_of[truth])).argmax(1).numpy()
    assert (found.routed == taken[found.index]).all() and (found.oracle == told[found.index]).all()
    row = done.rows[2]
    assert row["router_accuracy"] == pytest.approx((taken == task_of[truth]).mean())
    assert row["oracle_router_accuracy"] == pytest.approx((told == truth).mean())
    header = {"tasks": [[]]}
    content = results.assemble(header, done.rows, 3)
    assert content["summary"]["router_accuracy"] == row["router_accuracy"]
    assert content["curves"]["oracle_router_accuracy"] == [r["oracle_router_accuracy"] for r in done.rows]
    for r in done.rows:  # as runs of earlier versions, and of learners that choose nothing, have them
        del r["router_accuracy"], r["oracle_router_accuracy"]
    assert not {"router_accuracy", "oracle_router_accuracy"} & results.assemble(header, done.rows, 3)["summary"].keys()


def test_the_prediction_never_learns_the_task():
    """The same images in another order of tasks, or alone, take the same adapters."""
    learner = Case(MOS, SMALL).finished.learner
    with torch.inference_mode():
        features = learner.features(probe_images())
        together = learner.route(features)
        alone = torch.cat([learner.route(row[None]) for row in features])
    assert torch.equal(together, alone)


# --- TUNA


def test_fusion_by_hand_and_as_ties_without_trimming():
    vectors = torch.tensor(
        [[1.0, -3.0, 0.5, 0.0, 2.0, -1.0], [2.0, 2.0, -0.4, 0.0, -2.0, -4.0], [-1.0, -0.5, 0.3, -1.0, 0.0, 6.0]]
    )
    # sums 2, −1.5, 0.4, −1, 0, 1
    expected = torch.tensor([2.0, -3.0, 0.5, -1.0, 0.0, 6.0])
    assert torch.equal(fused(vectors), expected)
    assert torch.equal(fused(vectors[:1]), vectors[0])
    drawn = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    rule = TIES(density=1.0, merge="max", scale=1.0)
    rule.start({"w": torch.zeros(40)})
    for row in drawn:
        rule.add({"w": row})
    torch.testing.assert_close(fused(drawn), rule.merged()["w"])


def test_the_universal_adapter_is_the_fused_one_and_is_what_is_evaluated():
    learner = Case(TUNA, {**SMALL, "orthogonality": 0.1}).run().learner
    stacked = torch.stack([vector(a) for a in learner.adapters]).double().numpy()
    sign = np.sign(stacked.sum(0))
    agreeing = np.where(np.sign(stacked) == sign, np.abs(stacked), 0)
    np.testing.assert_allclose(vector(learner.universal).numpy(), sign * agreeing.max(0), rtol=1e-6)
    images = probe_images()
    with torch.inference_mode():
        seen = learner.split(learner.features(images))
        torch.testing.assert_close(seen[:, -1], learner.backbone(images, learner.universal))
        assert not torch.allclose(seen[:, -1], seen[:, -2], atol=1e-4), "the published code evaluates the last adapter"


def test_overlap_by_hand_and_by_numpy():
    vit = backbone()
    new, *old = adapters = [Adapter(vit, 2) for _ in range(3)]
    rng = np.random.RandomState(0)
    weights = rng.randn(3, 3, 48, 2)  # adapter, block, F, r
    with torch.no_grad():
        for adapter, blocks in zip(adapters, weights, strict=True):
            for block, weight in zip(adapter.adapters, blocks, strict=True):
                block.up.weight.copy_(torch.from_numpy(weight))
    expected = sum(np.abs(weights[0, b].T @ weights[i, b]).sum() for i in (1, 2) for b in range(3)) / 3
    assert overlap(upward(new), map(upward, old)).item() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():  # two directions of the first block in common, both of opposite sign; nothing in the others
        for adapter in adapters:
            for block in adapter.adapters:
                block.up.weight.zero_()
        new.adapters[0].up.weight[:2] = torch.eye(2)
        old[0].adapters[0].up.weight[:2] = torch.tensor([[0.0, -3.0], [1.0, 0.0]])
        old[1].adapters[1].up.weight.fill_(7.0)
    assert overlap(upward(new), map(upward, old)).item() == pytest.approx((3 + 1) / 3)


def test_the_overlap_counts_with_lambda_and_falls_with_the_task(monkeypatch):
    """L = CosFace + λ e^(−t) Σ; t from 1, and nothing in the first task."""
    losses = []
    monkeypatch.setattr(TUNA, "acquire", lambda self, task, ctx, loss, rows: losses.append((task, loss)))
    learners = {}
    for weight in (0.0, 0.5):
        learner = learners[weight] = untrained(TUNA, tasks=0, orthogonality=weight, dropout=0.0)
        for task in stream(learner.backbone).tasks:
            learner.begin(task, context(task.index))
            with torch.no_grad():
                for p in learner.adapters[-1].parameters():
                    p.fill_(0.01 * (task.index + 1))
            learner.learn(task, context(task.index))
    plain, weighted = losses[:3], losses[3:]
    for t, ((task, without), (_, loss)) in enumerate(zip(plain, weighted, strict=True)):
        labels = torch.tensor([task.classes[0]] * 4)
        with torch.no_grad():
            new = float(loss(probe_images()[:4], labels)[0])
            old = float(without(probe_images()[:4], labels)[0])
        products = sum(48 * 0.01 * (t + 1) * 0.01 * (i + 1) * 4**2 for i in range(t))
        assert new - old == pytest.approx(0.5 * math.exp(-(t + 1)) * products, abs=2e-6)


def test_each_row_takes_the_adapter_of_lowest_entropy_and_adds_the_universal_one():
    learner = untrained(TUNA)
    learner.head.grow(8)
    draw = torch.Generator().manual_seed(3)
    features = torch.randn(20, 4 * 48, generator=draw)
    weight = learner.head.weight.detach().double().numpy()
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    views = features.double().numpy().reshape(20, 4, 48)
    views = views / np.linalg.norm(views, axis=2, keepdims=True)
    exponentials = np.exp(20 * views @ unit.T)
    p = exponentials / exponentials.sum(2, keepdims=True)
    entropy = -(p * np.log(p)).sum(2)
    taken = entropy[:, :3].argmin(1)
    assert set(taken) == {0, 1, 2} and (entropy.argmin(1) == 3).any(), "the universal adapter does not compete"
    assert learner.route(features).tolist() == taken.tolist()
    expected = p[np.arange(20), taken] + p[:, 3]
    with torch.no_grad():
        np.testing.assert_allclose(learner.logits(features).numpy(), expected, rtol=1e-3, atol=1e-6)
        by_batch = entropy[:, :3].mean(0).argmin()
        assert (taken != by_batch).any()


def test_one_class_has_no_entropy_to_compare():
    learner = TUNA(TUNA.Config.model_validate(SMALL), backbone())
    for task in stream(learner.backbone, sizes=(1, 1, 6)).tasks[:1]:
        learner.begin(task, context(0))
    learner.head.grow(1)
    with torch.no_grad():
        features = torch.randn(3, 48)
        assert learner.route(features).tolist() == [0, 0, 0]
        assert torch.equal(learner.logits(features), torch.full((3, 1), 2.0))


# --- MOS


def test_after_every_step_the_adapter_moves_to_the_mean_of_the_old_ones(monkeypatch):
    learner = untrained(MOS, alpha=0.25)
    with torch.no_grad():
        for adapter, value in zip(learner.adapters, (1.0, 4.0, 10.0), strict=True):
            for p in adapter.parameters():
                p.fill_(value)
    steps = []
    monkeypatch.setattr(
        MOS, "acquire", lambda self, task, ctx, loss, rows, after_step=None, **_: steps.append(after_step)
    )
    learner.learn(stream(learner.backbone).tasks[2], context(2))
    steps[0]()
    assert torch.allclose(vector(learner.adapters[2]), torch.tensor(0.75 * 10 + 0.25 * 2.5))
    steps[0]()
    assert torch.allclose(vector(learner.adapters[2]), torch.tensor(0.75 * 8.125 + 0.25 * 2.5))
    assert torch.equal(vector(learner.adapters[0]), torch.ones_like(vector(learner.adapters[0])))
    first = untrained(MOS, tasks=1)
    first.learn(stream(first.backbone).tasks[0], context(0))
    assert steps[1] is None, "the first task has nothing to be merged with"


def test_without_merging_the_adapter_ends_elsewhere():
    one, other = (Case(MOS, {**SMALL, "alpha": alpha}).run(stop_after=3).learner for alpha in (0.0, 0.5))
    mean = torch.stack([vector(a) for a in other.adapters[:2]]).mean(0)
    assert torch.equal(vector(one.adapters[0]), vector(other.adapters[0]))
    far = (vector(one.adapters[2]) - torch.stack([vector(a) for a in one.adapters[:2]]).mean(0)).norm()
    assert (vector(other.adapters[2]) - mean).norm() < far


def test_contrast_by_numpy():
    rng = np.random.RandomState(0)
    means, features = rng.randn(3, 6), rng.randn(4, 6)
    m = np.concatenate([means, features])
    sim = m @ m.T / 0.8
    expected = np.mean(np.log(np.exp(sim).sum(1)) - np.diag(sim))
    found = contrast(torch.from_numpy(means).float(), torch.from_numpy(features).float(), 0.8)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(contrast(torch.zeros(0, 6), torch.zeros(4, 6), 0.8)) == pytest.approx(math.log(4))


def test_the_loss_is_cross_entropy_and_contrast_with_old_means(monkeypatch):
    learner = Case(MOS, {**SMALL, "dropout": 0.0, "contrast": 0.3}).run(stop_after=2).learner
    task = stream(learner.backbone).tasks[2]
    kept = []
    monkeypatch.setattr(
        MOS, "acquire", lambda self, task, ctx, loss, rows, after_step=None, **_: kept.append((loss, rows))
    )
    means = learner.gaussians.means.float()
    learner.begin(task, context(2))
    learner.learn(task, context(2))
    (loss, rows), images, labels = kept[0], probe_images()[:6], torch.tensor([5, 6, 7, 5, 6, 7])
    with torch.no_grad():
        features = learner.backbone(images, learner.adapters[2])
        expected = cross_entropy(rows(features), labels - 5) + 0.3 * contrast(means, features, 0.8)
        assert len(means) == 5
        torch.testing.assert_close(loss(images, labels)[0], expected)


def test_micro_batches_are_refused_where_they_would_change_the_contrast():
    assert Case(MOS, {**SMALL, "contrast": 0, "micro_batch_size": 4}).run(stop_after=1).learner.stages == 1
    with pytest.raises(ValueError, match="micro_batch_size: 4; contrast compares"):
        MOS.Config(contrast=0.1, micro_batch_size=4)


def refining(leads, first, rounds=4):
    """A MOS of three one-hot worlds: through adapter a an image's head predicts a class of task ``leads[a]``, and the
    frozen prototypes one of task ``first``. The features of one image [1, 4 · 48]."""
    learner = untrained(MOS, rounds=rounds, ensemble=False)
    learner.head.grow(8)
    classes = {0: 1, 1: 4, 2: 6}  # a class of each task
    with torch.no_grad():
        learner.head.weight.zero_()
        learner.head.weight[:8, :8] = torch.eye(8)
    learner.prototypes.partial_fit(torch.eye(48)[:8], torch.arange(8))
    return learner, torch.cat([torch.eye(48)[classes[task]] for task in (*leads, first)])[None]


@pytest.mark.parametrize(
    ("leads", "first", "rounds", "taken", "predicted"),
    [
        ((0, 1, 2), 1, 4, 1, 4),  # the first guess stands
        ((2, 0, 2), 1, 4, 2, 6),  # 1 → 0 → 2 and stays: a wrong first guess is corrected twice
        ((2, 0, 2), 1, 1, 1, 1),  # one round: the prototypes' adapter predicts, of task 0
        ((2, 0, 2), 1, 2, 0, 6),
        ((1, 0, 2), 0, 4, 1, 1),  # 0 → 1 → 0 → 1: four predictions, the last through adapter 1
        ((1, 0, 2), 0, 3, 0, 4),
        ((1, 2, 0), 0, 4, 0, 4),  # around all three
    ],
)
def test_self_refinement_by_hand(leads, first, rounds, taken, predicted):
    learner, features = refining(leads, first, rounds)
    assert learner.route(features).tolist() == [taken]
    assert learner.logits(features).argmax(1).tolist() == [predicted]


def test_self_refinement_is_that_of_a_loop_over_images():
    learner = Case(MOS, {**SMALL, "ensemble": True}).run().learner
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(200, 4 * 48, generator=generator)
    views = learner.split(features)
    routed, moves = learner.route(features), 0
    with torch.no_grad():
        scores = learner.logits(features)
    for i, image in enumerate(views):
        guess = learner.prototypes.logits(image[-1:]).argmax()
        adapter = learner.task_of[guess]
        for n in range(1, 5):
            logits = learner.head.logits(image[adapter][None])[0]
            new = learner.task_of[logits.argmax()]
            if n == 4 or new == adapter:
                break
            adapter, moves = new, moves + 1
        assert routed[i] == adapter
        frozen = learner.prototypes.logits(image[-1:])[0]
        expected = logits.softmax(0) + (3 * frozen).softmax(0)
        torch.testing.assert_close(scores[i], expected, atol=1e-5, rtol=1e-4)
    assert moves > 20


def test_prototypes_are_those_of_the_frozen_backbone():
    learner = Case(MOS, SMALL).run().learner
    for task in stream(learner.backbone).tasks:
        images, indices = task.train.source
        pixels = torch.cat([p for p, _ in images.batches(indices, indices, 64)])
        with torch.inference_mode():
            frozen = learner.backbone(pixels).double()
        for c in task.classes:
            mean = frozen[torch.as_tensor(task.train.labels) == c].mean(0)
            torch.testing.assert_close(learner.prototypes.means[c], mean, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", [TUNA, MOS])
def test_it_runs_in_mixed_precision(cls):
    from cil.runner import run_stages
    from cil.utils import hardware

    vit = backbone()
    learner = cls(cls.Config.model_validate({**SMALL, "lr": 0.01 if cls is TUNA else 0.05, "train_batch_size": 4}), vit)
    rows = run_stages(learner, stream(vit), accelerator=hardware.accelerator("cpu", "bf16"), stop_after=2)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in learner.parameters())
    assert rows[0]["correct"][0] / rows[0]["total"][0] > 0.5
