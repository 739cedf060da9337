"""Texts as an option of slda and ranpac: their scores beside the classifier's, and class names worth some images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import linear_model

from cil.classifiers import LDA, Ridge
from cil.classifiers.fusion import fusion_weights, held_out_weights
from cil.classifiers.text_prior import TextLDA, TextRidge, expected_means
from cil.errors import ConfigError
from cil.learners.registry import build_learner
from cil.runner import run_stages
from cil.testing.setting import accelerator, backbone, context, probe_images, stream


def learned(section, sizes=(4, 1, 3)):
    """A learner after the checks' classes, in tasks of some sizes."""
    learner = build_learner(section, backbone())
    run_stages(learner, stream(learner.backbone, sizes=sizes), accelerator=accelerator(), batch_size=16)
    return learner


def seen_by(learner):
    """Features [N, F] of all training images, and their labels."""
    parts = [context().features(learner.backbone, task.train) for task in stream(learner.backbone).tasks]
    return torch.cat([features for features, _ in parts]), torch.cat([labels for _, labels in parts])


@pytest.fixture(scope="module")
def probe():
    with torch.inference_mode():
        return backbone()(probe_images())


def samples(seed=0):
    """Features [N, 6] of four classes of unequal size, their labels, and a text for each class."""
    rng = np.random.RandomState(seed)
    labels = np.repeat(np.arange(4), [9, 3, 5, 7])
    x = rng.normal(size=(4, 6))[labels] + 0.5 * rng.normal(size=(len(labels), 6))
    return torch.from_numpy(x), torch.from_numpy(labels), torch.from_numpy(rng.normal(size=(4, 6)))


@pytest.mark.parametrize("projection", [None, 11])
@pytest.mark.parametrize("balance", [False, True])
def test_ridge_with_a_prior_is_a_regression_on_weighted_images_and_virtual_ones(projection, balance):
    x, y, texts = samples()
    ridge = TextRidge(6, lambda: texts, 3.0, projection, 0.7, "linear", balance).partial_fit(x, y)
    places = expected_means(ridge.sums, ridge.counts, texts)
    counts = np.bincount(y)
    weights = 1 / counts if balance else np.ones(4)
    rows = ridge.expand(torch.cat([x, places])).numpy()
    worth = np.concatenate([weights[y], 3 * weights])
    theirs = linear_model.Ridge(alpha=0.7, fit_intercept=False, solver="cholesky")
    theirs.fit(rows, np.eye(4)[np.concatenate([y, np.arange(4)])], sample_weight=worth)
    assert np.abs(ridge.weights.T.numpy() - theirs.coef_).max() < 1e-10
    plain = Ridge(6, projection, 0.7, "linear", balance).partial_fit(x, y)
    without = TextRidge(6, lambda: texts, 0, projection, 0.7, "linear", balance).partial_fit(x, y)
    assert torch.equal(without.weights, plain.weights)
    assert torch.equal(ridge.gram, plain.gram) and torch.equal(ridge.targets, plain.targets)


def test_expected_means_are_the_best_scaling_of_texts():
    x, y, texts = samples()
    ridge = TextRidge(6, lambda: texts, 1.0).partial_fit(x, y)
    found = expected_means(ridge.sums, ridge.counts, texts)
    apart = (texts - texts.mean(0))[y].numpy().reshape(-1, 1)
    fitted = linear_model.LinearRegression(fit_intercept=False).fit(apart, (x - x.mean(0)).numpy().reshape(-1))
    assert np.abs(found.numpy() - (x.mean(0).numpy() + fitted.coef_ * (texts - texts.mean(0)).numpy())).max() < 1e-10
    assert expected_means(ridge.sums[:1], ridge.counts[:1], texts) is None


def test_one_image_per_class_and_a_prior_is_the_nearest_of_both():
    x, _, texts = samples()
    ridge = TextRidge(6, lambda: texts, 2.0).partial_fit(x[[0, 9, 12, 17]], torch.arange(4))
    places = expected_means(ridge.sums, ridge.counts, texts)
    assert (ridge.weights.T - F.normalize(x[[0, 9, 12, 17]] + 2 * places, dim=1)).abs().max() < 1e-12


@pytest.mark.parametrize("section", [{"name": "slda"}, {"name": "ranpac", "projection": 60, "strength": 3.0}])
def test_a_number_adds_the_classifiers_scores_to_the_texts(section, probe):
    beside, alone = learned({**section, "text": {"weight": 2.5}}), learned(section)
    expected = beside.text.logits(probe) + 2.5 * alone.logits(probe)
    assert (beside.logits(probe) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert beside.weights.tolist() == [1, 2.5] and not [key for key in alone.state_dict() if "text" in key]
    assert beside.statistics is None and alone.statistics is alone.classifier


@pytest.mark.parametrize("name", ["slda", "ranpac"])
def test_a_prior_alone_is_the_classifier_with_virtual_images_in_the_joint_space(name, probe):
    own = {"slda": {"shrinkage": 0.3}, "ranpac": {"projection": None, "strength": 0.2}}[name]
    learner = learned({"name": name, **own, "text": {"weight": None, "prior": 5, "space": "joint"}})
    features, labels = seen_by(learner)
    prototypes, project = learner.text.prototypes, learner.text.project
    reference = (
        TextLDA(48, lambda: prototypes, 5.0, shrinkage=0.3)
        if name == "slda"
        else TextRidge(48, lambda: prototypes, 5.0, None, 0.2)
    ).partial_fit(project(features), labels)
    expected = reference.logits(project(probe))
    assert (learner.logits(probe) - expected).abs().max() < 1e-4 * expected.abs().max()
    plain = learned({"name": name, **own})
    assert (learner.logits(probe) - plain.logits(probe)).abs().max() > 1e-2 * expected.abs().max()


def test_the_split_into_tasks_does_not_matter_with_a_number(probe):
    section = {"name": "slda", "text": {"weight": 1.0, "prior": 2, "space": "joint"}}
    parts, whole = learned(section), learned(section, sizes=(8,))
    assert (parts.logits(probe) - whole.logits(probe)).abs().max() < 1e-4 * whole.logits(probe).abs().max()


def test_weights_are_those_of_held_out_images_and_stay_where_none_can_be(probe):
    each, first = (learned({"name": "slda", "text": {"weight": weight}}) for weight in ("each_task", "first_task"))
    one = build_learner({"name": "slda", "text": {}}, backbone())
    task, ctx = stream(one.backbone).tasks[0], context()
    one.begin(task, ctx)
    one.learn(task, ctx)
    assert torch.equal(first.weights, one.weights) and bool((one.weights >= 0).all()) and bool(one.weights.any())
    # the split is drawn from the generator of the stage, and each fold knows the others
    features, labels = context().features(one.backbone, task.train)
    expected = held_out_weights(
        one.text.logits(features),
        lambda fitted, out: (
            LDA(48, priors="uniform").partial_fit(features[fitted], labels[fitted]).logits(features[out])
        ),
        labels,
        context().generator,
    )
    assert one.weights.tolist() == pytest.approx(list(expected), rel=1e-3)
    assert not torch.equal(each.weights, first.weights)
    single = learned({"name": "slda", "text": {}}, sizes=(1, 7))  # one class says nothing of weights
    assert single.weights[0] == 1 and 0 < single.weights[1] < 1


def test_scores_without_differences_get_no_weight():
    y = torch.tensor([0, 1, 2] * 10)
    good = F.one_hot(y, 3) + 0.3 * torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    a, b = fusion_weights([torch.ones(30, 3), good], y)
    assert a == 0 and b > 0
    draw = torch.Generator().manual_seed(0)
    assert (
        held_out_weights(good[:, :1], lambda fitted, out: good[out, :1], torch.zeros(30, dtype=torch.int64), draw)
        is None
    )


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "slda", "text": {"prior": 2}}, "set space: joint, or prior: 0"),
        ({"name": "ranpac", "text": {"weight": None}}, "leave the texts out; set one of them, or text: null"),
        ({"name": "slda", "text": {}, "layers": "half"}, "text needs the features .* leave out layers"),
        ({"name": "ranpac", "text": {}, "tuner": "ssf"}, "text needs the features .* leave out tuner"),
        ({"name": "acil", "text": {}}, "text"),
    ],
)
def test_settings_that_contradict_are_refused(section, said):
    with pytest.raises(ConfigError, match=said):
        build_learner(section, backbone())
