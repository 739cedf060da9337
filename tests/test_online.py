"""Streams in one pass: batches by hand, sums that end where whole tasks end, and the area under the anytime curve."""

from __future__ import annotations

import numpy as np
import pytest

from cil.classifiers import NCM
from cil.config import Config
from cil.errors import StreamError
from cil.features import FeatureCache
from cil.learners import build_learner, registry
from cil.results import summarise
from cil.runner import make_stream
from cil.runner.stages import run_stages
from cil.runner.supported import require_supported
from cil.stream import Blurry, ClassIncremental, Online, Stream
from cil.utils import hardware

LABELS = np.arange(6).repeat(20)
TASKS = {"new": ClassIncremental(1993, increment=2), "blurry": Blurry(1993, 3, 50, 30, stochastic=True, seed=1)}


@pytest.fixture
def stream(image_set):
    train, test = image_set(LABELS), image_set(np.arange(6).repeat(5), seed=1)
    return lambda kind, online=None: Stream(train, test, TASKS[kind], online=online)


def test_batches_by_hand(stream):
    one = stream("new", Online(batch=16, seed=3))
    for task in one.tasks:
        parts = list(one.online.batches(task))
        assert [len(part.train) for part in parts] == [16, 16, 8]
        indices = np.concatenate([part.train.source[1] for part in parts])
        order = np.random.RandomState([3, task.index]).permutation(40)
        assert (indices == task.train.source[1][order]).all()  # every image once
        assert (np.concatenate([part.train.labels for part in parts]) == task.train.labels[order]).all()
        assert parts[0].classes == task.classes and parts[0].validation is None


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize(
    "name", ["ncm", "slda", {"name": "ranpac", "projection": 40, "strength": "gcv"}, {"name": "acil", "projection": 40}]
)
def test_sums_end_where_whole_tasks_end(name, kind, backbone, stream):
    whole, online = build_learner(name, backbone), build_learner(name, backbone)
    expected = run_stages(whole, stream(kind))
    rows = run_stages(online, stream(kind, Online(7, 20)))
    for buffer, value in whole.classifier.state_dict().items():
        np.testing.assert_allclose(online.classifier.state_dict()[buffer], value, rtol=1e-9, atol=1e-9, err_msg=buffer)
    assert [row["correct"] for row in rows] == [row["correct"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for cost in ("train_images", "train_passes", "test_passes"):
            assert row["costs"][cost] == other["costs"][cost]  # a test between batches costs no pass of its own


def test_accuracy_at_any_time_by_hand(backbone, stream):
    one = stream("new", Online(batch=8, evaluate_every=12))
    rows = run_stages(build_learner("ncm", backbone), one)
    cache, found = FeatureCache(hardware.accelerator("cpu")), []
    x, label_of = cache.get(backbone, one.tasks[0].train._images, np.arange(120)), np.argsort(one.order)
    with one.open_test() as test:
        tested, y = cache.get(backbone, test.images, np.arange(30)), test.labels
        model, fresh = NCM(backbone.feature_dim), stream("new", one.online)
        for task in fresh.tasks:
            since, curve = 0, []
            for part in one.online.batches(task):
                own = part.train.source[1]
                model.partial_fit(x[own], label_of[LABELS[own]])
                since += len(own)
                known = np.isin(y, model.counts.nonzero().flatten().numpy())
                right = (model.logits(tested).argmax(1).numpy() == y)[known].mean()
                if since >= 12:
                    curve.append((since, right))
                    since = 0
            found.append(curve + [(since, right)] * bool(since))
    for row, curve in zip(rows, found, strict=True):
        assert row["stream"]["online"]["images"] == [16, 16]
        np.testing.assert_allclose(row["stream"]["online"]["accuracy"], [right for _, right in curve[:2]])
        assert [value for name, value in row["log"] if name == "anytime"] == row["stream"]["online"]["accuracy"]
    area = sum(n * right for curve in found for n, right in curve) / 120
    assert summarise(rows)["accuracy_anytime"] == pytest.approx(area)
    assert "accuracy_anytime" not in summarise(run_stages(build_learner("ncm", backbone), stream("new")))


def test_learners_that_need_whole_tasks_are_refused(stream):
    one = stream("new", Online())
    defined = set()
    for name in registry.BUILTIN:
        try:
            require_supported(registry.resolve(name), one)
            defined.add(name)
        except StreamError as error:
            assert str(error).startswith(name)
    assert defined == {"ncm", "slda", "ranpac", "acil"}
    ranpac, ncm = registry.resolve("ranpac"), registry.resolve("ncm")
    for cls, settings, message in (
        (ranpac, {"balance": True}, "ranpac needs balance=false"),
        (ranpac, {"tuner": {"name": "adapter"}}, "ranpac needs tuner=null"),
        (ncm, {"layers": "half"}, r"ncm needs layers\.scale=unit or none"),
    ):
        with pytest.raises(StreamError, match=message):
            require_supported(cls, one, cls.Config(**settings))
    require_supported(ncm, one, ncm.Config(layers={"blocks": "half", "scale": "unit"}))


def test_configurations(image_set):
    stream = {"type": "blurry", "tasks": 3, "online": {"batch": 8}, "seed": 4}
    made = make_stream(
        Config.model_validate({"stream": stream, "learner": "ncm"}), image_set(LABELS), image_set(np.arange(6))
    )
    assert made.online == Online(8, 1000, 4)
    with pytest.raises(ValueError, match=r"noise_filter needs all images of a task, and stream\.online shows a few"):
        Config.model_validate(
            {"stream": {"increment": 2, "online": {}}, "learner": {"name": "ncm", "noise_filter": {}}}
        )
