"""MIN: one affine map per block stands for all tasks' maps, and new maps learn what the ridge regression gets wrong."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from marks import slow_beyond
from torch.func import functional_call

from cil.learners.min import MIN
from cil.testing import Case, parametrize_learner
from cil.testing.setting import SIZES, backbone, context, probe_images, stream
from cil.tuning.residual_maps import TWINS, ResidualMaps

QUICK = {"width": 8, "epochs": 2, "passes": 1, "projection": 60, "lr": 0.05, "train_batch_size": 16, "strength": 0.1}


@parametrize_learner([("min", QUICK)])
def test_common_checks(case, check):
    check(case)


@pytest.mark.slow
@parametrize_learner(
    [
        ("min", {**QUICK, "mixture": "similarity", "passes": 2}),
        ("min", {**QUICK, "maps": False}),
        ("min", {**QUICK, "first": False, "residual": False}),
        ("min", {**QUICK, "first": False, "maps": False}),
    ]
)
def test_common_checks_of_variants(case, check):
    check(case)


@lru_cache
def shared(**parameters) -> Case:
    """One case for all tests that look at the same run."""
    return Case(MIN, {**QUICK, **parameters})


def started(**parameters) -> MIN:
    """A learner after the first task, and at the beginning of the second."""
    learner = shared(**parameters).learner()
    for task in stream(learner.backbone).tasks[:2]:
        ctx = context()
        learner.begin(task, ctx)
        if task.index == 0:
            learner.learn(task, ctx)
    return learner


class ByHand(torch.nn.Module):
    """timm's own forward pass, with P and the given maps [L, k + 1, k] after every block."""

    def __init__(self, tuner: ResidualMaps, maps: torch.Tensor):
        super().__init__()
        self.vit, self.tuner, self.maps = backbone().model, tuner, maps

    def forward(self, images):
        x = self.vit.norm_pre(self.vit.patch_drop(self.vit._pos_embed(self.vit.patch_embed(images))))
        for i, block in enumerate(self.vit.blocks):
            x = block(x)
            p, m = self.tuner.general[i], TWINS * self.maps[i]
            x = x + x @ p[:-1] + p[-1] + (x @ self.tuner.down[i] @ m[:-1] + m[-1]) @ self.tuner.up[i]
        return self.vit.forward_head(self.vit.norm(x), pre_logits=True)


def test_maps_and_p_at_zero_leave_the_frozen_features():
    vit, images = backbone(), probe_images()
    for first in (True, False):
        assert torch.equal(vit(images, ResidualMaps(vit, 8, first=first)), vit(images))


@pytest.mark.parametrize("mixture", slow_beyond(["mean"], ["mean", "similarity"]))
def test_one_map_per_block_is_the_weighted_sum_of_all_tasks_maps(mixture):
    case = shared() if mixture == "mean" else shared(mixture=mixture)  # the default, and one case with other tests
    learners = [case.after(n).learner for n in range(1, len(SIZES) + 1)]
    maps = torch.stack([learner.tuner.newest.detach() for learner in learners])
    assert all(bool(one.any()) for one in maps)  # also those of task 1, which MIN's code leaves at zero
    last = learners[-1]
    if mixture == "mean":
        weights = torch.full((3,), 1 / 3)
        torch.testing.assert_close(last.archive, maps.sum(0, keepdim=True))
    else:
        p = last.prototypes
        weights = torch.exp(torch.stack([F.cosine_similarity(p[2], one, dim=0) / 2 for one in p]))
        weights /= weights.sum()
        assert torch.equal(last.archive, maps) and len(weights.unique()) == 3
    images, hand = probe_images(), ByHand(last.tuner, torch.einsum("t,tlij->lij", weights, maps))
    norms = {f"vit.{name}": value for name, value in last.tuner.weights().items()}
    with torch.no_grad():
        expected = functional_call(hand, norms, (images,))
        torch.testing.assert_close(last.features(images), expected, atol=1e-4, rtol=1e-4)


def test_equal_tasks_have_equal_weights():
    learner = started(mixture="similarity")
    task = stream(learner.backbone).tasks[0]
    for _ in range(3):
        learner.begin_map(task, context())
        assert float(learner.tuner.share) == pytest.approx(1 / len(learner.prototypes))
        learner.archive = torch.cat([learner.archive, learner.archive[:1]])
    assert len(learner.prototypes) == 4


def test_one_map_with_the_factor_is_the_sum_of_two_equal_ones():
    """MIN's μ and σ, trained by SGD with momentum and weight decay."""
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x @ torch.ones(4, 4, dtype=torch.float64)
    pair = [torch.zeros(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    [one] = [torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)]
    for trained, map_of in ((pair, lambda: pair[0] + pair[1]), ([one], lambda: TWINS * one)):
        optimizer = torch.optim.SGD(trained, 0.05, momentum=0.9, weight_decay=0.1)
        for _ in range(30):
            optimizer.zero_grad()
            (x @ map_of() - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(TWINS * one, pair[0] + pair[1])
    assert torch.equal(*pair) and float(one.detach().abs().min()) > 0.1


@pytest.mark.parametrize("residual", [True, False])
def test_a_new_head_starts_at_the_loss_of_the_ridge_regression(residual):
    learner = started(residual=residual)
    images, labels = probe_images()[:6], torch.tensor([0, 1, 2, 3, 0, 1])
    loss, logits = learner.residual_loss(torch.zeros(5, 60))(images, labels)
    scores = learner.logits(learner.features(images))
    assert bool(scores[:, 4].isneginf().all())  # the second task has not been added yet; the loss takes 0 for it
    expected = scores.masked_fill(scores.isneginf(), 0) if residual else torch.zeros(6, 5)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(expected, labels), atol=1e-5, rtol=1e-5)


def test_the_ridge_regression_knows_new_classes_before_their_map_is_trained():
    """Sums of the second task: one augmented pass with the old network, one clean pass with the new one."""
    learner = shared().finished.learner
    assert learner.classifier.counts.tolist() == [24] * 5 + [2, 24, 24]


def test_switches():
    frozen = shared(first=False, maps=False).finished.learner
    images = probe_images()
    with torch.no_grad():
        assert torch.equal(frozen.features(images), frozen.backbone(images))
    once = [shared(maps=False).after(n).learner for n in (1, 3)]
    assert not bool(once[0].tuner.newest.any()) and len(once[1].archive) == 0
    with torch.no_grad():
        assert torch.equal(*[learner.features(images) for learner in once])
        assert not torch.equal(once[0].features(images), frozen.features(images))
    later = [shared().after(n).learner.tuner.state_dict() for n in (1, 2)]
    changed = {name for name in later[0] if not torch.equal(later[0][name], later[1][name])}
    assert changed == {"newest", "past", "share"}  # P and the norms stay
