"""CaRE: which routers act on an image, what they mix, and how its single pass and its ensemble differ."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from cil.learners.care import CaRE, CaREEnsemble
from cil.testing import Case, parametrize_learner
from cil.testing.setting import backbone, context, probe_images, stream
from cil.tuning.routed import RoutedBank, chosen, entropy

QUICK = {"epochs": 1, "lr": 0.1, "bottleneck": 4, "shared": 4, "dropout": 0, "samples": 16, "alignment_epochs": 1}
LEARNS = {**QUICK, "epochs": 5, "lr": 0.002, "bottleneck": 8, "shared": 8, "alignment_lr": 0.1}


@pytest.mark.slow
@parametrize_learner(
    [
        ("care", LEARNS),
        ("care_ensemble", {**LEARNS, "dropout": 0.1}),
    ]
)
def test_common_checks(case, check):
    check(case)


@lru_cache
def shared(cls: type, **parameters) -> Case:
    """One case for all tests that look at the same run."""
    return Case(cls, {**QUICK, **parameters})


def bank(tasks=3, **arguments) -> RoutedBank:
    """A bank with random parts of 2, 3, … classes, gates open."""
    generator = torch.Generator().manual_seed(0)
    made = RoutedBank(backbone(), 4, 4, 0.0, **arguments)
    for t in range(tasks):
        made.grow(2 + t, generator)
    for name, value in made.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        value.data += noise if "route" in name or "guess" in name else 0.3 * noise
    return made.eval()


def tokens(seed=0):
    return torch.randn(5, 7, 48, generator=torch.Generator().manual_seed(seed))


def by_hand(made: RoutedBank, i: int, x: torch.Tensor, task: int | None, top: int) -> torch.Tensor:
    """Image by image."""
    parts = list(made.parts)[: None if task is None else task + 1]
    out = made.shared(i, x)
    for n in range(len(x)):
        outputs = [part.expert(i, x[n : n + 1])[0] for part in parts]
        h = []
        for part, output in zip(parts, outputs, strict=True):
            p = part.guessed(i, output[:1]).softmax(1)[0]
            h.append(float(-(p * p.log()).sum()))
        order = sorted(range(len(parts)), key=lambda k: h[k])
        if task is not None:
            order = [task, *[k for k in order if k != task]]
        for k in order[:2]:
            scores = F.linear(outputs[k][0], parts[k].route[i], parts[k].route_bias[i])
            best = scores.topk(min(top, k + 1)).indices
            p = scores[best].softmax(0)
            for share, e in zip(p, best.tolist(), strict=True):
                out[n] = out[n] + share * outputs[e]
    return out


def test_closed_gates_leave_the_frozen_features():
    made, images = RoutedBank(backbone(), 4, 4), probe_images()
    for classes in (2, 3):
        made.grow(classes, torch.Generator().manual_seed(0))
        for task in (None, len(made.parts) - 1):
            assert torch.equal(backbone()(images, made.under(task)), backbone()(images))


@pytest.mark.parametrize("task", [None, 0, 1, 2])
@pytest.mark.parametrize("top", [1, 2, 3])
def test_the_surest_tasks_routers_mix_their_best_experts(task, top):
    made, x = bank(top=top), tokens()
    with torch.no_grad():
        found, guesses = made.change(1, x, task)
        torch.testing.assert_close(found, by_hand(made, 1, x, task, top), atol=1e-5, rtol=1e-4)
    assert [guess.shape[1] for guess in guesses] == [2, 3, 4][: 3 if task is None else task + 1]


def test_an_images_routers_do_not_depend_on_its_batch():
    made, x = bank(), tokens()
    with torch.no_grad():
        whole = made.change(0, x, None)[0]
        for n in range(5):
            torch.testing.assert_close(made.change(0, x[n : n + 1], None)[0], whole[n : n + 1], atol=1e-5, rtol=1e-4)


def test_enough_routers_are_all_and_one_expert_has_the_whole_share():
    h = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    assert bool(chosen(h, 3, False).all()) and bool(chosen(h, 9, True).all())
    assert chosen(h, 1, False).int().argmax(1).tolist() == h.argmin(1).tolist()
    assert bool(chosen(h, 2, True)[:, 2].all()) and chosen(h, 2, True).sum(1).tolist() == [2] * 6
    part, u = bank().parts[2], tokens()[:, 0]
    scores = F.linear(u, part.route[0], part.route_bias[0])
    assert torch.equal(part.routed(0, u, 1), F.one_hot(scores.argmax(1), 3).float())
    torch.testing.assert_close(part.routed(0, u, 5), scores.softmax(1))
    assert float(entropy(torch.zeros(1, 4))) == pytest.approx(math.log(4))


def test_with_one_task_the_block_adds_the_shared_adapter_and_the_expert():
    made, x = bank(1), tokens()
    with torch.no_grad():
        expected = made.shared(0, x) + made.parts[0].expert(0, x)
        for task in (None, 0):
            torch.testing.assert_close(made.change(0, x, task)[0], expected)


def test_the_third_expert_starts_as_the_mean_of_the_others():
    made = bank(2)
    made.grow(2, torch.Generator().manual_seed(5))
    first, second, third = (list(part.expert.parameters()) for part in made.parts)
    for a, b, mean in zip(first, second, third, strict=True):
        torch.testing.assert_close(mean, (a + b) / 2)


@pytest.mark.slow
def test_a_later_task_trains_its_own_part_alone():
    one, two = (shared(CaRE).after(n).learner.bank.state_dict() for n in (1, 3))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    part = shared(CaRE).after(3).learner.bank.parts[2]
    assert all(bool(getattr(part, name).any()) for name in ("route", "guess")) and bool(part.expert.gate.any())


@pytest.mark.slow
def test_single_pass_and_ensemble_are_one_model_read_in_two_ways():
    single, ensemble = (shared(cls).finished.learner for cls in (CaRE, CaREEnsemble))
    state = single.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ensemble.state_dict().items())
    images = probe_images()
    with torch.no_grad():
        logits = single.logits(single.features(images))
        views = ensemble.features(images).view(len(images), 4, -1)
        torch.testing.assert_close(views[:, 3], single.features(images))
        p = torch.stack([ensemble.scores(view) for view in views.unbind(1)], 1).softmax(2)
        surest = entropy(p[:, :3].log()).argmin(1)
        expected = p[torch.arange(len(images)), surest] + p[:, 3]
        torch.testing.assert_close(ensemble.logits(ensemble.features(images)), expected)
    torch.testing.assert_close(logits.softmax(1), p[:, 3])
    passes = [shared(cls).finished.rows[-1]["costs"]["test_passes"] for cls in (CaRE, CaREEnsemble)]
    # all 48 images under the last task and any; under the first two tasks only the newest 18
    assert passes == [48, 2 * 48 + 2 * 18]
    first = shared(CaREEnsemble).after(1).learner
    assert len(first.views()) == 1 and len(ensemble.views()) == 4


def test_the_loss_is_cosface_and_half_the_guesses_losses(monkeypatch):
    learner = shared(CaRE, guess_weight=0.5).learner()
    task, seen = stream(learner.backbone).tasks[0], {}
    monkeypatch.setattr("cil.learners.care.fit", lambda loss, groups, data, recipe, ctx: seen.update(loss=loss))
    ctx = context()
    learner.begin(task, ctx)
    rows = learner.train_part(task, ctx)
    for value in learner.bank.parameters():
        value.data += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()))
    images, labels = probe_images()[:4], torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        value, logits = seen["loss"](images, labels)
        routed = learner.bank.under(0)
        final = 20 * rows(learner.backbone(images, routed))
        expected = F.cross_entropy(final, labels)
        for i, guess in enumerate(routed.guesses):
            tau = (1, 1, 2)[i]
            p, q = (final / tau).softmax(1), (guess / tau).softmax(1)
            kl = (p * (p / q).log()).sum(1).mean()
            expected = expected + 0.5 / 3 * 0.5 * (F.cross_entropy(20 * guess, labels) + tau**2 * kl)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(logits, final)
