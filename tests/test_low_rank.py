"""Low-rank updates that are folded, and InfLoRA: its subspaces against numpy, and what old inputs see of a new task."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import pytest
import torch
from test_untrained import READ, make

from cil.errors import BackboneError
from cil.learners.bases.subspaces import grown, new_directions
from cil.learners.inflora import InfLoRA
from cil.learners.loda import LoDA
from cil.learners.registry import build_learner
from cil.merging.statistics import input_grams
from cil.testing import Case, parametrize_learner
from cil.testing.setting import backbone, context, probe_images, stream
from cil.tuning import LowRankBank

LEARNS = {"rank": 4, "epochs": 8, "train_batch_size": 16, "lr": 0.01, "energy": 0.5}


@parametrize_learner([("inflora", LEARNS)])
def test_common_checks(case, check):
    check(case)


@pytest.mark.slow
@parametrize_learner([("inflora", {**LEARNS, "alignment_epochs": 2, "samples": 32})])
def test_common_checks_with_alignment(case, check):
    check(case)


@lru_cache
def shared(**parameters) -> Case:
    return Case(InfLoRA, {**LEARNS, "epochs": 2, **parameters})


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(rank: int, seed: int, width: int = 8) -> torch.Tensor:
    """C of inputs in a random subspace."""
    x = draw(40, rank, seed=seed) @ draw(rank, width, seed=seed + 100)
    return x.T @ x / 40


# --- the tuner


@pytest.mark.parametrize("parts", ["kv", "qkv"])
def test_folding_equals_the_unfolded_sum(parts):
    vit = backbone()
    bank, width = LowRankBank(vit, 3, parts, scales=[0.5, 1.0, 2.0]), vit.model.embed_dim
    images = probe_images()
    with torch.inference_mode():
        torch.testing.assert_close(vit(images, bank), vit(images), atol=0, rtol=0)
    total = 0
    for task in range(3):
        down, up = draw(*bank.down.shape, seed=task).float(), 0.1 * draw(*bank.up.shape, seed=task + 9).float()
        bank.give(down)
        bank.up.data.copy_(up)
        with torch.inference_mode():
            before = vit(images, bank)
            bank.fold()
            torch.testing.assert_close(vit(images, bank), before, atol=1e-5, rtol=1e-4)
        assert not bank.down.requires_grad and bank.up.count_nonzero() == 0
        total = total + up @ (torch.tensor([[0.5], [1.0], [2.0]]) * down)
    for i, update in enumerate(total):
        name = f"blocks.{i}.attn.qkv.weight"
        changed = (bank.weights()[name] - vit.model.get_parameter(name)).detach()
        first = width if parts == "kv" else 0
        torch.testing.assert_close(changed[first:], update, atol=1e-5, rtol=1e-4)
        assert changed[:first].count_nonzero() == 0, "what computes queries does not change"
    bank.reset(torch.Generator().manual_seed(1))
    assert bank.folded.count_nonzero() == 0 and bank.up.count_nonzero() == 0
    assert float(bank.down.abs().max()) <= width**-0.5


def test_chosen_blocks_and_impossible_ranks():
    vit = backbone()
    bank = LowRankBank(vit, 2, blocks=[1])
    assert set(bank.weights()) == {"blocks.1.attn.qkv.weight"} and bank.inputs == ["blocks.1.attn.qkv.weight"]
    for rank in (0, vit.model.embed_dim + 1):
        with pytest.raises(BackboneError, match=rf"rank: got {rank}; this backbone's width is"):
            LowRankBank(vit, rank)


def test_only_chosen_layers_are_observed():
    vit = backbone()
    every = input_grams(vit.model, [probe_images()])
    [name] = chosen = ["blocks.1.attn.qkv.weight"]
    found = input_grams(vit.model, [probe_images()], layers=chosen)
    assert set(found) == {name} and torch.equal(found[name], every[name])


@pytest.mark.parametrize("learner", [{"name": "inflora"}, {"name": "loda", "rank": 4}, {"name": "e2_lora"}])
def test_a_backbone_whose_inputs_cannot_be_seen_is_refused_before_any_training(learner):
    beit = make(*READ["BEiT"])
    with pytest.raises(BackboneError, match=r"^2 of the \d layers .* are read, not called, by this Beit; the first"):
        build_learner(learner, beit)
    assert beit.passes == 0


# --- subspaces


def test_the_first_directions_are_the_leading_eigenvectors():
    gram = moments(6, seed=1)
    found = new_directions(gram, torch.zeros(8, 8), 3)
    _, vectors = np.linalg.eigh(gram.numpy())
    leading = vectors[:, ::-1][:, :3]
    np.testing.assert_allclose((found.T @ found).numpy(), leading @ leading.T, atol=1e-8)


def test_later_directions_are_orthonormal_and_orthogonal_to_what_is_known():
    known = grown(torch.zeros(8, 8, dtype=torch.float64), moments(3, seed=2), 1.0)
    found = new_directions(moments(8, seed=3), known, 4)
    torch.testing.assert_close(found @ found.T, torch.eye(4, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(found @ known, torch.zeros(4, 8, dtype=torch.float64), atol=1e-10, rtol=0)


def test_directions_beyond_the_new_inputs_are_zero():
    old, new = draw(3, 8, seed=4), draw(2, 8, seed=5)
    known = grown(torch.zeros(8, 8, dtype=torch.float64), old.T @ old, 1.0)
    found = new_directions(old.T @ old + new.T @ new, known, 4)
    assert found[:2].norm(dim=1).tolist() == pytest.approx([1, 1]) and found[2:].count_nonzero() == 0
    torch.testing.assert_close(found @ old.T, torch.zeros(4, 3, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("energy", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_the_fewest_directions_that_reach_the_energy(energy):
    start = grown(torch.zeros(8, 8, dtype=torch.float64), moments(2, seed=6), 1.0)
    gram = moments(6, seed=7)
    after = grown(start, gram, energy)
    torch.testing.assert_close(after @ after, after, atol=1e-9, rtol=0)
    torch.testing.assert_close(start @ after, start, atol=1e-9, rtol=0)
    added = round(float(after.trace() - start.trace()))

    def share(count: int) -> float:
        """By numpy: what P with ``count`` more directions keeps of the squared norm."""
        c, p = gram.numpy(), start.numpy()
        u, _, _ = np.linalg.svd(c - p @ c)
        p = p + u[:, :count] @ u[:, :count].T
        return float(np.square(p @ c).sum() / np.square(c).sum())

    assert share(added) >= energy - 1e-9
    assert added == 0 or share(added - 1) < energy


def test_a_share_of_one_takes_all_inputs():
    gram = moments(5, seed=8)
    known = grown(torch.zeros(8, 8, dtype=torch.float64), gram, 1.0)
    torch.testing.assert_close(known @ gram, gram, atol=1e-9, rtol=1e-9)
    assert float(known.trace()) == pytest.approx(5)


# --- the learner


def test_old_inputs_see_nothing_of_a_new_task():
    one, two = (shared().after(n).learner for n in (2, 3))
    moved = two.tuner.folded - one.tuner.folded
    assert float(moved.abs().max()) > 1e-3 and 0 < float(one.known.diagonal(dim1=1, dim2=2).mean()) < 1
    assert float((moved @ one.known).abs().max()) < 1e-5 * float(moved.abs().max())
    assert torch.equal(two.head.weight[:5], one.head.weight), "old rows stay"


def test_a_is_given_before_training_and_its_rows_have_a_third_of_the_energy():
    learner = shared().after(1).learner
    down = learner.tuner.down.double()
    eye = torch.eye(4, dtype=torch.float64).expand(len(down), 4, 4)
    torch.testing.assert_close(down @ down.mT, eye / 3, atol=1e-6, rtol=0)
    fresh = InfLoRA(InfLoRA.Config(**LEARNS), backbone())
    task = stream(fresh.backbone).tasks[0]
    gram = fresh.grams(task, context())
    for i, (c, a) in enumerate(zip(gram, down, strict=True)):
        _, vectors = torch.linalg.eigh(c)
        torch.testing.assert_close(3 * a.T @ a, vectors[:, -4:] @ vectors[:, -4:].T, atol=1e-4, rtol=0, msg=str(i))


def test_with_all_energy_kept_nothing_changes_for_the_first_block_on_images_of_the_first_task():
    """The inputs of the first block do not depend on the tuner, so that they are those P was made of."""
    one, two = (shared(energy=1.0).after(n).learner for n in (1, 3))
    task = stream(one.backbone).tasks[0]
    gram = one.grams(task, context())[0]
    moved = (two.tuner.folded - one.tuner.folded)[0].double()
    values = torch.linalg.eigvalsh(gram)
    assert float((moved @ gram @ moved.T).diagonal().max()) < 1e-8 * float(values.max())


def test_the_energy_rises_by_a_step_per_task_up_to_one():
    seen = []

    class Followed(InfLoRA):
        def remember(self, grams, energy):
            seen.append(energy)
            super().remember(grams, energy)

    rows = Case(Followed, {**LEARNS, "epochs": 1, "energy": 0.7, "energy_step": 0.2}).run().rows
    assert seen == pytest.approx([0.7, 0.9, 1.0])
    # 48, 12 and 25 images: one epoch, and a pass before and one after it
    assert [row["costs"]["train_passes"] for row in rows] == [48 * 3, 12 * 3, 25 * 3]


# --- the alignment of InfLoRA and LoDA


@pytest.mark.parametrize("cls", [InfLoRA, LoDA])
def test_alignment_is_an_option_that_changes_the_predicting_copy_alone(cls):
    quick = {"rank": 4, "epochs": 1, "train_batch_size": 16, "samples": 16}
    plain, one = (Case(cls, {**quick, "alignment_epochs": n}).run(stop_after=2).learner for n in (0, 2))
    assert not any(name.startswith(("aligned", "gaussians")) for name in plain.state_dict()), "as stored before"
    for name, value in plain.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, one.state_dict()[name]), name
    assert not torch.equal(one.aligned.weight, one.head.weight)
    with torch.no_grad():
        features = one.features(probe_images())
        torch.testing.assert_close(one.logits(features), one.aligned(features))
        torch.testing.assert_close(plain.logits(features), one.head(features))


def test_alignment_moves_rows_that_were_never_compared_to_where_the_gaussians_are():
    """Two tasks' rows with a bias that hides the first task, which rows trained apart can have."""
    learner = Case(InfLoRA, {**LEARNS, "alignment_epochs": 20, "alignment_lr": 0.1}).learner()
    labels = torch.arange(5).repeat_interleave(40)
    centres = draw(5, 48, seed=1).float() * 3
    learner.gaussians.partial_fit(centres[labels] + draw(200, 48, seed=2).float(), labels)
    learner.task_of = torch.tensor([0, 0, 0, 0, 1])
    learner.head.grow(5)
    learner.head.weight.data, learner.head.bias.data = 0.02 * centres, torch.tensor([0.0, 0, 0, 0, 30])
    learner.aligned = copy.deepcopy(learner.head)
    assert learner.logits(centres).argmax(1).tolist() == [4] * 5
    learner.align(context(1))
    assert learner.logits(centres).argmax(1).tolist() == list(range(5))
