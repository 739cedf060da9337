"""The fit loop: exactly the given parameters, the schedule's closed form, a loss that is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cil.errors import TrainingError
from cil.testing.setting import context
from cil.training import Group, Recipe, TensorData, _schedule, fit


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 5, generator=g)
    return x, (x[:, 0] > 0).long()


def make(weight):
    def loss(inputs, labels):
        logits = inputs @ weight.T
        return nn.functional.cross_entropy(logits, labels), logits

    return loss


def test_only_the_given_parameters_change_and_nothing_is_left_behind(problem):
    weight, other = nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.ones(3))
    fit(make(weight), [Group([weight])], TensorData(*problem), Recipe(epochs=3, lr=0.5), context())
    assert not torch.equal(weight, torch.zeros(2, 5)) and torch.equal(other, torch.ones(3))
    assert weight.grad is None and not weight.requires_grad
    logits = problem[0] @ weight.T
    assert (logits.argmax(1) == problem[1]).float().mean() > 0.9


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_equals_a_plain_torch_loop(problem, optimizer):
    recipe = Recipe(
        epochs=2, train_batch_size=64, lr=0.1, optimizer=optimizer, weight_decay=0.01, clip=0.5, schedule="constant"
    )
    ours, theirs = nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.zeros(2, 5))
    fit(make(ours), [Group([ours])], TensorData(*problem), recipe, context())
    kinds = {
        "sgd": lambda: torch.optim.SGD([theirs], 0.1, momentum=0.9, weight_decay=0.01),
        "adam": lambda: torch.optim.Adam([theirs], 0.1, weight_decay=0.01),
        "adamw": lambda: torch.optim.AdamW([theirs], 0.1, weight_decay=0.01),
    }
    plain = kinds[optimizer]()
    for _ in range(2):
        plain.zero_grad()
        make(theirs)(*problem)[0].backward()
        nn.utils.clip_grad_norm_([theirs], 0.5)
        plain.step()
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-5)


def test_schedule_by_its_formula():
    factor = _schedule(Recipe(warmup=0.2, epochs=5), 10)
    assert factor(0) == pytest.approx(0.1) and factor(9) == pytest.approx(1.0)
    assert factor(30) == pytest.approx(0.5 * (1 + math.cos(math.pi * 20 / 40)))
    assert factor(50) == pytest.approx(0.0)
    assert _schedule(Recipe(schedule="constant"), 10)(49) == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops(problem, bad):
    weight = nn.Parameter(torch.zeros(2, 5))

    def loss(inputs, labels):
        logits = inputs @ weight.T
        return logits.sum() * 0 + bad, logits

    with pytest.raises(
        TrainingError, match=r"stage 3, epoch 0: the training loss is (nan|inf); lower the learner's lr \(0\.01\)"
    ):
        fit(loss, [Group([weight])], TensorData(*problem), Recipe(), context(stage=3))
    assert torch.isfinite(weight).all()


def test_what_is_logged(problem):
    logged = []
    ctx = context()
    ctx._log = lambda name, value: logged.append((name, value))
    weight = nn.Parameter(torch.zeros(2, 5))
    fit(make(weight), [Group([weight])], TensorData(*problem), Recipe(epochs=2), ctx)
    names = [name for name, _ in logged]
    assert names == ["loss", "accuracy", "learning_rate", "images_per_second"] * 2
    assert ctx.trainable_parameters == 10
    losses = [v for n, v in logged if n == "loss"]
    assert losses[0] <= math.log(2) + 1e-6 and losses[1] < losses[0]
