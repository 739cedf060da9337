"""Greedy soups inside a task: the choice by hand, and the learner's soup against its fine-tunings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cil.learner import Context
from cil.learners.bases import task_training
from cil.learners.bases.soup import greedy, held_out, mean_of
from cil.learners.merge import Merge
from cil.testing import Case, parametrize_learner
from cil.testing.setting import backbone, stream
from cil.tuning import ExternalWeights

LORA = {"name": "lora", "rank": 2, "targets": ["fc1"]}
QUICK = {"tuner": LORA, "epochs": 1, "lr": 0.01, "rule": "average"}


@pytest.mark.slow
@parametrize_learner(
    [
        ("merge", {**QUICK, "soup": [1.0, 0.3], "epochs": 2}),
        ("routed", {"tuner": {**LORA, "factors": "shared"}, "epochs": 1, "lr": 0.01, "soup": [1.0, 1.0]}),
    ]
)
def test_common_checks(case, check):
    check(case)


def test_the_choice_by_hand():
    """Sorted by accuracy, then loss, then number; an equal accuracy is not enough to be accepted."""
    table = {
        (0,): (0.5, -1.0),
        (1,): (0.7, -2.0),
        (2,): (0.7, -1.0),
        (3,): (0.6, -0.5),
        (2, 1): (0.7, -0.1),
        (2, 3): (0.8, -3.0),
        (2, 3, 0): (0.9, -9.0),
    }
    assert greedy(4, lambda chosen: table[tuple(chosen)]) == [2, 3, 0]
    assert greedy(1, lambda chosen: (0.0, 0.0)) == [0]


def test_images_are_held_out_class_by_class():
    task = stream(backbone()).tasks[0]
    train, rest = held_out(task.train, 0.25)
    assert np.bincount(rest.labels).tolist() == [3, 3, 3, 3] and np.bincount(train.labels).tolist() == [9, 9, 9, 9]
    assert sorted([*train.source[1], *rest.source[1]]) == sorted(task.train.source[1])


@pytest.mark.parametrize("tuner", [LORA, {"name": "adapter", "bottleneck": 4}], ids=["weights", "parameters"])
def test_a_soup_is_the_mean_of_fine_tunings_and_no_worse_than_any(tuner, monkeypatch):
    seen, logged = [], {}

    def spy(models, vit, members, data, task, ctx):
        heads = [(update, {n: p.detach().clone() for n, p in head.named_parameters()}) for update, head in members]
        result = real(models, vit, members, data, task, ctx)
        seen.append((heads, data, result))
        return result

    real = task_training.greedy_soup
    monkeypatch.setattr(task_training, "greedy_soup", spy)
    learner = Case(Merge, {**QUICK, "tuner": tuner, "epochs": 2, "soup": [1.0, 0.5, 2.0]}).learner()
    task = stream(learner.backbone).tasks[0]
    ctx = Context(log=lambda name, value: logged.update({name: value}))
    learner.begin(task, ctx)
    got, _ = learner.train_task(task, ctx)
    [(members, data, (_, head))] = seen
    update = learner.models.update(got, learner.models.initial)
    size = int(logged["soup_accepted"])

    def distance(chosen):
        mean = mean_of([members[i][0] for i in chosen])
        return max(float((mean[name] - update[name]).abs().max()) for name in mean)

    subsets = [c for c in itertools.combinations(range(3), size) if distance(c) < 1e-6]
    assert len(members) == 3 and len(subsets) == 1
    heads = mean_of([members[i][1] for i in subsets[0]])
    assert all(torch.allclose(value, heads[name], atol=1e-6) for name, value in head.named_parameters())

    def accuracy(chosen):
        mean, (images, labels) = mean_of([members[i][0] for i in chosen]), next(data.batches(100))
        theta = {n: learner.models.initial[n] + v for n, v in mean.items()}
        tuned = ExternalWeights(theta) if tuner is LORA else learner.models.tuner_at(theta)
        weight = mean_of([members[i][1] for i in chosen])["weight"]
        with torch.no_grad():
            cosines = F.normalize(learner.backbone(images, tuned)) @ F.normalize(weight).T
        return float((cosines.argmax(1) == labels).float().mean())

    assert logged["soup_accuracy"] == pytest.approx(accuracy(subsets[0]))
    assert logged["soup_accuracy"] >= max(accuracy([i]) for i in range(3))


def test_without_held_out_images_the_first_fine_tuning_is_taken():
    """A task of one class with one image has none to choose by."""
    learner, logged = Case(Merge, {**QUICK, "soup": [1.0, 0.5]}).learner(), {}
    first, second, *_ = stream(learner.backbone, sizes=(5, 1, 2)).tasks
    for task in (first, second):
        ctx = Context(stage=task.index, log=lambda name, value: logged.setdefault(name, []).append(value))
        learner.begin(task, ctx)
        learner.learn(task, ctx)
    assert len(logged["soup_accepted"]) == 1 and len(second.train) == 1
