"""Coefficients per block: fitted ones against cases whose minimum is known, and what a learner adds."""

from __future__ import annotations

import re

import pytest
import torch
from marks import slow_beyond

from cil.classifiers import CosineHead
from cil.errors import ConfigError
from cil.learner import Context
from cil.learners.bases import task_training
from cil.learners.bases.coefficients import LARGEST, scaled_update
from cil.learners.bases.merged_space import mergeable
from cil.learners.bases.soup import held_out
from cil.learners.merge import Merge
from cil.testing import Case, parametrize_learner
from cil.testing.setting import backbone, stream
from cil.tuning.configs import LoraConfig

LORA = {"name": "lora", "rank": 2, "targets": ["fc1"]}
SUM = {"name": "task_arithmetic", "scale": 1.0}
QUICK = {"tuner": LORA, "epochs": 1, "lr": 0.01, "rule": SUM, "coefficients": "layers", "coefficient_epochs": 1}


@pytest.mark.slow
@parametrize_learner([("merge", QUICK), ("merge", {**QUICK, "soup": [1.0, 0.3], "head": "ncm"})])
def test_common_checks(case, check):
    check(case)


def recording():
    logged: dict[str, list[float]] = {}
    return logged, lambda name, value: logged.setdefault(name, []).append(value)


CASES = [(-1.0, 0.0, LARGEST), (0.0, 0.0, 1.0), (0.0, 1e4, 0.0)]


@pytest.mark.parametrize(("start", "drift", "expected"), slow_beyond(CASES[1:2], CASES))
def test_the_minimum_is_found(start, drift, expected):
    """With θ = θ_0 + a τ, the model is the task's own at λ = 1 − a, and features do not move at λ = 0.

    λ starts at 1/2 for the second task and never leaves [0, 1.5].
    """
    vit, (logged, log) = backbone(), recording()
    task = stream(vit, sizes=(1, 4, 3)).tasks[1]
    generator = torch.Generator().manual_seed(1)
    tau = {"blocks.1.mlp.fc1.weight": 0.05 * torch.randn(192, 48, generator=generator)}
    models = mergeable(LoraConfig(rank=2, targets=["fc1"]), vit)
    theta = models.initial | {name: models.initial[name].detach() + start * change for name, change in tau.items()}
    head = CosineHead(vit.feature_dim, 16.0)
    head.grow(4, generator)
    recipe = Merge.Config(**{**QUICK, "coefficient_epochs": 60 if start == 0 else 120, "coefficient_drift": drift})
    got = scaled_update(models, tau, theta, vit, head, recipe, task, Context(stage=1, log=log))
    [value] = logged["coefficient/blocks.1"]
    torch.testing.assert_close(got, {name: value * change for name, change in tau.items()})
    assert value == pytest.approx(expected, abs=0.15) and 0 <= value <= LARGEST
    assert logged["coefficient_loss"][-1] < 0.2 * logged["coefficient_loss"][0]


def test_a_learner_adds_the_scaled_update_and_trains_without_the_held_out_images(monkeypatch):
    learner, seen = Case(Merge, QUICK).learner(), []
    monkeypatch.setattr(task_training, "fit", lambda loss, groups, data, *rest: seen.append(data))
    real, sums = learner.update, {}
    for task in stream(learner.backbone, sizes=(3, 3, 2)).tasks:
        logged, log = recording()

        def update(tuner, index=task.index):
            taken = real(tuner)
            generator = torch.Generator().manual_seed(index)
            return {name: torch.randn(change.shape, generator=generator) for name, change in taken.items()}

        learner.update = update
        ctx = Context(stage=task.index, log=log)
        learner.begin(task, ctx)
        learner.learn(task, ctx)
        for name, tau in update(learner.models.tuner(learner.models.initial, ctx.generator)).items():
            [factor] = logged[f"coefficient/{name[:8]}"]
            assert (factor == 1) == (task.index == 0)
            sums[name] = sums.get(name, 0) + factor * tau
        train, rest = held_out(task.train, 0.2)
        assert sorted(seen[-1].source[1]) == sorted(train.source[1]) and len(rest) >= 2
    merged = learner.rule.merged()
    for name, change in sums.items():
        torch.testing.assert_close(merged[name], learner.models.initial[name] + change)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rule": "opcm"}, ValueError, "set rule: {name: task_arithmetic, scale: 1.0} and start: pretrained"),
        ({"rule": "task_arithmetic"}, ValueError, "set rule: {name: task_arithmetic, scale: 1.0}"),
        ({"start": "merged"}, ValueError, "and start: pretrained"),
        ({"tuner": "adapter"}, ConfigError, "merge: tuner adapter adds modules to the network, and coefficients"),
    ],
)
def test_what_cannot_be_scaled_is_refused(settings, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Merge(Merge.Config(**{**QUICK, **settings}), backbone())
