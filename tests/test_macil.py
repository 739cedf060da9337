"""MACIL: its two losses and its metric against numpy, the update that is folded per task, and what the losses hold."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lessons import taught, teach
from test_ssiat import draw, images_of

from cil.errors import ConfigError
from cil.learners import macil
from cil.learners.bases.steering import distance_change, patch_change
from cil.learners.macil import MACIL
from cil.learners.registry import build_learner
from cil.testing import Case, parametrize_learner
from cil.testing.setting import backbone, probe_images
from cil.tuning import LowRankBank
from cil.tuning.passes import Tokens

QUICK = {"rank": 4, "first_epochs": 3, "epochs": 3, "samples": 16, "alignment_epochs": 2, "alignment_lr": 0.1}
LEARNS = {**QUICK, "first_epochs": 8}


@pytest.mark.slow
@parametrize_learner([("macil", LEARNS)])
def test_common_checks(case, check):
    check(case)


@lru_cache
def shared(**parameters) -> Case:
    return Case(MACIL, {**QUICK, **parameters})


def test_the_change_of_distances_by_numpy():
    new, old, labels = draw(6, 5), draw(6, 5, seed=1), torch.tensor([0, 1, 0, 2, 1, 0])
    whitening = draw(3, 5, 5, seed=2)

    def distance(x: torch.Tensor, i: int, j: int) -> float:
        a, b = (x[k].numpy() / np.linalg.norm(x[k].numpy()) for k in (i, j))
        metric = whitening[labels[i]].numpy().T @ whitening[labels[i]].numpy()
        return math.sqrt((a - b) @ metric @ (a - b))

    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6) if labels[i] == labels[j]]
    assert len(pairs) == 4
    expected = sum(abs(distance(new, i, j) - distance(old, i, j)) for i, j in pairs) / 6
    assert distance_change(new, old, labels, whitening).item() == pytest.approx(expected)
    assert distance_change(3 * new, old / 7, labels, whitening).item() == pytest.approx(expected)
    assert distance_change(new[:2], old[:2], labels[:2], whitening) == 0, "no pair"
    with torch.autocast("cpu", torch.bfloat16):
        mixed = distance_change(new.float(), old.float(), labels, whitening.float())
    assert mixed.item() == pytest.approx(expected, rel=1e-4), "bfloat16 has two digits"


def test_the_change_of_patches_by_numpy():
    new, old, classes = draw(2, 3, 5).float(), draw(2, 3, 5, seed=1).float(), draw(2, 5, seed=2).float()
    total = 0.0
    for i in range(2):
        for j in range(3):
            p, q, c = (x / np.linalg.norm(x) for x in (new[i, j].numpy(), old[i, j].numpy(), classes[i].numpy()))
            total += (1 - (1 - math.acos(p @ c) / math.pi)) * np.linalg.norm(p - q)
    assert patch_change(new, old, classes).item() == pytest.approx(total / 6, rel=1e-5)
    trained = classes.requires_grad_()
    value = patch_change(new.requires_grad_(), old, trained)
    assert torch.autograd.grad(value, trained, allow_unused=True)[0] is None, "the angles are constants"


def test_unchanged_features_cost_nothing_and_have_no_gradient():
    x = draw(4, 5).requires_grad_()
    value = distance_change(x, x.detach(), torch.zeros(4, dtype=torch.int64), draw(1, 5, 5, seed=2))
    tokens = draw(2, 3, 5).float().requires_grad_()
    value = value + patch_change(tokens, tokens.detach(), draw(2, 5).float())
    slopes = torch.autograd.grad(value, [x, tokens])
    assert value == 0 and all(slope.count_nonzero() == 0 for slope in slopes)


def test_the_metric_is_the_shrunk_covariance_of_the_old_features():
    learner = MACIL(MACIL.Config(**QUICK), backbone())
    x, labels = draw(12, 48).float(), torch.tensor([4, 5, 6] * 4)
    found = learner.whitening(x, labels, 4).double().numpy()
    for c in range(3):
        cov = np.cov(x[labels == c + 4].double().numpy().T)
        off = cov[~np.eye(48, dtype=bool)].mean()
        one = np.eye(48)
        metric = cov + (10 * np.diag(cov).mean() + 1e-3) * one + 10 * off * (1 - one)
        np.testing.assert_allclose(found[c] @ metric @ found[c].T, one, atol=1e-4)


def test_tokens_pool_to_the_features():
    vit = backbone()
    bank = LowRankBank(vit, 3)
    bank.up.data.copy_(draw(*bank.up.shape))
    with torch.inference_mode():
        tokens = vit(probe_images(), Tokens(bank))
        assert tokens.shape[1:] == (17, 48)
        assert torch.equal(vit.model.forward_head(tokens, pre_logits=True), vit(probe_images(), bank))


def test_every_task_has_an_update_of_its_own_that_is_folded():
    learner, data = taught(shared(alignment_epochs=1, samples=4), 1)
    one, down = learner.tuner.folded.clone(), learner.tuner.down.clone()
    assert learner.tuner.up.count_nonzero() == 0
    teach(learner, data.tasks[1])  # has one class, which needs no training
    teach(learner, data.tasks[2])
    assert not torch.equal(learner.tuner.down, down)
    ranks = torch.linalg.matrix_rank(torch.stack([one, learner.tuner.folded]), rtol=1e-4)
    assert ranks[0].tolist() == [4, 4, 4] and ranks[1].tolist() == [8, 8, 8]
    assert {key.split(".")[0] for key in learner.state_dict()} == {"tuner", "head", "gaussians", "task_of"}


def test_the_loss_of_later_tasks_by_hand(monkeypatch):
    weights = {"distance_weight": 2.0, "patch_weight": 0.7, "margin": 0.1}
    learner, data = taught(shared(**weights, first_epochs=1, epochs=1, alignment_epochs=0), 2)
    images, labels, tokens = images_of(2), torch.tensor([5] + [6] * 12 + [7] * 12), Tokens(learner.tuner)
    with torch.inference_mode():
        old = learner.backbone(images, tokens)
    found = []

    def look(loss, groups, *rest, batch_loss):
        learner.tuner.up.data += 0.05 * draw(*learner.tuner.up.shape, seed=3).float()
        found.append((loss(images, labels)[0].item(), batch_loss, groups[0].parameters[-1].detach()))

    monkeypatch.setattr(macil, "fit", look)
    teach(learner, data.tasks[2])
    [(value, batch_loss, rows)] = found
    with torch.inference_mode():
        new = learner.backbone(images, tokens)
        cosines = F.normalize(new[:, 0], dim=1) @ F.normalize(rows, dim=1).T
        expected = F.cross_entropy(20 * (cosines - 0.1 * F.one_hot(labels - 5)), labels - 5)
        metric = learner.whitening(old[:, 0], labels, 5)
        distances = distance_change(new[:, 0], old[:, 0], labels - 5, metric)
        patches = patch_change(new[:, 1:], old[:, 1:], new[:, 0])
    assert float(distances) > 1e-3 and float(patches) > 1e-3 and batch_loss
    assert value == pytest.approx(float(expected + 2 * distances + 0.7 * patches), rel=1e-4)


@pytest.mark.slow
def test_the_losses_hold_patches():
    changes = {}
    for weight in (0.0, 20.0):
        weights = {"distance_weight": 0, "patch_weight": weight, "lr": 0.02}
        learner, data = taught(shared(**weights, alignment_epochs=0), 2)
        tokens = Tokens(learner.tuner)
        with torch.inference_mode():
            old = learner.backbone(images_of(2), tokens)
        teach(learner, data.tasks[2])
        with torch.inference_mode():
            new = learner.backbone(images_of(2), tokens)
        changes[weight] = float(patch_change(new[:, 1:], old[:, 1:], new[:, 0]))
    assert 0 < changes[20.0] < 0.7 * changes[0.0]


def test_micro_batches_would_separate_pairs():
    with pytest.raises(ConfigError, match=r"micro_batch_size: 4; distance_weight compares all images of a step"):
        build_learner({"name": "macil", "micro_batch_size": 4}, backbone())
    build_learner({"name": "macil", "micro_batch_size": 4, "distance_weight": 0}, backbone())
