"""TensorBoard read back through its own reader; figures over results."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from test_runner import settings

import cil.runner.benchmark as runner
from cil import results
from cil.errors import RunError
from cil.runner import run
from cil.runner.tensorboard import Tracker


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    learners = ["ncm", {"name": "linear_probe", "epochs": 3}]
    return root, run(settings(learners=learners, orders=[1, 2]), root)


def read(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_steps_are_stages_and_values_are_the_metrics(runs):
    _, folders = runs
    events, found = read(folders[0]), results.read_run(folders[0])
    for tag in ("accuracy/seen", "accuracy/new", "task_id_accuracy", "within_task_accuracy"):
        assert [e.step for e in events.Scalars(tag)] == [1, 2, 3]
        np.testing.assert_allclose([e.value for e in events.Scalars(tag)], found["curves"][tag], rtol=1e-6)
    for tag in ("forgetting/mean", "accuracy/old", "bwt", "forgetting/within_task"):
        assert [e.step for e in events.Scalars(tag)] == [2, 3]
        np.testing.assert_allclose(
            [e.value for e in events.Scalars(tag)], found["curves"][tag][1:], rtol=1e-5, atol=1e-7
        )
    assert [e.step for e in events.Scalars("forgetting/task_02")] == [3]
    assert {"cost/trainable_parameters", "cost/seconds_learn", "cost/statistics_bytes"} <= set(events.Tags()["scalars"])
    drawn = [e.step for e in events.Images("accuracy_matrix")]  # stages shorter than a drawing are left out
    assert drawn[-1] == 3 and set(drawn) <= {1, 2, 3}


def test_training_has_steps_of_its_own(runs):
    _, folders = runs
    assert [e.step for e in read(folders[2]).Scalars("train/loss")] == list(range(9))


def test_one_run_a_folder_with_layout_and_hyper_parameters(runs):
    root, folders = runs
    events = read(folders[0])
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"accuracy/seen" in layout and b"forgetting/mean" in layout
    everything = EventMultiplexer().AddRunsFromDirectory(str(root))
    everything.Reload()
    assert len(everything.Runs()) == len(folders)  # hparams added no run of its own
    assert all(
        len(list(folder.glob("events.*"))) == 1 for folder in folders
    )  # nor a second file to be read out of order
    assert (
        "_hparams_/session_start_info" in everything.PluginRunToTagToContent("hparams")[next(iter(everything.Runs()))]
    )
    assert read(folders[0]).Scalars("final/accuracy_last")


def test_a_resumed_run_draws_the_same_curves(runs, tmp_path, monkeypatch):
    _, folders = runs
    config = settings(learners=[{"name": "linear_probe", "epochs": 3}], orders=[1])
    original = runner.run_stages
    monkeypatch.setattr(runner, "run_stages", lambda *a, **k: original(*a, **{**k, "stop_after": 2}))
    run(config, tmp_path)
    monkeypatch.setattr(runner, "run_stages", original)
    [resumed] = run(config, tmp_path)
    one, two = read(folders[2]), read(resumed)
    assert one.Tags()["scalars"] == two.Tags()["scalars"]
    for tag in one.Tags()["scalars"]:
        if "second" not in tag and "memory" not in tag:
            assert [(e.step, e.value) for e in one.Scalars(tag)] == [(e.step, e.value) for e in two.Scalars(tag)], tag


def test_nothing_to_compare_is_said(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        results.find([tmp_path / "none"])
    with pytest.raises(RunError, match="no run there"):
        results.find([tmp_path])


def test_undefined_numbers_are_null(runs):
    assert "NaN" not in (runs[1][0] / "metrics.json").read_text()
    assert results.read_run(runs[1][0])["curves"]["forgetting/mean"][0] is None


def test_thirty_learners_are_told_apart_and_the_bounds_keep_their_look():
    from cil.report.figures import BOUNDS, comparison, styles

    names = [f"learner{i:02d}" for i in range(28)] + ["finetune", "joint"]
    looks = styles(names)
    assert len(set(looks.values())) == 30 and looks["joint"] == BOUNDS["joint"]
    curves = {"accuracy/seen": [0.9, 0.8], "forgetting/mean": [float("nan"), 0.1]}
    figure = comparison({name: [{"curves": curves}] for name in names}, "many")
    assert len(figure.legends) == 1 and len(figure.legends[0].get_texts()) == 30
    few = comparison({name: [{"curves": curves}] for name in names[:3]}, "few")
    assert not few.legends and len(few.axes[0].get_legend().get_texts()) == 3


def test_a_tuners_hyper_parameters_are_named_by_their_path(tmp_path):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    entry = {"name": "aper", "lr": 0.1, "milestones": [], "tuner": {"name": "adapter", "bottleneck": 4}}
    header = {"learner": "aper", "config": {"orders": [1993], "seeds": [0], "learners": [entry]}, "tasks": [[0]]}
    tracker = Tracker(tmp_path, header)
    tracker.finish({"accuracy_last": 0.5})
    tracker.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    content = found.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    told = HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["tuner.name"].string_value == "adapter" and told["tuner.bottleneck"].number_value == 4
    assert told["name"].string_value == "aper" and told["lr"].number_value == 0.1


def test_drawing_takes_a_hundredth_of_a_run(tmp_path, monkeypatch):
    """By a clock that only stages (7 s each) and drawings (2 s each) move: the next one waits for 200 s."""
    now = 0.0

    def draw(matrix, title):
        nonlocal now
        now += 2

    header = {"learner": "ncm", "config": {}, "tasks": [[c] for c in range(100)]}
    monkeypatch.setattr("cil.runner.tensorboard.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr("cil.runner.tensorboard.figures.matrix", draw)
    tracker, drawn = Tracker(tmp_path, header), []
    monkeypatch.setattr(tracker._writer, "add_figure", lambda tag, figure, stage: drawn.append(stage))
    for stage in range(1, 101):
        now += 7
        tracker._matrix(np.eye(stage), stage)
    tracker.close()
    assert drawn == [15, 44, 73, 100]  # the first after 100 s, then every 29 stages of 7 s, and the last stage
