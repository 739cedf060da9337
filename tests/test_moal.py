"""MoAL: the slow average, the rows that stand for old classes, and what is added a second time."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from lessons import taught

from cil.classifiers import Ridge
from cil.learners import moal
from cil.learners.moal import MoAL
from cil.testing import Case, parametrize_learner
from cil.testing.setting import context

QUICK = {"tuner": {"name": "adapter", "bottleneck": 4, "dropout": 0}, "epochs": 2, "lr": 0.1, "projection": 60}
QUICK["train_batch_size"] = 16


@pytest.mark.slow
@parametrize_learner(
    [
        ("moal", {**QUICK, "epochs": 3, "decay": 0.5}),
        ("moal", {**QUICK, "tuner": {"name": "lora", "rank": 2}, "projection": None, "rumination": False}),
    ]
)
def test_common_checks(case, check):
    check(case)


@lru_cache
def shared(**parameters) -> Case:
    """One case for all tests that look at the same run."""
    return Case(MoAL, {**QUICK, **parameters})


def values(tuner):
    return torch.cat([p.detach().flatten() for p in tuner.parameters()])


def test_the_slow_tuner_is_a_copy_and_then_an_average_over_epochs(monkeypatch):
    learner, data = taught(shared(decay=0.9), 1)
    assert torch.equal(values(learner.slow), values(learner.tuner))
    expected, steps, original = values(learner.slow), [], moal.fit

    def fit(loss, groups, data, recipe, ctx, after_step):
        def watched():
            steps.append(values(learner.tuner))
            after_step()

        original(loss, groups, data, recipe, ctx, watched)

    monkeypatch.setattr(moal, "fit", fit)
    ctx, task = context(), data.tasks[2]
    learner.begin(task, ctx)
    learner.train_tuner(task, ctx)
    assert len(steps) == 4  # 25 images, 16 per step, two epochs
    for after_epoch in steps[1::2]:
        expected = 0.9 * expected + 0.1 * after_epoch
    torch.testing.assert_close(values(learner.slow), expected)


def test_without_rumination_and_motion_it_is_ridge_regression_on_the_first_tasks_features():
    learner, data = taught(shared(decay=1, rumination=False, projection=None, map_shrinkage=1e6), 3)
    ridge = Ridge(48, None, float(learner.classifier.strength_))
    for task in data.tasks:
        with torch.no_grad():
            features = torch.cat([learner.features(images) for images, _ in task.train.batches(64)])
        ridge.partial_fit(features, torch.from_numpy(task.train.labels))
    torch.testing.assert_close(learner.classifier.weights, ridge.weights, atol=1e-4, rtol=1e-3)


def test_the_ridge_strength_is_that_of_the_first_task():
    learner, data = taught(shared(), 1)
    chosen, task, ctx = float(learner.classifier.strength_), data.tasks[2], context()
    learner.begin(task, ctx)
    learner.learn(task, ctx)
    assert learner.classifier.strength == float(learner.classifier.strength_) == chosen


def test_an_old_class_gets_the_most_similar_new_class_around_its_own_mean():
    learner = shared().learner()
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(3, 48, generator=generator, dtype=torch.float64)
    new = torch.stack([old[1] + 0.1, old[0] * 2 - 0.1])  # class 3 is like class 1, class 4 like class 0
    labels = torch.tensor([3, 4, 3, 4, 4])
    x = new[labels - 3] + 0.01 * torch.randn(5, 48, generator=generator, dtype=torch.float64)
    learner.prototypes.partial_fit(old, torch.arange(3)).partial_fit(x, labels)
    rows, targets = learner.imagine(x, labels, 3)
    means = learner.prototypes.means
    cosines = F.normalize(means[:3], dim=1) @ F.normalize(means[3:], dim=1).T
    assert cosines.argmax(1)[:2].tolist() == [1, 0]
    assert targets[:5].tolist() == [0, 0, 0, 1, 1]
    for c in range(3):
        torch.testing.assert_close(rows[targets == c].mean(0), old[c])
    torch.testing.assert_close(rows[:3] - old[0], x[labels == 4] - means[4])


def test_only_what_is_wrong_is_added_a_second_time():
    learner, _ = taught(shared(), 2)
    generator = torch.Generator().manual_seed(1)
    x = 5 * torch.randn(40, 48, generator=generator, dtype=torch.float64)
    labels = torch.full((40,), 4)
    imagined, old = learner.imagine(x, labels, 4)
    rows, targets = torch.cat([imagined, x]), torch.cat([old, labels])
    wrong = learner.classifier.logits(rows).argmax(1) != targets
    before, strength = learner.classifier.counts.clone(), float(learner.classifier.strength_)
    again = Ridge(48, 60, strength)
    again.load_state_dict(learner.classifier.state_dict())
    again.partial_fit(rows[wrong], targets[wrong])
    learner.ruminate(x, labels, 4, context())
    assert 0 < int(wrong.sum()) < len(wrong)
    assert torch.equal(learner.classifier.counts - before, torch.bincount(targets[wrong], minlength=5))
    torch.testing.assert_close(learner.classifier.weights, again.weights)
