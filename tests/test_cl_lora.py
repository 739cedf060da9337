"""CL-LoRA: its updates by hand, the first blocks that run once, the weighted distillation, and its diagonal scores."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lessons import taught, teach
from test_low_rank import draw

from cil.classifiers import CosineHead
from cil.errors import BackboneError, ConfigError
from cil.learners.cl_lora import CLLoRA
from cil.learners.registry import build_learner
from cil.testing import Case, parametrize_learner
from cil.testing.setting import backbone, probe_images
from cil.tuning.passes import Branches, FirstBlocks
from cil.tuning.query_value import QueryValueLora

LEARNS = {"rank": 4, "epochs": 6, "train_batch_size": 16, "lr": 0.05}


@pytest.mark.slow
@parametrize_learner([("cl_lora", LEARNS)])
def test_common_checks(case, check):
    check(case)


@lru_cache
def shared(**parameters) -> Case:
    return Case(CLLoRA, {**LEARNS, "epochs": 1, **parameters})


def filled(vit, blocks, seed: int) -> QueryValueLora:
    pair = QueryValueLora(vit, 3, blocks, lengths=True)
    pair.reset(torch.Generator().manual_seed(seed))
    pair.up.data.copy_(0.3 * draw(*pair.up.shape, seed=seed))
    return pair


# --- the tuners


def test_the_update_by_hand():
    vit = backbone()
    width = vit.model.embed_dim
    pair = QueryValueLora(vit, 3, [1, 2], lengths=True)
    torch.testing.assert_close(pair.down @ pair.down.mT, torch.eye(3).expand(2, 2, 3, 3), atol=1e-6, rtol=0)
    assert bool(((pair.lengths >= 0.5) & (pair.lengths <= 1.5)).all()) and len(pair.lengths.unique()) == 4
    with torch.inference_mode():
        assert torch.equal(vit(probe_images(), pair), vit(probe_images())), "B is zero"
    pair = filled(vit, [1, 2], 1)
    found = pair.weights()
    assert set(found) == {"blocks.1.attn.qkv.weight", "blocks.2.attn.qkv.weight"}
    for i, name in enumerate(found):
        changed = (found[name] - vit.model.get_parameter(name)).detach()
        for part, rows in ((0, slice(0, width)), (1, slice(2 * width, None))):
            expected = pair.lengths[i, part] * pair.up[i, part] @ pair.down[i, part]
            torch.testing.assert_close(changed[rows], expected.detach(), atol=1e-5, rtol=1e-4)
        assert changed[width : 2 * width].count_nonzero() == 0, "what computes keys does not change"
    with pytest.raises(BackboneError, match="rank: got 0; this backbone's width is 48"):
        QueryValueLora(vit, 0)


def test_branches_with_common_first_blocks_are_whole_passes():
    vit = backbone()
    first, own = filled(vit, [0], 1), [filled(vit, [1, 2], seed) for seed in (2, 3)]

    class Both(QueryValueLora):
        def weights(self):
            return {**first.weights(), **super().weights()}

    with torch.inference_mode():
        found = vit(probe_images(), Branches(first, own, 1)).split(vit.feature_dim, 1)
        for branch, features in zip(own, found, strict=True):
            whole = Both(vit, 3, [1, 2], lengths=True)
            whole.load_state_dict(branch.state_dict())
            torch.testing.assert_close(features, vit(probe_images(), whole), atol=1e-6, rtol=1e-5)
    assert float((found[0] - found[1]).abs().max()) > 1e-2


def test_first_blocks_are_a_shorter_vit():
    vit = backbone()
    first = filled(vit, [0, 1], 1)
    shorter = copy.deepcopy(vit.model)
    shorter.load_state_dict({**shorter.state_dict(), **first.weights()})
    shorter.blocks = shorter.blocks[:2]
    with torch.inference_mode():
        expected = shorter.forward_head(shorter.forward_features(probe_images()), pre_logits=True)
        torch.testing.assert_close(vit(probe_images(), FirstBlocks(first, 2)), expected, atol=1e-6, rtol=1e-5)


def test_factors_weight_the_gradient_and_not_the_value():
    vit = backbone()
    pair, factors = filled(vit, [0], 4), torch.rand(1, 2, 48, generator=torch.Generator().manual_seed(5))

    def slope() -> tuple[torch.Tensor, torch.Tensor]:
        value = vit(probe_images(), pair).square().sum()
        return value, torch.autograd.grad(value, pair.up)[0]

    value, plain = slope()
    pair.gradient_factors = factors
    same, weighted = slope()
    torch.testing.assert_close(same, value, atol=0, rtol=1e-6)
    torch.testing.assert_close(weighted, factors[..., None] * plain, atol=1e-4, rtol=1e-4)


# --- the learner


def test_a_class_is_scored_under_its_own_tasks_updates():
    learner = shared().after(3).learner
    with torch.inference_mode():
        features = learner.features(probe_images())
        scores = learner.logits(features).numpy()
    views = features.numpy().reshape(len(features), 3, -1)
    for c, task in enumerate([0] * 4 + [1] + [2] * 3):
        f, p = views[:, task], learner.prototypes.means[c].numpy()
        expected = f @ p / np.linalg.norm(f, axis=1) / np.linalg.norm(p)
        np.testing.assert_allclose(scores[:, c], expected, atol=1e-5)


def test_with_equal_views_it_is_the_nearest_class_mean():
    learner = shared().after(3).learner
    f = draw(5, learner.backbone.feature_dim).float()
    torch.testing.assert_close(learner.logits(f.repeat(1, 3)), learner.prototypes.logits(f), atol=0, rtol=0)


def test_old_updates_and_the_shared_projection_stay_and_the_rest_is_trained():
    learner, data = taught(shared(), 1)
    kept = [p.clone() for p in learner.own[0].parameters()] + [learner.shared.down.clone()]
    up = learner.shared.up.clone()
    torch.testing.assert_close(kept[-1] @ kept[-1].mT, torch.eye(4).expand(1, 2, 4, 4), atol=1e-5, rtol=0)
    for task in data.tasks[1:]:
        teach(learner, task)
    now = [*learner.own[0].parameters(), learner.shared.down]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    assert not torch.equal(up, learner.shared.up) and bool((learner.shared.lengths == 1).all())
    fresh = CLLoRA(CLLoRA.Config(**LEARNS), backbone()).own[0]
    assert all(not torch.equal(p, q) for p, q in zip(learner.own[2].parameters(), fresh.parameters(), strict=True))


def test_the_loss_of_later_tasks_by_hand():
    learner, _ = taught(shared(), 1)
    with torch.no_grad():
        learner.stages = 2
        learner.own.append(learner.fresh())
        learner.own[1].reset(torch.Generator().manual_seed(1))
    rows = CosineHead(learner.backbone.feature_dim).extend(CosineHead(learner.backbone.feature_dim))
    rows.grow(3)
    images = probe_images()
    loss = learner.keeping(lambda images, labels: (torch.zeros(()), torch.zeros(len(images), 3)), rows)
    old = learner.shared.up.detach().clone()
    learner.shared.up.data += 0.2 * draw(*old.shape, seed=8).float()
    learner.shared.up.requires_grad_()
    value, _ = loss(images, torch.zeros(len(images), dtype=torch.int64))

    def scores(up: torch.Tensor) -> torch.Tensor:
        kept, learner.shared.up.data = learner.shared.up.data, up.clone()
        found = rows(learner.backbone(images, FirstBlocks(learner.shared, 1))) / 2
        learner.shared.up.data = kept
        return found

    now, before = scores(learner.shared.up.data), scores(old).detach()
    distilled = -(before.softmax(1) * now.log_softmax(1)).sum(1).mean()
    a, b = (own.lengths.detach().flatten().double() for own in learner.own)
    overlap = abs(float(a @ b / a.norm() / b.norm()))
    assert value.item() == pytest.approx(5 * distilled.item() + 1e-4 * overlap, rel=1e-5)
    slope = torch.autograd.grad(value, learner.shared.up, retain_graph=True)[0]
    plain = torch.autograd.grad(5 * distilled, learner.shared.up)[0]
    weights = old.norm(dim=3) * old.shape[2] / old.norm(dim=3).sum(2, keepdim=True)
    torch.testing.assert_close(weights.mean(2), torch.ones(1, 2))
    torch.testing.assert_close(slope, weights[..., None] * plain, atol=1e-6, rtol=1e-3)


@pytest.mark.slow
def test_distillation_holds_the_first_blocks():
    changes = {}
    for weight in (0.0, 50.0):
        learner, data = taught(shared(distillation=weight), 2)

        def early(learner=learner) -> torch.Tensor:
            with torch.inference_mode():
                return F.normalize(learner.backbone(probe_images(), FirstBlocks(learner.shared, 1)), dim=1)

        old = early()
        teach(learner, data.tasks[2])
        changes[weight] = float((early() - old).norm())
    assert 0 < changes[50.0] < changes[0.0]


def test_first_blocks_are_counted_once():
    learner = shared().after(3).learner
    learner.backbone.passes = 0
    with torch.inference_mode():
        learner.features(probe_images()[:2])
    assert learner.backbone.passes == 2 + 3, "2 images: a third, and three times two thirds, rounded up"


def test_some_blocks_must_be_left():
    for count in (3, 9):
        with pytest.raises(ConfigError, match=rf"shared_blocks: got {count}, this backbone has 3 blocks"):
            build_learner({"name": "cl_lora", "shared_blocks": count}, backbone())
    assert build_learner({"name": "cl_lora", "shared_blocks": 2}, backbone()).own[0].down.shape[0] == 1
