"""The filter against wrong labels: votes against scikit-learn, what stays by hand, and a learner gets only that."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors

from cil.classifiers import votes
from cil.classifiers.leave_one_out import left_out_predictions, thin_svd
from cil.config import Config
from cil.config.cleaning import NoiseFilter
from cil.errors import DataError, StreamError
from cil.learners import build_learner, registry
from cil.learners.ncm import NCMLearner
from cil.runner.cleaning import filtered
from cil.runner.identity import identity_settings
from cil.runner.plan import dump, plans
from cil.runner.stages import run_stages
from cil.runner.supported import require_supported
from cil.stream import ClassIncremental, Sampling, Stream, Task, TaskData


def blobs(rate: float = 0.4, n: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(features, labels of which a share is wrong, true labels) of three well separated classes."""
    rng = np.random.RandomState(seed)
    true = np.arange(3).repeat(n)
    x = 3 * rng.randn(3, 8)[true] + rng.randn(len(true), 8)
    wrong = np.where(rng.rand(len(true)) < rate, (true + 1 + rng.randint(0, 2, len(true))) % 3, true)
    return torch.from_numpy(x), torch.from_numpy(wrong), torch.from_numpy(true)


def test_ridge_votes_are_predictions_of_samples_left_out():
    x, y, _ = blobs(n=8)
    strength = left_out_predictions(*thin_svd(x), y)[1]
    found, targets = votes.ridge_votes(x, y), np.eye(3)[y]
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        model = Ridge(strength, fit_intercept=False).fit(x.numpy()[others], targets[others])
        np.testing.assert_allclose(found[i], model.predict(x[i : i + 1].numpy())[0], atol=1e-8)


def test_knn_votes_against_scikit_learn(monkeypatch):
    monkeypatch.setattr(votes, "CHUNK", 7)
    x, y, _ = blobs(n=9)
    found = votes.knn_votes(x, y, 5).numpy()
    distance, near = NearestNeighbors(n_neighbors=6, metric="cosine").fit(x.numpy()).kneighbors(x.numpy())
    for i in range(len(x)):
        weights = np.maximum(0, 1 - distance[i][near[i] != i])
        shares = np.bincount(y.numpy()[near[i][near[i] != i]], weights, 3)
        np.testing.assert_allclose(found[i], shares / shares.sum(), atol=1e-12)
    assert votes.knn_votes(x[:2], torch.tensor([0, 1]), 20).tolist() in ([[0, 1], [1, 0]], [[0, 0], [0, 0]])


def test_what_stays_by_hand():
    y = torch.tensor([0, 0, 0, 0, 1, 1])
    given = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.95, 0.05]])
    assert votes.kept(given, y, 0.5).tolist() == [True, False, True, False, True, False]
    assert votes.kept(given, y, 0.01).tolist() == [True, False, False, False, True, False]  # one of each class
    assert votes.kept(given, y, 1.0).all()
    agree = votes.kept(given, y, None)  # nothing agrees with class 1: its best image stays
    assert agree.tolist() == [True, False, True, True, True, False]
    labels, stay = votes.corrected(given, y, agree)
    assert labels.tolist() == [0, 1, 0, 0, 1, 0] and stay.all()


def stage(x, labels):
    logged = {}
    task = Task(
        0, (0, 1, 2), (0, 1, 2), ("a", "b", "c"), TaskData(SimpleNamespace(), np.arange(len(x)), labels.numpy())
    )
    ctx = SimpleNamespace(features=lambda viewer, data: (x, labels), log=logged.__setitem__)
    return task, ctx, logged


@pytest.mark.parametrize("by", ["ridge", "knn"])
def test_a_filter_removes_and_corrects_wrong_labels(by):
    x, wrong, true = blobs()
    before = (wrong == true).double().mean()
    task, ctx, logged = stage(x, wrong)
    learner = SimpleNamespace(backbone=None)
    clean = filtered(task, learner, ctx, NoiseFilter(by=by))
    kept = clean.train.source[1]
    assert len(kept) == pytest.approx(0.6 * len(x), abs=2) and logged == {"noise_filter/kept": len(kept) / len(x)}
    assert (clean.train.labels == wrong.numpy()[kept]).all() and set(clean.train.labels) == {0, 1, 2}
    assert (clean.train.labels == true.numpy()[kept]).mean() > 0.9 > before
    better = filtered(task, learner, ctx, NoiseFilter(by=by, keep="agree", correct=True))
    assert (better.train.labels == true.numpy()[better.train.source[1]]).mean() > 0.9
    assert logged["noise_filter/corrected"] > 0 or by == "ridge"
    one = SimpleNamespace(features=lambda *_: (x[:5], wrong[:5] * 0), log=None)
    assert filtered(task, learner, one, NoiseFilter(by=by)) is task  # labels of one class cannot be wrong


def test_features_that_ridge_interpolates():
    task, ctx, _ = stage(1e12 * torch.eye(2, 4, dtype=torch.float64), torch.tensor([0, 1]))
    with pytest.raises(DataError, match=r"noise_filter, stage 0 \(2 images of 2 classes\)"):
        filtered(task, SimpleNamespace(backbone=None), ctx, NoiseFilter())


class Keeps(NCMLearner):
    """Holds on to the tasks that it is given, without declaring it."""

    given: list[Task]

    def learn(self, task, ctx):
        self.given = [*getattr(self, "given", []), task]
        super().learn(task, ctx)


def test_a_learner_gets_the_filtered_images_and_cannot_return_to_them(backbone, image_set):
    train, test = image_set(np.arange(4).repeat(20)), image_set(np.arange(4))
    tasks = ClassIncremental("natural", increment=2)
    learner = Keeps(NCMLearner.Config(), backbone)
    stream = Stream(train, test, tasks, sampling=Sampling(noise=(0.4, "pair")))
    rows = run_stages(learner, stream, noise_filter=NoiseFilter(by="knn", keep=0.5))
    assert learner.classifier.counts.tolist() == [10, 10, 10, 10] and [
        row["costs"]["train_images"] for row in rows
    ] == [
        40,
        40,
    ]
    assert dict(rows[0]["log"])["noise_filter/kept"] == 0.5
    for task in learner.given:
        with pytest.raises(StreamError, match="images are closed"):
            len(task.train.source)
    plain = run_stages(build_learner("ncm", backbone), Stream(train, test, tasks))
    assert (
        plain[0]["costs"]["train_passes"] == rows[0]["costs"]["train_passes"]
    )  # the features are those of the learner


def test_learners_that_keep_images_are_refused(image_set):
    stream = Stream(image_set(np.arange(4).repeat(3)), image_set(np.arange(4)), ClassIncremental(increment=2))
    with pytest.raises(StreamError, match="joint keeps old images, and noise_filter is not defined for it"):
        require_supported(registry.resolve("joint"), stream, None, NoiseFilter())
    require_supported(registry.resolve("joint"), stream)


def test_the_key_is_of_a_configuration_or_of_one_learner():
    learners = ["ncm", {"name": "ncm", "label": "clean", "noise_filter": {"by": "knn", "keep": "agree"}}]
    config = Config.model_validate({"stream": {"increment": 2}, "learners": learners})
    plain, clean = plans(config)
    assert "noise_filter" not in dump(plain.config) and plain.config.noise_filter is None
    assert clean.config.noise_filter == NoiseFilter(by="knn", keep="agree")
    assert Config.model_validate(dump(clean.config)) == clean.config
    assert identity_settings(dump(clean.config))["noise_filter.keep"] == "agree"
    assert not any(key.startswith("noise_filter") for key in identity_settings(dump(plain.config)))
    every = Config.model_validate({"stream": {"increment": 2}, "learner": "ncm", "noise_filter": {}})
    assert next(plans(every)).config.noise_filter == NoiseFilter()
    with pytest.raises(ValueError, match="keep"):
        NoiseFilter(keep=0)
