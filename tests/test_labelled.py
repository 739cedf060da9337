"""Streams in which few images have labels, by hand, and learners that guess the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cil.config import Config
from cil.config.cleaning import Pseudo
from cil.errors import ConfigError, StreamError
from cil.features import FeatureCache
from cil.learner import Context
from cil.learners import build_learner
from cil.runner import make_stream
from cil.runner.cleaning import pseudo_labelled, require_sums
from cil.runner.plan import dump, plans
from cil.runner.stages import run_stages
from cil.stream import Blurry, ClassIncremental, Sampling, Stream
from cil.stream.sampling import LABELLED, labelled_part, scattered
from cil.utils import hardware

LABELS = np.arange(6).repeat(20)
MEMBERS = [np.arange(40), np.arange(40, 80), np.arange(80, 120)]


def test_labelled_part_by_hand():
    known = labelled_part(LABELS, MEMBERS, 3)
    assert [np.bincount(LABELS[own], minlength=6).tolist() for own in known] == [
        [3, 3, 0, 0, 0, 0],
        [0, 0, 3, 3, 0, 0],
        [0, 0, 0, 0, 3, 3],
    ]
    expected = [20 + i for i in np.random.RandomState([0, 1, LABELLED]).permutation(20)[:3]]
    assert sorted(expected) == known[0][LABELS[known[0]] == 1].tolist()
    assert [len(own) for own in labelled_part(LABELS, MEMBERS, 0.25)] == [10, 10, 10]
    assert [len(own) for own in labelled_part(LABELS, MEMBERS, 0.001)] == [2, 2, 2]  # no class is lost
    assert all((a == b).all() for a, b in zip(labelled_part(LABELS, MEMBERS, 50), MEMBERS, strict=True))
    returning = labelled_part(LABELS, [np.arange(0, 120, 2), np.arange(1, 120, 2)], 2)
    assert [np.bincount(LABELS[own]).tolist() for own in returning] == [[2] * 6, [2] * 6]


def test_unlabelled_images_are_scattered_and_none_is_lost():
    own = scattered(LABELS, MEMBERS, "task")
    assert all((a == b).all() for a, b in zip(own, MEMBERS, strict=True))
    seen, every = (scattered(LABELS, MEMBERS, source, seed=1) for source in ("seen", "all"))
    for parts in (seen, every):
        assert np.sort(np.concatenate(parts)).tolist() == list(range(120))
    assert set(LABELS[seen[0]]) == {0, 1} and set(LABELS[seen[1]]) == {0, 1, 2, 3}
    assert all(set(LABELS[part]) == set(range(6)) for part in every)
    assert min(map(len, every)) > 25 and max(map(len, every)) < 55


@pytest.mark.parametrize("tasks", [ClassIncremental(1993, increment=2), Blurry(1993, 3, 50, 40)], ids=["new", "blurry"])
@pytest.mark.parametrize("source", ["task", "seen", "all"])
def test_a_stream_shows_every_image_once_and_hides_labels(tasks, source, image_set):
    sampling = Sampling(labelled=4, unlabelled_from=source, noise=(0.5, "pair"))
    stream = Stream(image_set(LABELS), image_set(np.arange(6)), tasks, validation=0.2, sampling=sampling)
    shown = []
    for task in stream.tasks:
        counts = np.bincount(task.train.labels, minlength=6)
        assert counts[list(task.classes)].sum() == counts.sum() <= 4 * len(task.classes)
        shown += [part.source[1] for part in (task.train, task.validation, task.unlabelled)]
        with pytest.raises(StreamError, match="these images have no labels"):
            len(task.unlabelled.labels)
        _, labels = next(task.unlabelled.batches(8))
        assert (labels == -1).all()
    assert np.sort(np.concatenate(shown)).tolist() == list(range(120))
    wrong = set(stream.relabelled[0].tolist())
    assert wrong and wrong <= set(np.concatenate([task.train.source[1] for task in stream.tasks]).tolist())
    stream.tasks[0].close()
    with pytest.raises(StreamError, match="images are closed"):
        len(stream.tasks[0].unlabelled.source)


@pytest.fixture
def blobs(backbone, image_set):
    """(stream of two tasks, context whose cached features are six blobs, features of every training image)."""
    rng = np.random.RandomState(0)
    x = torch.from_numpy(4 * rng.randn(6, backbone.feature_dim)[LABELS] + rng.randn(120, backbone.feature_dim)).float()
    train = image_set(LABELS)
    stream = Stream(
        train, image_set(np.arange(6)), ClassIncremental("natural", increment=3), sampling=Sampling(labelled=5)
    )
    accelerator = hardware.accelerator("cpu")
    cache = FeatureCache(accelerator)
    [version] = backbone.views()
    cache.put(build_learner("ncm", backbone), version, train, np.arange(120), x)
    logged = {}
    return stream, Context(accelerator, cache, log=logged.__setitem__), x.double().numpy(), logged


@pytest.mark.parametrize("rounds", [1, 2])
def test_guesses_are_right_and_learned_in_one_call(blobs, backbone, rounds):
    stream, ctx, x, logged = blobs
    learner = build_learner("ncm", backbone)
    task = stream.tasks[0]
    shown = pseudo_labelled(task, learner, ctx, Pseudo(threshold=0.6, rounds=rounds))
    assert learner.statistics.num_classes == 0  # the learner itself has learned nothing yet
    positions = shown.train.source[1]
    assert len(set(positions.tolist())) == len(positions) > 40 and (positions[:15] == task.train.source[1]).all()
    assert (shown.train.labels == LABELS[positions]).mean() > 0.95
    assert logged["pseudo/accepted"] == pytest.approx((len(positions) - 15) / 45)
    learner.begin(shown, ctx)
    learner.learn(shown, ctx)
    means = np.stack([x[positions[shown.train.labels == c]].mean(0) for c in range(3)])
    np.testing.assert_allclose(learner.classifier.means, means, atol=1e-9)


def test_a_threshold_that_nothing_reaches_changes_nothing(blobs, backbone):
    stream, _, _, logged = blobs
    task, learner = stream.tasks[0], build_learner("ncm", backbone)
    cache, [version] = FeatureCache(hardware.accelerator("cpu")), backbone.views()
    cache.put(learner, version, task.train.source[0], np.arange(120), torch.ones(120, backbone.feature_dim))
    ctx = Context(cache.accelerator, cache, log=logged.__setitem__)
    shown = pseudo_labelled(task, learner, ctx, Pseudo(threshold=0.34))  # equal features: every class has 1/3
    assert (shown.train.source[1] == task.train.source[1]).all() and logged["pseudo/accepted"] == 0
    assert Pseudo(threshold="falling").at(0) == pytest.approx(0.95)
    assert Pseudo(threshold="falling").at(20) == pytest.approx(0.7, abs=1e-4)


def test_learners_that_are_not_made_of_sums_are_refused(backbone, image_set):
    stream = Stream(
        image_set(LABELS), image_set(np.arange(6)), ClassIncremental(increment=3), sampling=Sampling(labelled=0.5)
    )
    for learner in ("linear_probe", "joint", "finetune", {"name": "ranpac", "projection": 8, "tuner": "adapter"}):
        with pytest.raises(ConfigError, match="is not defined with pseudo"):
            run_stages(build_learner(learner, backbone), stream, pseudo=Pseudo())
    for learner in ("ncm", "slda", {"name": "ranpac", "projection": 8, "balance": True}):
        require_sums(build_learner(learner, backbone))


def test_a_run_learns_labelled_and_guessed_images(backbone, image_set):
    tasks = ClassIncremental("natural", increment=3)
    stream = Stream(image_set(LABELS), image_set(np.arange(6)), tasks, sampling=Sampling(labelled=10))
    learner = build_learner({"name": "slda", "shrinkage": 0.5}, backbone)
    rows = run_stages(learner, stream, pseudo=Pseudo(threshold=0.34))
    accepted = [dict(row["log"])["pseudo/accepted"] for row in rows]
    assert learner.classifier.counts.sum() == 60 + round(30 * sum(accepted)) > 60
    assert rows[0]["costs"]["train_images"] == 30 and rows[0]["costs"]["train_passes"] == 60


def test_configurations(image_set):
    stream = {"increment": 3, "labelled": 0.5, "unlabelled_from": "all"}
    config = Config.model_validate({"stream": stream, "learners": ["ncm", {"name": "slda", "pseudo": {"rounds": 2}}]})
    plain, guessing = plans(config)
    assert plain.config.pseudo is None and guessing.config.pseudo == Pseudo(rounds=2)
    assert "pseudo" not in dump(plain.config) and dump(plain.config)["stream"]["labelled"] == 0.5
    made = make_stream(plain.config, image_set(LABELS), image_set(np.arange(6)))
    assert made.altered and [len(task.train) for task in made.tasks] == [30, 30]
    with pytest.raises(ValueError, match=r"pseudo needs images without labels; set stream\.labelled"):
        Config.model_validate({"stream": {"increment": 3}, "learner": "ncm", "pseudo": {}})
    with pytest.raises(ValueError, match="unlabelled_from needs unlabelled images"):
        Config.model_validate({"stream": {"increment": 3, "unlabelled_from": "all"}, "learner": "ncm"})
