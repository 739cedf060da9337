"""ACMap, CoFiMA and DUCT: what is averaged with what, and where old classes move."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from lessons import taught, teach
from marks import slow_beyond

from cil.classifiers.transport import barycentric
from cil.learners.acmap import ACMap
from cil.learners.cofima import CoFiMA
from cil.learners.duct import DUCT
from cil.learners.slca import SLCA
from cil.merging.fisher import fisher_pair
from cil.testing import Case, parametrize_learner
from cil.testing.setting import backbone, context, probe_images, stream
from cil.tuning import Adapter

QUICK = {
    ACMap: {"bottleneck": 4, "epochs": 1, "lr": 0.3},
    CoFiMA: {"epochs": 1, "milestones": [1], "samples": 8, "alignment_epochs": 1, "statistics": 4, "lr": 0.05},
    DUCT: {"epochs": 1, "head_epochs": 1, "lr": 0.3},
}


@pytest.mark.slow
@parametrize_learner(
    [
        ("acmap", {**QUICK[ACMap], "epochs": 3, "merges": 2}),
        ("cofima", {**QUICK[CoFiMA], "epochs": 5, "milestones": [4]}),
        ("duct", {**QUICK[DUCT], "epochs": 2}),
    ]
)
def test_common_checks(case, check):
    check(case)


@lru_cache
def shared(cls: type, **parameters) -> Case:
    """One case for all tests that look at the same run."""
    return Case(cls, {**QUICK[cls], **parameters})


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- ACMap ------------------------------------------------------------------------------------------------------------


def test_the_merged_adapter_is_the_plain_mean_of_all(monkeypatch):
    trained = []

    def train_adapter(self, task, ctx):
        adapter = Adapter(self.backbone, 4)
        adapter.reset(torch.Generator().manual_seed(task.index))
        trained.append(adapter)
        return adapter

    monkeypatch.setattr(ACMap, "train_adapter", train_adapter)
    learner, _ = taught(shared(ACMap), 3)
    for mean, *single in zip(learner.merged[-1].parameters(), *(one.parameters() for one in trained), strict=True):
        torch.testing.assert_close(mean, torch.stack(single).mean(0))


def test_every_task_starts_from_the_first_tasks_adapter():
    learner, data = taught(shared(ACMap), 1)
    ctx, task = context(), data.tasks[1]
    learner.begin(task, ctx)
    learner.config = learner.config.model_copy(update={"lr": 1e-12})
    adapter = learner.train_adapter(task, ctx)
    assert all(torch.equal(*pair) for pair in zip(adapter.parameters(), learner.merged[0].parameters(), strict=True))


def test_equal_adapters_shift_nothing(monkeypatch):
    monkeypatch.setattr(ACMap, "train_adapter", lambda self, task, ctx: self.merged[0])
    learner, _ = taught(shared(ACMap), 3)
    assert float(learner.shifts.abs().max()) < 1e-5


def test_a_true_translation_is_undone_exactly():
    """Features move by one vector per merge: old prototypes follow, whatever the current classes are."""
    learner, _ = taught(shared(ACMap), 3)
    x, moves = draw(12, 48), draw(3, 48, seed=1)
    learner.map(tuple(x + moves[: i + 1].sum(0) for i in range(3)), torch.arange(12) % 3)
    torch.testing.assert_close(learner.shifts[0], moves[1:].sum(0))
    torch.testing.assert_close(learner.shifts[1], moves[2])
    assert not bool(learner.shifts[2].any())


def test_prototypes_are_means_under_their_own_tasks_adapter_and_the_shift_is_of_class_means():
    learner, data = taught(shared(ACMap), 3)
    merged = [learner.merged[i].eval() for i in range(3)]
    for task in data.tasks:
        y = task.train.labels
        images = torch.cat([batch for batch, _ in task.train.batches(64)])
        with torch.no_grad():
            seen = [learner.backbone(images, adapter).double().numpy() for adapter in merged]
        means = [np.stack([one[y == c].mean(0) for c in task.classes]) for one in seen]
        np.testing.assert_allclose(learner.prototypes.means[list(task.classes)], means[task.index], atol=1e-4)
    for i in range(2):
        np.testing.assert_allclose(learner.shifts[i], (means[2] - means[i]).mean(0), atol=1e-4)


@pytest.mark.slow
def test_after_the_last_merge_nothing_changes_but_the_prototypes():
    two, three = (shared(ACMap, merges=2).after(n).learner for n in (2, 3))
    assert len(three.merged) == 2
    assert torch.equal(two.shifts, three.shifts[:2]) and not bool(three.shifts[2].any())
    images = probe_images()
    with torch.no_grad():
        assert torch.equal(two.features(images), three.features(images))


# --- CoFiMA -----------------------------------------------------------------------------------------------------------


def test_a_pair_of_models_is_averaged_by_information():
    new, old, f, g = draw(5), draw(5, seed=1), draw(5, seed=2).abs(), draw(5, seed=3).abs()
    expected = (0.4 * f * new + 0.6 * g * old) / (0.4 * f + 0.6 * g)
    torch.testing.assert_close(fisher_pair(new, old, f, g, 0.4), expected)
    torch.testing.assert_close(fisher_pair(new, old, f, f, 0.4), 0.4 * new + 0.6 * old)
    assert torch.equal(fisher_pair(new, old, f, 0 * g, 0.4), new)
    assert torch.equal(fisher_pair(new, old, 0 * f, g, 0.4), old)
    torch.testing.assert_close(fisher_pair(new, old, 0 * f, 0 * g, 0.4), 0.4 * new + 0.6 * old)  # 0/0
    tiny = fisher_pair(new.float(), old.float(), f.float() * 1e-30, g.float() * 1e-30, 0.4)
    torch.testing.assert_close(tiny, expected.float())


def test_cofima_merges_the_backbone_and_old_rows_and_leaves_new_ones(monkeypatch):
    learner, data = taught(shared(CoFiMA), 1)
    aligned, known = learner.aligned, dict(learner.fisher.named_buffers())
    before = {name: value.clone() for name, value in learner.tuner.copies.items()}
    seen = {}
    monkeypatch.setattr(CoFiMA, "align", lambda self, ctx: None)

    def measure(self, task, ctx):
        seen["fisher"] = CoFiMA.__mro__[0].measured(self, task, ctx)
        seen["trained"] = {name: value.clone() for name, value in self.tuner.copies.items()}
        return seen["fisher"]

    monkeypatch.setattr(CoFiMA, "measured", CoFiMA.measure, raising=False)
    monkeypatch.setattr(CoFiMA, "measure", measure)
    task, ctx = data.tasks[1], context()
    learner.begin(task, ctx)
    learner.learn(task, ctx)
    for name in ("blocks/1/attn/qkv/weight", "norm/bias"):
        f, g = 0.4 * seen["fisher"][name].double(), 0.6 * known[name].double()
        expected = (f * seen["trained"][name] + g * before[name]) / (f + g)
        torch.testing.assert_close(learner.tuner.copies[name].double(), expected, equal_nan=True, atol=1e-6, rtol=1e-5)
        assert not torch.equal(learner.tuner.copies[name], seen["trained"][name])
        assert torch.equal(learner.fisher.get_buffer(name), seen["fisher"][name])
    assert seen["fisher"]["head_weight"].shape == (5, 48) and known["head_bias"].shape == (4,)
    assert torch.equal(learner.aligned.weight[4:], learner.head.weight[4:])
    f, g = 0.4 * seen["fisher"]["head_weight"][:4].double(), 0.6 * known["head_weight"].double()
    expected = (f * learner.head.weight[:4] + g * aligned.weight) / (f + g)
    torch.testing.assert_close(learner.aligned.weight[:4].double(), expected, atol=1e-6, rtol=1e-5)


def test_the_first_task_is_slca():
    ours, theirs = taught(shared(CoFiMA), 1)[0], shared(CoFiMA).parameters
    slca = Case(SLCA, {k: v for k, v in theirs.items() if k != "statistics"}).learner()
    task, ctx = stream(slca.backbone).tasks[0], context()
    slca.begin(task, ctx)
    slca.learn(task, ctx)
    assert all(torch.equal(*pair) for pair in zip(ours.tuner.parameters(), slca.tuner.parameters(), strict=True))


# --- DUCT -------------------------------------------------------------------------------------------------------------


def test_transported_rows_are_averages():
    cost = draw(4, 6).abs()
    rows = barycentric(cost, 0.5)
    assert rows.shape == (6, 4) and bool((rows > 0).all())
    torch.testing.assert_close(rows.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(rows.sum(0), torch.full((4,), 1.5, dtype=torch.float64), atol=1e-5, rtol=1e-5)
    plan, kernel = rows.T / 6, torch.exp(-cost / 0.5)  # T = diag(u) K diag(v): all 2 × 2 minors of T/K are 0
    scaled = plan / kernel
    torch.testing.assert_close(scaled * scaled[0, 0], scaled[:, :1] * scaled[:1])


@pytest.mark.parametrize("entropy", [1e-3, 1e-6])
def test_without_entropy_a_permutation_is_copied(entropy):
    order = torch.tensor([2, 0, 3, 1])
    points = 10 * draw(4, 3)
    rows = barycentric(torch.cdist(points, points[order]), entropy)
    torch.testing.assert_close(rows @ points, points[order])


def test_equal_classes_get_the_mean_row():
    torch.testing.assert_close(barycentric(torch.full((3, 2), 7.0), 0.02), torch.full((2, 3), 1 / 3).double())


@pytest.mark.parametrize("ratio", slow_beyond([0.25], [0.25, 0.0]))
def test_duct_adds_scaled_updates_and_moves_old_rows(ratio, monkeypatch):
    learner, data = taught(shared(DUCT, head_ratio=ratio), 1)
    start = dict(learner.backbone.model.named_parameters())
    before, old_rows = {n: v.clone() for n, v in learner.tuner.copies.items()}, learner.head.weight.detach().clone()
    seen = {}

    def merge(self, own, similarity, ctx):
        seen.update(own=dict(own.copies.items()), similarity=similarity)
        return original(self, own, similarity, ctx)

    original = DUCT.merge
    monkeypatch.setattr(DUCT, "merge", merge)
    for task in data.tasks[1:]:
        teach(learner, task)
        if task.index == 1:
            name = "blocks/0/attn/qkv/weight"
            update = seen["own"][name] - start[name.replace("/", ".")]
            expected = before[name] + 0.25 * seen["similarity"] * update
            torch.testing.assert_close(learner.tuner.copies[name], expected)
            assert 0.5 < seen["similarity"] <= 1 and bool(update.any())
            # one new class: every old row moves towards its row
            moved = (1 - ratio) * old_rows + ratio * learner.head.weight[4]
            torch.testing.assert_close(learner.head.weight[:4].detach(), moved.detach(), atol=1e-5, rtol=1e-5)
    frozen, labels = context().features(learner.backbone, data.tasks[2].train)
    torch.testing.assert_close(learner.prototypes.means[6].float(), frozen[labels == 6].mean(0))
    assert backbone().fingerprint == learner.backbone.fingerprint
