"""SSIAT and RSIAT: what trains when, where old means go, and every new term against numpy."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cil.classifiers import Gaussians
from cil.classifiers.drift import local_shifts
from cil.errors import DataError
from cil.learners import rsiat
from cil.learners.bases.alignment import SampledFeatures, mean_scales, normalized_cross_entropy, with_variation
from cil.learners.bases.steering import Projector, pairwise_loss, projected_distance
from cil.learners.rsiat import RSIAT
from cil.learners.slca import SLCA
from cil.learners.ssiat import SSIAT
from cil.runner import run_stages
from cil.testing import Case, parametrize_learner
from cil.testing.setting import SIZES, backbone, context, draw_images, probe_images, stream
from cil.training import ParamGroup, Recipe, fit
from cil.utils import hardware

QUICK = {
    "tuner": {"name": "adapter", "bottleneck": 8},
    "first_epochs": 3,
    "epochs": 3,
    "samples": 16,
    "alignment_epochs": 2,
    "alignment_lr": 0.1,
}
LEARNS = {**QUICK, "first_epochs": 8, "epochs": 8, "lr": 0.001}
"""At higher rates training on a dozen images a class is near divergence, and another rounding ends elsewhere."""


@parametrize_learner([("ssiat", LEARNS)])
def test_common_checks(case, check):
    check(case)


@pytest.mark.slow
@parametrize_learner([("rsiat", {**LEARNS, "tuner": {"name": "lora", "rank": 2}, "code": 16, "variation": 0.1})])
def test_common_checks_of_rsiat(case, check):
    check(case)


@lru_cache
def shared(cls: type, **parameters) -> Case:
    """One case for all tests that look at the same run."""
    return Case(cls, {**QUICK, **parameters})


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vector(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def images_of(task: int) -> torch.Tensor:
    """A task's training images under the test transform."""
    vit = backbone()
    data = stream(vit).tasks[task].train
    return torch.cat([images for images, _ in data.batches(64, generator=None, augment=False, device="cpu")])


# --- drift


def test_local_shifts_by_numpy():
    points, before = draw(3, 5, seed=1).numpy(), draw(7, 5, seed=2).numpy()
    after = before + draw(7, 5, seed=3).numpy()
    for sigma in (0.5, 4.0):
        expected = np.zeros((3, 5))
        for c in range(3):
            weights = [math.exp(-((x - points[c]) ** 2).sum() / (2 * sigma**2)) + 1e-5 for x in before]
            moved = [w * (new - old) for w, new, old in zip(weights, after, before, strict=True)]
            expected[c] = sum(moved) / sum(weights)
        found = local_shifts(*map(torch.from_numpy, (points, before, after)), sigma)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_near_images_decide_and_far_away_all_count_alike():
    before = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    after = before + torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    shifts = local_shifts(torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 1e4]]), before, after, sigma=1.0)
    torch.testing.assert_close(shifts[:, 1], torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64), atol=3e-5, rtol=0)
    with pytest.raises(DataError, match="the same images before and after"):
        local_shifts(before, before, after[:1])


def test_translated_gaussians_are_those_of_moved_samples():
    labels = torch.tensor([0] * 9 + [1] * 7 + [3])  # class 2 has no samples, class 3 has one
    x, shifts = draw(17, 6) + 3, draw(4, 6, seed=5)
    moved = Gaussians(6, 1e-3).partial_fit(x, labels)
    before = [moved.covariance(c) for c in range(4)]
    moved.logits(x)  # factors that must be solved again
    moved.translate(shifts)
    fresh = Gaussians(6, 1e-3).partial_fit(x + shifts[labels], labels)
    torch.testing.assert_close(moved.means, fresh.means, atol=1e-13, rtol=1e-12)
    for c in range(4):
        torch.testing.assert_close(moved.covariance(c), before[c], atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(moved.logits(x), fresh.logits(x), atol=1e-6, rtol=1e-8)
    assert moved.sums[2].count_nonzero() == 0 and moved.covariance(3).count_nonzero() == 0
    some = Gaussians(6, 1e-3).partial_fit(x, labels).translate(shifts[:1])
    torch.testing.assert_close(some.means[1:], Gaussians(6).partial_fit(x, labels).means[1:])
    with pytest.raises(DataError, match=r"shifts have shape \[5, 6\]; expected \[up to 4, 6\]"):
        moved.translate(draw(5, 6))


def test_a_lone_sample_that_lands_on_zero_keeps_its_covariance():
    lone = Gaussians(3, 1e-3).partial_fit(torch.full((1, 3), 7.0), torch.tensor([0]))
    lone.translate(torch.full((1, 3), -7.0, dtype=torch.float64) + 1e-9)
    assert lone.covariance(0).count_nonzero() == 0
    torch.testing.assert_close(lone.means, torch.full((1, 3), 1e-9, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cls", [SSIAT, RSIAT])
def test_old_means_follow_the_current_images_and_covariances_stay(cls):
    one, two = (shared(cls).after(n).learner for n in (2, 3))
    images = images_of(2)
    with torch.inference_mode():
        before, after = (learner.features(images).double().numpy() for learner in (one, two))
    assert np.abs(after - before).max() > 1e-3
    means = one.gaussians.means.numpy()
    weights = np.exp(-((before[None] - means[:, None]) ** 2).sum(2) / (2 * 4.0**2)) + 1e-5
    expected = means + weights @ (after - before) / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(two.gaussians.means[:5].numpy(), expected, atol=1e-5)
    for c in range(5):
        torch.testing.assert_close(two.gaussians.covariance(c), one.gaussians.covariance(c), atol=1e-10, rtol=1e-9)
    assert two.gaussians.ridge == 1e-3
    np.testing.assert_allclose(
        two.gaussians.means[6], after[len(pictures_of(5)) :][: len(pictures_of(6))].mean(0), atol=1e-5
    )


def pictures_of(c: int) -> np.ndarray:
    images, labels = draw_images("train")
    return images[labels == c]


def test_without_sigma_means_stay():
    one, two = (shared(SSIAT, drift_bandwidth=None).after(n).learner for n in (1, 3))
    assert torch.equal(two.gaussians.sums[:4], one.gaussians.sums)


# --- what trains when


def test_old_rows_are_frozen_in_training_and_all_learn_in_the_alignment():
    one, two = (shared(SSIAT, alignment_epochs=0).after(n).learner for n in (1, 3))
    assert torch.equal(two.head.weight[:4], one.head.weight)
    assert not torch.equal(vector(two.tuner), vector(one.tuner))
    aligned = [shared(SSIAT).after(n).learner for n in (1, 3)]
    assert torch.equal(aligned[0].head.weight, one.head.weight), "a single task has nothing to align"
    assert (aligned[1].head.weight - two.head.weight).abs().amax(1).min() > 0
    for learner in (one, two, *aligned):
        assert float(learner.head.sigma) == 20.0
        assert not learner.head.sigma.requires_grad


def test_the_tuner_stays_in_the_alignment_and_training_goes_on_from_aligned_rows():
    seen = []

    class Followed(SSIAT):
        def align(self, ctx):
            before = vector(self.tuner)
            super().align(ctx)
            assert torch.equal(vector(self.tuner), before)
            seen.append(self.head.weight.detach().clone())

        def correct_drift(self, before, after, labels, ctx):
            if seen:
                assert torch.equal(self.head.weight[: len(seen[-1])], seen[-1])
            super().correct_drift(before, after, labels, ctx)

    Case(Followed, QUICK).run()
    assert [len(rows) for rows in seen] == [5, 8]


def test_scores_are_scaled_cosines():
    learner = Case(SSIAT, {**QUICK, "scale": 7.0}).run().learner
    with torch.inference_mode():
        features = learner.features(probe_images())
        expected = 7 * F.cosine_similarity(features[:, None], learner.head.weight[None], dim=2)
        torch.testing.assert_close(learner.logits(features), expected, atol=1e-5, rtol=1e-5)


def test_first_epochs_passes_and_log():
    parameters = {**QUICK, "first_epochs": 4, "epochs": 2, "alignment_epochs": 3}
    rows = Case(SSIAT, parameters).run().rows
    names = [[name for name, _ in row["log"]] for row in rows]
    assert [n.count("loss") for n in names] == [4, 2, 2]
    assert [n.count("alignment_loss") for n in names] == [0, 3, 3]
    assert [n.count("mean_drift") for n in names] == [0, 1, 1]
    # 48, 12 and 25 images, trained on 4, 2 and 2 times, then seen after and, from the second task on, before
    assert [row["costs"]["train_passes"] for row in rows] == [48 * 5, 12 * 4, 25 * 4]
    steered = Case(RSIAT, parameters).run().rows
    assert [row["costs"]["train_passes"] for row in steered] == [48 * 5, 12 * 6, 25 * 6], "φ_{t-1} sees each batch too"
    assert [row["costs"]["test_passes"] for row in rows] == list(6 * np.cumsum(SIZES))


# --- RSIAT


def test_pairwise_loss_by_numpy():
    x, labels = draw(6, 4), torch.tensor([0, 1, 0, 2, 1, 0])
    unit = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    same = [unit[i] @ unit[j] for i, j in pairs if labels[i] == labels[j]]
    other = [unit[i] @ unit[j] for i, j in pairs if labels[i] != labels[j]]
    for margin in (0.1, -1.0):
        expected = np.mean([1 - s for s in same]) + 1.5 * np.mean([max(0, s - margin) for s in other])
        assert pairwise_loss(x, labels, 1.5, margin).item() == pytest.approx(expected)
    as_in_the_paper = np.mean([1 - s for s in same]) + np.mean([1 + s for s in other])
    assert pairwise_loss(x, labels, 1.0, -1.0).item() == pytest.approx(as_in_the_paper)


@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [0, 1, 2]])
def test_missing_kinds_of_pairs_count_nothing(labels):
    x = draw(len(labels), 4).float().requires_grad_()
    loss = pairwise_loss(x, torch.tensor(labels), 1.0, -1.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all()
    assert (loss.item() == 0) == (len(labels) == 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert pairwise_loss(x, torch.tensor(labels), 1.0, -1.0).item() == pytest.approx(loss.item(), abs=1e-6)


def test_the_metric_loss_rises_over_the_epochs(monkeypatch):
    learner = RSIAT(RSIAT.Config(**QUICK, metric_weight=0.5, metric_warmup=4, train_batch_size=20), backbone())
    task, ctx, found = stream(learner.backbone).tasks[0], context(), []
    learner.begin(task, ctx)
    monkeypatch.setattr(rsiat, "pairwise_loss", lambda features, labels, alpha, margin: torch.ones(()))

    def six_epochs(loss, groups, data, recipe, ctx, after_step, batch_loss):
        for _ in range(6 * 3):  # 48 images, 20 at once
            found.append(float(loss(torch.zeros(1, 3, 32, 32), torch.zeros(1))[0]))
            after_step()

    monkeypatch.setattr(rsiat, "fit", six_epochs)
    learner.shape(task, lambda features, labels: (torch.zeros(()), features), [], learner.config, ctx)
    assert found == [0.5 * ramp for ramp in (0, 0.25, 0.5, 0.75, 1, 1) for _ in range(3)]


def test_without_the_metric_loss_cosface_is_alone_and_takes_micro_batches():
    calm = {**QUICK, "tuner": {"name": "adapter", "bottleneck": 8, "dropout": 0}}

    def tuner(**more):
        return vector(Case(RSIAT, {**calm, **more}).run(stop_after=1).learner.tuner)

    alone = tuner(metric_weight=0)
    assert torch.equal(alone, tuner(metric_weight=1e-30)), "that weight is lost in rounding"
    assert not torch.equal(alone, tuner(metric_weight=1, metric_warmup=0))
    off = (tuner(metric_weight=0, micro_batch_size=4) - alone).abs().max()
    moved = (tuner(metric_weight=0, lr=1e-12) - alone).abs().max()
    assert off < 0.01 * moved, "sums over micro-batches round otherwise, and training enlarges that"
    with pytest.raises(ValueError, match="micro_batch_size: 4; metric_weight compares"):
        RSIAT.Config(micro_batch_size=4)


def test_the_projector_starts_as_the_identity_and_draws_from_its_generator():
    state = torch.get_rng_state()
    one, two = Projector(10, code=7), Projector(10, code=7)
    x = draw(5, 10).float()
    assert torch.equal(one(x), x)
    assert [tuple(layer.weight.shape) for layer in one.layers] == [(64, 10), (7, 64), (64, 7), (10, 64)]
    one.reset(torch.Generator().manual_seed(1))
    two.reset(torch.Generator().manual_seed(1))
    assert torch.equal(vector(one), vector(two)) and torch.equal(one(x), x)
    assert torch.equal(torch.get_rng_state(), state)
    fit(
        lambda x, y: ((one(x) - 2 * x).square().mean(), x),
        [ParamGroup(one.parameters())],
        SampledFeatures(Gaussians(10).partial_fit(x, torch.zeros(5, dtype=torch.int64)), 32),
        Recipe(epochs=3, lr=0.1),
        context(),
    )
    assert not torch.allclose(one(x), x)
    hidden = x.double().numpy()
    for layer in one.layers[:-1]:
        z = hidden @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        hidden = z * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(z)
    last = one.layers[-1]
    moved = hidden @ last.weight.detach().double().numpy().T + last.bias.detach().double().numpy()
    np.testing.assert_allclose(one(x).detach().numpy(), x.numpy() + moved, atol=1e-5)


def test_projected_distance_by_numpy():
    projector = torch.nn.Linear(4, 4).double()
    with torch.no_grad():
        projector.weight.copy_(draw(4, 4, seed=7))
        projector.bias.copy_(draw(4, seed=8))
    new, old, means = draw(3, 4).requires_grad_(), draw(3, 4, seed=1), draw(2, 4, seed=2)
    project = lambda x: x.numpy() @ draw(4, 4, seed=7).numpy().T + draw(4, seed=8).numpy()  # noqa: E731
    p, m = project(old), project(means)
    square = np.mean((new.detach().numpy() - p) ** 2)
    cosines = [abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for a in m for b in p]
    found = projected_distance(new, old, means, projector, beta=2.0, gamma=0.7)
    assert found.item() == pytest.approx(2 * square + 0.7 * np.mean(cosines))
    projected_distance(new, old, means, projector, beta=0.0, gamma=1.0).backward()
    assert new.grad.count_nonzero() == 0 and projector.weight.grad.count_nonzero() > 0, "the second term moves P alone"


def test_the_snapshot_is_frozen_and_dropped_and_the_projector_goes_on(monkeypatch):
    stages = []
    real = rsiat.copy.deepcopy

    class Followed(RSIAT):
        def steer(self, task, fitted, groups, recipe, ctx):
            copies = []
            monkeypatch.setattr(rsiat.copy, "deepcopy", lambda module: copies.append(real(module)) or copies[-1])
            before, projector = vector(self.tuner), vector(self.projector)
            super().steer(task, fitted, groups, recipe, ctx)
            monkeypatch.setattr(rsiat.copy, "deepcopy", real)
            [snapshot] = copies
            assert torch.equal(vector(snapshot), before) and not torch.equal(vector(self.tuner), before)
            assert not any(module.training for module in snapshot.modules())
            assert all(p.grad is None and not p.requires_grad for p in snapshot.parameters())
            assert sum(p.numel() for p in snapshot.parameters()) == sum(p.numel() for p in self.tuner.parameters())
            stages.append((projector, vector(self.projector)))

    learner = Case(Followed, {**QUICK, "tuner": {"name": "adapter", "dropout": 0.5}}).run().learner
    assert len(stages) == 2 and torch.equal(stages[1][0], stages[0][1]), "P goes on from task to task"
    assert all(not torch.equal(before, after) for before, after in stages)
    owners = {key.split(".")[0] for key in learner.state_dict()}
    assert owners == {"tuner", "head", "gaussians", "projector", "task_of"}
    before = learner.predict(probe_images())
    with torch.no_grad():
        learner.projector.layers[-1].bias.fill_(9.0)
    assert torch.equal(learner.predict(probe_images()), before), "P plays no part in predictions"


def test_beta_holds_the_features():
    moved = {}
    for beta in (0.0, 20.0):
        one, two = (shared(RSIAT, beta=beta, gamma=0.0).after(n).learner for n in (1, 3))
        with torch.inference_mode():
            moved[beta] = float((two.features(probe_images()) - one.features(probe_images())).norm(dim=1).mean())
    assert moved[20.0] < 0.7 * moved[0.0]


def test_it_runs_in_mixed_precision():
    vit = backbone()
    learner = RSIAT(RSIAT.Config.model_validate({**LEARNS, "train_batch_size": 4, "variation": 0.1}), vit)
    rows = run_stages(learner, stream(vit), accelerator=hardware.accelerator("cpu", "bf16"), stop_after=2)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in learner.parameters())
    assert rows[0]["correct"][0] / rows[0]["total"][0] > 0.5


# --- LCA's term


def two_classes() -> Gaussians:
    labels = torch.arange(40) % 2
    return Gaussians(3).partial_fit(draw(40, 3) + 2 * labels[:, None], labels)


def test_variation_by_hand():
    logits = {"z": torch.tensor([[2.0, 0.0], [0.0, 1.0]]), "other": torch.tensor([[0.0, 0.0], [3.0, 1.0]])}
    labels = torch.tensor([0, 1])

    def loss(which, labels, reduction="mean"):
        return F.cross_entropy(logits[which], labels, reduction=reduction), logits[which]

    z = [math.log(math.exp(2) + 1) - 2, math.log(1 + math.e) - 1]
    other = [math.log(2), math.log(math.exp(3) + math.e) - 1]
    value, shown = with_variation(loss, 0.3)("z", "other", labels)
    spread = np.mean([abs(a - b) for a, b in zip(z, other, strict=True)])
    assert value.item() == pytest.approx(np.mean(z + other) + 0.3 * spread) and shown is logits["z"]
    assert with_variation(loss, 0.0) is loss


def test_normalized_cross_entropy_one_by_one():
    logits, labels, tasks = draw(5, 4), torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 0, 1, 1])
    each = normalized_cross_entropy(logits, labels, tasks, reduction="none")
    alone = [normalized_cross_entropy(logits[i : i + 1], labels[i : i + 1], tasks) for i in range(5)]
    torch.testing.assert_close(each, torch.stack(alone))


def test_pairs_are_independent_draws_of_one_class_that_stay_together():
    def passes(part):
        generator = torch.Generator().manual_seed(3)
        data = SampledFeatures(two_classes(), 2000, torch.tensor([0.5, 1.0]), pairs=True)
        return list(data.batches(1024, generator=generator, augment=True, device="cpu", part=part))

    whole = passes((0, 1))
    z, other, labels = (torch.cat(rows).double() for rows in zip(*whole, strict=True))
    for c, factor in ((0, 0.5), (1, 1.0)):
        a, b = z[labels == c], other[labels == c]
        centre = factor * two_classes().means[c]
        assert len(a) == 2000 and (a.mean(0) - centre).abs().max() < 0.1 and (b.mean(0) - centre).abs().max() < 0.1
        assert np.abs(np.corrcoef(a.T, b.T)[:3, 3:]).max() < 0.08
    for rank in range(3):
        for batch, mine in zip(whole, passes((rank, 3)), strict=True):
            assert all(torch.equal(rows[rank::3], own) for rows, own in zip(batch, mine, strict=True))


@pytest.mark.parametrize("cls", [SLCA, SSIAT])
def test_variation_makes_losses_of_a_class_alike(cls):
    """The rate is so low that the alignment converges with both weights, also on SLCA's ten times steeper loss."""
    few = {"samples": 16, "alignment_epochs": 24, "alignment_lr": 0.005, "epochs": 2}
    few |= {"milestones": [2]} if cls is SLCA else {"tuner": QUICK["tuner"], "first_epochs": 2}
    spread = {}
    for weight in (0.0, 5.0):
        learner = Case(cls, {**few, "variation": weight}).run().learner
        labels = torch.arange(8).repeat_interleave(200)
        drawn = learner.gaussians.sample(
            labels, torch.Generator().manual_seed(1), mean_scales(learner.task_of, 2)[labels]
        )
        with torch.inference_mode():
            logits = learner.logits(drawn)
            if cls is SLCA:
                losses = normalized_cross_entropy(logits, labels, learner.task_of, reduction="none")
            else:
                losses = F.cross_entropy(logits, labels, reduction="none")
        losses = losses.view(8, 2, 100)
        spread[weight] = float((losses[:, 0] - losses[:, 1]).abs().mean())
    assert spread[5.0] < 0.8 * spread[0.0], spread
