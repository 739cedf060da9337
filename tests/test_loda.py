"""LoDA: its subspaces, its look-ahead and its compromise against numpy and scipy, and what is folded."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import scipy.linalg
import torch
from test_low_rank import draw, moments

from cil.learners.bases.subspaces import compromise, isolated_directions, shared_directions
from cil.learners.loda import LoDA
from cil.testing import Case, parametrize_learner
from cil.testing.setting import backbone, context, probe_images, stream

LEARNS = {"rank": 4, "epochs": 8, "train_batch_size": 16, "lr": 0.005}


@pytest.mark.slow
@parametrize_learner([("loda", LEARNS)])
def test_common_checks(case, check):
    check(case)


@lru_cache
def shared(**parameters) -> Case:
    return Case(LoDA, {**LEARNS, "epochs": 2, **parameters})


def test_shared_directions_are_the_leading_eigenvectors_of_the_sum():
    gram, past = moments(8, seed=1), moments(8, seed=2)
    found = shared_directions(gram, past, 3).numpy()
    leading = np.linalg.eigh((gram + past).numpy())[1][:, ::-1][:, :3]
    np.testing.assert_allclose(found.T @ found, leading @ leading.T, atol=1e-9)
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-12)


def test_isolated_directions_solve_the_generalised_eigenproblem():
    gram, past = moments(8, seed=3), moments(8, seed=4)
    values, vectors = scipy.linalg.eigh(gram.numpy(), past.numpy())
    leading = np.linalg.qr(vectors[:, ::-1][:, :3])[0]
    found = isolated_directions(gram, past, 3).numpy()
    np.testing.assert_allclose(found.T @ found, leading @ leading.T, atol=1e-7)
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-12)
    one = isolated_directions(gram, past, 1)[0].numpy()
    assert (one @ gram.numpy() @ one) / (one @ past.numpy() @ one) == pytest.approx(values[-1])
    only_new = isolated_directions(gram, moments(5, seed=5), 3)
    assert float((only_new @ moments(5, seed=5) @ only_new.T).diagonal().max()) < 1e-6, "P is singular there"


def test_the_compromise_minimises_the_two_energies():
    a, gram, past = draw(4, 8), moments(8, seed=6), moments(8, seed=7)
    found = compromise(a, gram, past, 3.0)
    for factor, row in zip(found.tolist(), a, strict=True):
        old, new = float(row @ past @ row), float(row @ gram @ row)
        grid = np.linspace(0, 1, 100_001)
        assert factor == pytest.approx(grid[np.argmin(old * grid**2 + 3 * new * (1 - grid) ** 2)], abs=2e-5)
    assert compromise(a, gram, 0 * past, 3.0).tolist() == pytest.approx([1] * 4)
    assert compromise(a, 0 * gram, past, 3.0).count_nonzero() == 0
    assert compromise(a, 0 * gram, 0 * past, 3.0).tolist() == [1] * 4


def test_first_task_trains_a_and_later_tasks_train_b_alone():
    one, two = (shared().after(n).learner for n in (1, 3))
    assert one.tuner.down[:, 4:].count_nonzero() == 0, "the first task has no isolated subspace"
    start = LoDA(LoDA.Config(**LEARNS), backbone())
    start.choose(start.grams(stream(start.backbone).tasks[0], context()), first=True)
    assert not torch.equal(start.tuner.down[:, :4], one.tuner.down[:, :4])
    down = two.tuner.down.double()
    eye = torch.eye(4, dtype=torch.float64).expand(len(down), 4, 4) / 3
    for half in (down[:, :4], down[:, 4:]):
        torch.testing.assert_close(half @ half.mT, eye, atol=1e-6, rtol=0)
    assert torch.equal(two.head.weight[:4], one.head.weight), "old rows stay"
    assert two.tuner.up.count_nonzero() == 0 and two.tuner.ahead is None


def test_folding_the_first_task_changes_no_feature_and_p_counts_twice():
    seen = {}

    class Followed(LoDA):
        def recalibrate(self, grams):
            seen.setdefault("before", self.backbone(probe_images(), self.tuner).detach())
            super().recalibrate(grams)

    learner = Case(Followed, {**LEARNS, "epochs": 2}).run(stop_after=1).learner
    with torch.inference_mode():
        torch.testing.assert_close(learner.features(probe_images()), seen["before"], atol=1e-5, rtol=1e-4)
    gram = learner.grams(stream(learner.backbone).tasks[0], context())
    torch.testing.assert_close(learner.past.double(), 2 * gram, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_the_look_ahead_by_two_gradients(first):
    """Against weights that are moved by hand, with a loss of two numbers."""
    learner = LoDA(LoDA.Config(**LEARNS, radius=0.7), backbone())
    tuner = learner.tuner
    torch.nn.init.normal_(tuner.up, generator=torch.Generator().manual_seed(1))
    tuner.down.requires_grad_(first)
    parameters = [p for p in tuner.parameters() if p.requires_grad]
    weights = {c: 0.1 * draw(*tuner.folded.shape, seed=c).float() for c in (0, 1)}

    def plain(images, labels):
        update = torch.stack([torch.cat(list({"w": w}.values())) for w in tuner.weights().values()])
        return (weights[int(labels[0])] * update).sum().square(), torch.zeros(len(labels), 2)

    value = learner.ahead(plain, parameters, context())(torch.zeros(4, 3), torch.tensor([0, 1, 1, 0]))[0]
    gradients = torch.autograd.grad(value, parameters)
    generator = context().generator
    drawn = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    length = 0.7 * float(torch.rand((), generator=drawn))
    expected, total = [torch.zeros_like(p) for p in parameters], 0.0
    for here, there in ((0, 1), (1, 0)):
        before = [p.detach().clone() for p in parameters]
        slopes = torch.autograd.grad(plain(None, torch.tensor([here]))[0], parameters)
        with torch.no_grad():
            for p, g in zip(parameters, slopes, strict=True):
                for block, slope in zip(p, g, strict=True):
                    halves = (slice(0, 4), slice(4, 8)) if p is tuner.down else (np.s_[:, :4], np.s_[:, 4:])
                    for half in halves:
                        block[half] -= length * slope[half] / slope[half].norm().clamp(min=1e-12)
        moved = plain(None, torch.tensor([there]))[0]
        total += moved.item()
        for sum_, g in zip(expected, torch.autograd.grad(moved, parameters), strict=True):
            sum_ += g
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
    assert value.item() == pytest.approx(total, rel=1e-4)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_without_a_radius_and_with_one_class_the_loss_is_plain():
    learner = LoDA(LoDA.Config(**LEARNS), backbone())
    calls = []

    def plain(images, labels):
        calls.append(labels)
        return torch.ones(()), torch.zeros(len(labels), 1)

    loss = learner.ahead(plain, list(learner.tuner.parameters()), context())
    assert loss(torch.zeros(3, 1), torch.tensor([2, 2, 2]))[0] == 1 and len(calls) == 1
    rows = shared(radius=0.0, counts=1).run().rows
    # 48, 12 and 25 images: two epochs, and a pass before and one after them
    assert [row["costs"]["train_passes"] for row in rows] == [48 * 4, 12 * 4, 25 * 4]
