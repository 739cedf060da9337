"""SD-LoRA: the sum of directions by hand, what a new task changes, and what is trained."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from lessons import taught, teach
from test_low_rank import draw

from cil.errors import BackboneError
from cil.learners.sd_lora import SDLoRA
from cil.testing import Case, parametrize_learner
from cil.testing.setting import backbone, probe_images
from cil.tuning.directions import Directions

LEARNS = {"rank": 4, "epochs": 12, "train_batch_size": 16, "lr": 0.05}


@pytest.mark.slow
@parametrize_learner([("sd_lora", LEARNS), ("sd_lora", {**LEARNS, "keep_lengths": True})])
def test_common_checks(case, check):
    check(case)


@lru_cache
def shared(**parameters) -> Case:
    return Case(SDLoRA, {**LEARNS, "epochs": 2, **parameters})


@pytest.mark.parametrize("keep", [False, True])
def test_the_sum_of_directions_by_hand(keep):
    vit = backbone()
    tuner, width = Directions(vit, 2, 0.5, keep=keep), vit.model.embed_dim
    with torch.no_grad():
        assert torch.equal(vit(probe_images(), tuner), vit(probe_images())), "B is zero"
        factors = []
        for task in range(3):
            if task:
                tuner.next(torch.Generator().manual_seed(task))
            tuner.up.copy_(draw(*tuner.up.shape, seed=task))
            factors.append((tuner.up.clone(), tuner.down.clone()))
        tuner.lengths.copy_(draw(*tuner.lengths.shape, seed=9))
        for i in range(3):
            name = f"blocks.{i}.attn.qkv.weight"
            changed = tuner.weights()[name] - vit.model.get_parameter(name)
            assert changed[width : 2 * width].count_nonzero() == 0, "what computes keys does not change"
            for part, rows in ((0, slice(0, width)), (1, slice(2 * width, None))):
                expected = 0
                for task, (up, down) in enumerate(factors):
                    b, a = up[i, part], down[i, part]
                    norms = b.norm() * a.norm() if task < 2 else 1
                    length = tuner.lengths[task, i, part] if keep else tuner.lengths[task, 0, 0]
                    expected = expected + length * b @ a / norms
                torch.testing.assert_close(changed[rows], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keep", [False, True])
def test_a_new_task_moves_the_weights_only_if_lengths_start_again(keep):
    learner, _ = taught(shared(keep_lengths=keep), 1)
    with torch.no_grad():
        before = learner.features(probe_images())
        learner.tuner.next(torch.Generator().manual_seed(3))
        after = learner.features(probe_images())
    assert learner.tuner.lengths.shape == ((2, 3, 2) if keep else (2, 1, 1))
    if keep:
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    else:
        assert learner.tuner.lengths.flatten().tolist() == pytest.approx([0.8, 0.8])
        assert float((after - before).abs().max()) > 1e-2


def test_old_directions_and_rows_stay_and_all_lengths_are_trained():
    learner, data = taught(shared(), 1)
    a, b, rows = learner.tuner.down.clone(), learner.tuner.up.clone(), learner.head.weight.clone()
    teach(learner, data.tasks[2])
    tuner = learner.tuner
    for kept, factor in ((tuner.downs, a), (tuner.ups, b)):
        torch.testing.assert_close(kept, factor / factor.flatten(2).norm(dim=2)[..., None, None])
        torch.testing.assert_close(kept.flatten(2).norm(dim=2), torch.ones(3, 2))
    assert torch.equal(learner.head.weight[:4], rows)
    assert bool((tuner.lengths - 0.8).abs().min() > 1e-5) and tuner.up.count_nonzero()


def test_a_direction_that_was_not_trained_is_zero():
    tuner = Directions(backbone(), 2)
    tuner.next(torch.Generator().manual_seed(1))
    assert tuner.ups.count_nonzero() == 0 and bool(torch.isfinite(tuner.downs).all())
    with pytest.raises(BackboneError, match="rank must be at least 1, got 0"):
        Directions(backbone(), 0)
