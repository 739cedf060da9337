"""Tuning, ranking backbones and describing runs on streams of few shots, wrong or no labels, and returning classes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_cli import write
from test_runner import settings

from cil import results
from cil.config.reading import load_config
from cil.reuse.describing import specification_of
from cil.runner import run
from cil.runner.plan import plans
from cil.selection.backbones import rank_backbones
from cil.selection.first_tasks import FirstTasks
from cil.selection.tune import tune
from cil.utils import hardware

DATA = {"dataset": "digits", "per_class": 14}
KINDS = {
    "few_shots": {"stream": {"increment": 4, "shots": 6}},
    "filtered": {"stream": {"increment": 4, "noise": {"rate": 0.3}}, "noise_filter": {"by": "knn"}},
    "pseudo": {"stream": {"increment": 4, "labelled": 5, "unlabelled_from": "all"}, "pseudo": {"threshold": 0.5}},
    "online": {
        "stream": {"type": "blurry", "increment": None, "tasks": 3, "online": {"batch": 8, "evaluate_every": 16}}
    },
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind == "pseudo" else SLOW) for kind in KINDS])
def test_tuning_finds_what_ordinary_runs_on_held_out_images_find(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"data": DATA, **KINDS[kind]}
    file = write(tmp_path / "c.yaml", learners=[{"name": "slda"}], **changes)
    [choice] = tune(str(file), [], ["learner.shrinkage=0.1,0.9"], first_tasks=2).choices
    held_out = {**changes["stream"], "validation": 0.2, "test_on": "validation"}
    learners = [{"name": "slda", "shrinkage": s, "label": f"s{s}"} for s in (0.1, 0.9)]
    folders = run(settings(**{**changes, "stream": held_out, "learners": learners}), "whole")
    accuracy = {
        float(folder.parent.name[1:]): results.read_run(folder)["curves"]["accuracy/seen"][1] for folder in folders
    }
    found = {one.setting.values["learner.shrinkage"]: one.accuracy for one in choice.ranked}
    if kind == "online":  # where classes return, tuning leaves out the held-out images of later tasks
        assert found.keys() == accuracy.keys() and all(0.3 < value <= 1 for value in found.values())
    else:
        assert found == accuracy


def test_first_tasks_open_the_unlabelled_images_and_nothing_else(tmp_path):
    [plan] = plans(load_config(str(write(tmp_path / "c.yaml", data=DATA, stream=KINDS["pseudo"]["stream"]))))
    stream, _ = FirstTasks(1).stream(plan, plan.config.stream, torch.device("cpu"))
    first = stream.tasks[0]
    assert sum(len(images) for images, _ in first.unlabelled.batches(64)) == len(first.unlabelled) > 0
    assert sum(len(images) for images, _ in first.train.batches(64)) == 20


def test_where_classes_return_nothing_of_later_tasks_is_tested(tmp_path):
    [plan] = plans(load_config(str(write(tmp_path / "c.yaml", data=DATA, stream=KINDS["online"]["stream"]))))
    held_out = plan.config.stream.model_copy(update={"validation": 0.4, "test_on": "validation"})
    stream, _ = FirstTasks(1).stream(plan, held_out, torch.device("cpu"))
    own = stream.tasks[0].validation.source[1].tolist()
    with stream.open_test() as test:
        assert len(test.task(0)[0]) > 0 and set(test.task(0)[0].tolist()) <= set(own)


def test_backbones_are_ranked_on_the_labels_that_a_learner_sees(tmp_path, monkeypatch):
    """The images of the first task that have a label, and their wrong labels."""
    monkeypatch.chdir(tmp_path)
    stream = {"increment": 4, "labelled": 8, "noise": {"rate": 0.5, "kind": "pair"}}
    found = {}
    for name, kind in (("noisy", stream), ("clean", {**stream, "noise": None})):
        config = load_config(str(write(tmp_path / f"{name}.yaml", name=name, data=DATA, stream=kind)))
        ranking = rank_backbones(config, [config.backbone], tmp_path)
        record = json.loads(ranking.record.read_text())
        assert record["images"]["training"] == [32] and record["data"]["test"] == "not opened"
        found[name] = ranking.ranked[0].scores.ncm
    assert found["noisy"] < found["clean"]


def test_a_run_is_described_by_the_images_that_it_has_learned_with_labels(tmp_path):
    changes = {"data": DATA, "learners": ["ncm"]}
    for kind, images in (("few_shots", 4 * 14 + 6 * 6), ("pseudo", 50), ("online", 140)):
        [folder] = run(settings(**{**changes, "stream": KINDS[kind]["stream"]}), tmp_path / kind)
        from cil.backbone import load_backbone

        config = settings(**changes)
        made = specification_of(folder, load_backbone(config.backbone), hardware.accelerator("cpu"))
        assert made.images == images and len(made.names) == 10
        header = results.read_header(folder)["stream"]
        assert np.sum([sum(task) for task in header["images"]]) == images
        assert header.get("unlabelled", [0]) == ([0] if kind != "pseudo" else header["unlabelled"])
        assert sum(header.get("unlabelled", [0])) == (90 if kind == "pseudo" else 0)
