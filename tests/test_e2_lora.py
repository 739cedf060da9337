"""E²-LoRA: the projected form against the factor that it stands for, directions against numpy, and the budget."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from lessons import taught, teach
from test_low_rank import draw, moments

from cil.learners.bases.low_rank import input_moments
from cil.learners.bases.subspaces import output_directions, within_budget
from cil.learners.e2_lora import E2LoRA
from cil.testing import Case, parametrize_learner
from cil.testing.setting import backbone, context, probe_images
from cil.tuning.projected_updates import KeptPairs, ProjectedUpdates

LEARNS = {"epochs": 5, "train_batch_size": 16, "lr": 0.05, "update_lr_factor": 0.2, "samples": 32}


@pytest.mark.slow
@parametrize_learner([("e2_lora", LEARNS), ("e2_lora", {**LEARNS, "first": "product"})])
def test_common_checks(case, check):
    check(case)


@lru_cache
def shared(**parameters) -> Case:
    return Case(E2LoRA, {**LEARNS, "epochs": 2, "milestones": [1], **parameters})


# --- the parts


def test_training_a_factor_outside_kept_directions_is_the_projected_form():
    """50 steps of SGD with momentum and decay, on any orthonormal basis B of the other directions."""
    kept, other = np.linalg.qr(draw(9, 9).numpy())[0][:, :3], np.linalg.qr(draw(9, 9).numpy())[0][:, 3:]
    turn = np.linalg.qr(draw(6, 6, seed=1).numpy())[0]
    pairs = KeptPairs(9, 4).double()
    pairs.basis = torch.from_numpy(kept)
    x, y = draw(20, 4, seed=2), draw(20, 9, seed=3)
    basis, factor = torch.from_numpy(other @ turn), torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    free = torch.zeros(9, 4, dtype=torch.float64, requires_grad=True)
    found = []
    for parameter, update in ((factor, lambda: basis @ factor), (free, lambda: pairs.outside(free))):
        optimizer = torch.optim.SGD([parameter], 0.05, momentum=0.9, weight_decay=0.01)
        for _ in range(50):
            optimizer.zero_grad()
            ((x @ update().T).tanh() - y).square().mean().backward()
            optimizer.step()
        found.append(update().detach())
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)
    assert float(found[1].abs().max()) > 0.1 and float((pairs.basis.T @ found[1]).abs().max()) < 1e-14


def test_directions_are_the_principal_ones_of_what_the_update_writes():
    update, x = draw(9, 6), draw(200, 6, seed=1) + 3
    directions, before = output_directions(update, torch.cov(x.T))
    values, vectors = np.linalg.eigh(np.cov((x @ update.T).numpy().T))
    values, vectors = values[::-1][:6], vectors[:, ::-1][:, :6]
    np.testing.assert_allclose(np.abs((directions.numpy() * vectors).sum(0)), 1, atol=1e-8)
    np.testing.assert_allclose(before, (np.cumsum(values) - values) / values.sum(), atol=1e-10)
    torch.testing.assert_close(directions @ (directions.T @ update), update)


def test_no_direction_comes_from_rounding():
    update = draw(9, 2) @ draw(2, 6, seed=1)
    directions, before = output_directions(update.float(), moments(6, seed=2, width=6))
    assert directions.shape == (9, 2) and len(before) == 2
    nothing = output_directions(0 * update, torch.eye(6)), output_directions(update, torch.zeros(6, 6))
    assert [part.shape[-1] for found in nothing for part in found] == [0] * 4


def test_the_share_that_fits_a_budget_by_hand():
    spectrum = torch.tensor([8.0, 1, 1, 0], dtype=torch.float64)
    before = (spectrum.cumsum(0) - spectrum) / 10
    assert (before <= 0.8).tolist() == [True, True, False, False]  # as many as #(cumsum ≤ θ Σ) + 1
    assert within_budget(before, 4).tolist() == [True, True, True, False], "θ = 0.99999 leaves out what has no energy"
    assert within_budget(before, 2).tolist() == [True, True, False, False]
    two = torch.cat([before, torch.tensor([0, 0.5], dtype=torch.float64)])
    assert within_budget(two, 3).tolist() == [True, False, False, False, True, True], "θ falls below 0.8 for both"
    assert within_budget(torch.zeros(3, dtype=torch.float64), 2).tolist() == [True, True, False]
    assert within_budget(before[:0], 0).tolist() == []


@pytest.mark.parametrize("budget", [4, 7, 12])
def test_the_share_is_the_largest_on_its_grid(budget):
    """Against the loop over θ that it stands for."""
    spectra = [np.sort(draw(6, seed=seed).square().numpy())[::-1] for seed in (1, 2)]
    before = torch.cat([torch.from_numpy((np.cumsum(e) - e) / e.sum()) for e in spectra])

    def ranks(step: int) -> list[int]:
        return [int((np.cumsum(e) <= (99_999 - step) / 1e5 * e.sum()).sum()) + 1 for e in spectra]

    step = 0
    while sum(ranks(step)) > budget:
        step += 1
    kept = within_budget(before, budget)
    assert [int(part.sum()) for part in kept.split(6)] == ranks(step) and sum(ranks(step)) <= budget


def test_a_product_starts_at_zero_and_a_fold_keeps_the_weights():
    vit, layers = backbone(), ["blocks.0.attn.qkv.weight", "blocks.2.mlp.fc1.weight"]
    for generator in (None, torch.Generator().manual_seed(1)):
        tuner = ProjectedUpdates(vit, layers)
        parameters = tuner.start(generator)
        with torch.no_grad():
            assert torch.equal(vit(probe_images(), tuner), vit(probe_images()))
            for p in parameters:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
            before = {name: value.clone() for name, value in tuner.weights().items()}
            updates = tuner.fold()
        assert [u.shape for u in updates] == [vit.model.get_parameter(name).shape for name in layers]
        for name, value in tuner.weights().items():
            torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)
            assert not torch.equal(value, vit.model.get_parameter(name))


def test_a_fresh_final_norm():
    tuner = ProjectedUpdates(backbone(), [], fresh_norm=True)
    with torch.no_grad():
        features = backbone()(probe_images(), tuner)
    torch.testing.assert_close(features.mean(1), torch.zeros(48), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std(1, correction=0), torch.ones(48), atol=1e-3, rtol=0)


# --- the learner


def test_kept_directions_of_all_tasks_are_orthonormal_and_a_new_update_leaves_them_alone():
    learner, data = taught(shared(), 2)
    learner.make_room(2)
    kept = [(p.basis.clone(), p.folded.clone(), p.tasks.bincount(minlength=2)) for p in learner.tuner.kept]
    teach(learner, data.tasks[2])
    for (basis, folded, _), pairs in zip(kept, learner.tuner.kept, strict=True):
        assert 0 < basis.shape[1] <= len(folded) * 2 // 3
        eye = torch.eye(pairs.basis.shape[1])
        torch.testing.assert_close(pairs.basis.T @ pairs.basis, eye, atol=1e-5, rtol=0)
        moved = pairs.folded - folded
        assert float(moved.abs().max()) > 1e-4
        assert float((basis.T @ moved).abs().max()) < 1e-5 * float(moved.abs().max()) + 1e-6
        torch.testing.assert_close(pairs.basis @ pairs.rows, pairs.folded, atol=1e-5, rtol=1e-3)
    learner.make_room(3)
    for (_, _, counts), pairs in zip(kept, learner.tuner.kept, strict=True):
        assert bool((pairs.tasks.bincount(minlength=2)[:2] <= counts).all()), "no task gets directions back"


def test_the_budget_holds_when_tasks_compete_for_it():
    learner, _ = taught(shared(), 3)
    for pairs in learner.tuner.kept:  # as if the layer had 40 outputs, of which three tasks may keep 30
        kept = within_budget(pairs.before, 30)
        assert 25 < int(kept.sum()) <= 30 and {0, 2} <= set(pairs.tasks[kept].tolist())


def test_directions_are_in_order_of_their_energy_on_the_tasks_images():
    learner, data = taught(shared(first="product"), 1)
    covariances = input_moments(learner, learner.tuner.layers, data.tasks[0], context(), centred=True)
    for pairs, name in zip(learner.tuner.kept, learner.tuner.layers, strict=True):
        energy = (pairs.rows.double() @ covariances[name] @ pairs.rows.double().T).diagonal()
        assert bool((energy.diff() <= 1e-6 * energy[0]).all())
        torch.testing.assert_close((energy.cumsum(0) - energy) / energy.sum(), pairs.before, atol=1e-5, rtol=0)


def test_student_and_teacher_agree_at_the_start_of_a_task():
    learner, data = taught(shared(), 1)
    images, labels = next(iter(data.tasks[2].train.batches(8)))
    learner.make_room(1)
    updates = learner.tuner.start()
    loss = learner.with_teacher(lambda features, labels: (features.sum() * 0, features))
    assert loss(images, labels)[0].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        updates[0] += 0.1 * torch.randn(updates[0].shape, generator=torch.Generator().manual_seed(1))
    value = loss(images, labels)[0]
    assert value.item() > 1e-4
    learner.tuner._current = []
    with torch.no_grad():
        old = (learner.head(learner.tuned(images)) / 2).softmax(1).double().numpy()
    learner.tuner._current = [(u,) for u in updates]
    with torch.no_grad():
        now = (learner.head(learner.tuned(images)) / 2).softmax(1).double().numpy()
    assert value.item() == pytest.approx(0.25 * 4 * (old * np.log(old / now)).sum() / 8, rel=1e-3)


def test_old_rows_stay_without_alignment_and_gaussians_are_not_moved():
    learner, data = taught(shared(alignment_epochs=0), 1)
    rows, sums = learner.head.weight.clone(), learner.gaussians.sums.clone()
    teach(learner, data.tasks[2])
    assert torch.equal(learner.head.weight[:4], rows) and torch.equal(learner.gaussians.sums[:4], sums)
