"""Choosing on the first task: what is opened, what is chosen, what is written; against ordinary runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from test_cli import cil, write  # noqa: F401 (a fixture)
from test_runner import settings as configured

from cil import results
from cil.config.reading import load_config
from cil.runner import run
from cil.selection.tune import tune

PROBE = {"name": "linear_probe", "epochs": 2}
GRID = ["learner.lr=0.001,0.1", "learner.epochs=1,3"]

WATCHED = '''
"""The digits, noting every picture that is read; there is no test split to open."""
from cil.data.sources import ImageSource, digits

read = []

def load(split):
    if split != "train":
        raise RuntimeError("somebody opened the test split")
    source = digits("train")
    def look(index):
        read.append(index)
        return source.read(index)
    return ImageSource(look, source.labels, source.class_names, describe=str, fingerprint=source.fingerprint)
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, and one thread: ordinary runs and tuning then agree to the bit."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_it_finds_what_ordinary_runs_on_held_out_images_find(place):
    """The accuracy of a setting is that of ``cil run … stream.test_on=validation`` after as many stages."""
    file = write(place / "c.yaml", learners=[PROBE], seeds=[0, 1])
    for first_tasks in (1, 2):
        tuned = tune(str(file), [], GRID, first_tasks=first_tasks)
        [choice] = tuned.choices
        assert len(choice.ranked) == 4
        found = {tuple(one.setting.values.values()): one.accuracies for one in choice.ranked}
        for (lr, epochs), accuracies in found.items():
            whole = run(
                configured(
                    learners=[{**PROBE, "lr": lr, "epochs": epochs, "label": f"{lr} {epochs}"}],
                    stream={"increment": 4, "validation": 0.2, "test_on": "validation"},
                    seeds=[0, 1],
                ),
                "whole",
            )
            curves = [results.read_run(folder)["curves"]["accuracy/seen"] for folder in whole]
            assert accuracies == tuple(curve[first_tasks - 1] for curve in curves)
        best = max(np.mean(accuracies) for accuracies in found.values())
        assert choice.ranked[0].accuracy == best > min(one.accuracy for one in choice.ranked)


def test_what_it_writes_can_be_run_and_says_how_it_was_chosen(cil, place):  # noqa: F811
    file = write(place / "c.yaml", learners=[{**PROBE, "chosen_by": "paper"}, "ncm"], orders=[7, 1993])
    grid = [f"--grid={text.replace('learner.', 'learners.linear_probe.')}" for text in GRID]
    found = cil("tune", file, "transform.augment=none", *grid, "--first-tasks", "2")
    assert found.returncode == 0, found.stderr
    record = json.loads((place / "results/t/tuned.json").read_text())
    assert record["chosen_by"] == "first_two_tasks" and record["validation"] == 0.2 and record["order"] == 7
    assert [len(task) for task in record["tasks"]] == [4, 4] and record["data"]["test"] == "not opened"
    tried = record["learners"]["linear_probe"]["tried"]
    accuracies = [one["accuracy"] for one in tried]
    assert len(tried) == 4 and accuracies == sorted(accuracies, reverse=True)
    chosen = record["learners"]["linear_probe"]["chosen"]
    assert chosen == tried[0]["setting"]
    assert tried[0]["config"]["learners"][0]["lr"] == chosen["learners.linear_probe.lr"]
    assert f"lr={chosen['learners.linear_probe.lr']}" in found.stdout.split("rank")[1].splitlines()[1]
    written = yaml.safe_load((place / "results/t/tuned.yaml").read_text())
    assert written["transform"] == {"augment": "none"} and written["orders"] == [7, 1993]  # overrides are kept
    ran = cil("run", "results/t/tuned.yaml", "orders=[1993]")
    assert ran.returncode == 0, ran.stderr
    run_of = results.read_run(place / "results/t/linear_probe_tuned/order1993-seed0")
    assert run_of["chosen_by"] == "first_two_tasks" and run_of["tested_on"] == "test"
    assert run_of["config"]["learners"][0]["lr"] == chosen["learners.linear_probe.lr"]
    assert run_of["config"]["learners"][0]["epochs"] == chosen["learners.linear_probe.epochs"]


@pytest.mark.parametrize("first_tasks", [1, 2])
@pytest.mark.parametrize("memory", [4, 0])
def test_no_test_image_and_no_later_image_is_opened(place, first_tasks, memory):
    (place / "watched.py").write_text(WATCHED)
    file = write(
        place / "c.yaml",
        data={"dataset": "watched.py:load"},
        learners=[{"name": "finetune", "epochs": 1}],  # augments: reads every picture anew where none is kept
        hardware={"device": "cpu", "memory_gib": memory, "workers": 0},
    )
    tuned = tune(str(file), [], ["learner.lr=0.001,0.01"], first_tasks=first_tasks)
    from cil.config.plugins import load_object
    from cil.data.sources import digits

    source = digits("train")
    order = np.random.RandomState(1993).permutation(10)
    read = np.array(load_object("watched.py:load", "dataset").__globals__["read"])
    assert set(source.labels[read]) == set(order[: 4 * first_tasks])
    assert len(set(read)) == np.isin(source.labels, order[: 4 * first_tasks]).sum()
    assert tuned.choices[0].ranked[0].accuracy > 0


def test_a_learner_that_reaches_further_is_stopped(place):
    from cil.errors import StreamError
    from cil.runner.plan import plans
    from cil.selection.first_tasks import FirstTasks

    [plan] = plans(load_config(str(write(place / "c.yaml"))))
    held_out = plan.config.stream.model_copy(update={"validation": 0.2, "test_on": "validation"})
    stream, _ = FirstTasks(1).stream(plan, held_out, torch.device("cpu"))
    list(stream.tasks[0].train.batches(64))
    with pytest.raises(StreamError, match="is of a later task; only the first 1 are open"):
        list(stream.tasks[1].train.batches(64))


def test_of_equals_the_first_is_kept_and_it_is_said(cil, place):  # noqa: F811
    """On the first task the softmax over all classes seen is the one over the task's own."""
    file = write(place / "c.yaml", learners=[PROBE])
    found = cil("tune", file, "--grid", "learner.loss=local,global", "--grid", "learner.lr=0.001,0.1")
    assert found.returncode == 0 and "learner.loss: all values give the same accuracies" in found.stdout
    record = json.loads((place / "results/t/tuned.json").read_text())["learners"]["linear_probe"]
    assert record["undecided"] == ["learner.loss"] and record["chosen"]["learner.loss"] == "local"
    more = cil("tune", file, "--grid", "learner.loss=local,global", "--grid", "learner.lr=0.001,0.1", "--first-tasks=2")
    assert more.returncode == 0 and "do the same" not in more.stdout


def test_an_interrupted_selection_keeps_what_it_has_measured(place, monkeypatch):
    from cil.selection import tune as module

    file, usual, started = write(place / "c.yaml", learners=[PROBE]), module._try, []

    def interrupted(*arguments):
        if started:
            raise KeyboardInterrupt
        started.append(True)
        return usual(*arguments)

    earlier = tune(str(file), [], ["learner.lr=0.01"])
    before = earlier.record.read_text(), earlier.config.read_text()
    assert not (place / "results/t/tuned.partial.json").exists()
    monkeypatch.setattr(module, "_try", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(str(file), [], ["learner.lr=0.001,0.1"])
    record = json.loads((place / "results/t/tuned.partial.json").read_text())
    [known] = record["learners"]["linear_probe"]["tried"]
    assert known["setting"] == {"learner.lr": 0.001} and known["accuracy"] > 0
    assert record["not_tried_yet"] == ["linear_probe lr=0.1"]
    assert (earlier.record.read_text(), earlier.config.read_text()) == before


def test_a_setting_that_fails_is_ranked_last(cil, place):  # noqa: F811
    file = write(place / "c.yaml", learners=[PROBE])
    found = cil("tune", file, "--grid", "learner.lr=1.0e+38,0.1")
    assert found.returncode == 0, found.stderr
    record = json.loads((place / "results/t/tuned.json").read_text())
    assert record["not_tried_yet"] == []
    record = record["learners"]["linear_probe"]
    assert record["chosen"] == {"learner.lr": 0.1}
    assert record["tried"][1]["accuracy"] is None and "the training loss is" in record["tried"][1]["failed"]
    (place / "results/t/tuned.yaml").unlink()
    none = cil("tune", file, "--grid", "learner.lr=1.0e+38,2.0e+38")
    assert none.returncode == 2 and "every setting of linear_probe failed" in none.stderr
    assert not (place / "results/t/tuned.yaml").exists()


MISTAKES = {
    "no grid": ([], "needs a grid to select from"),
    "another stream": (["--grid", "stream.increment=2,5"], "its values have different first tasks"),
    "all tasks": (["--grid", "learners.ncm.metric=cosine,euclidean", "--first-tasks", "3"], "allowed: 1 to 2"),
    "for two learners": (["--grid", "precision=fp32,bf16"], "this key is shared by all learners"),
    "wrong value": (["--grid", "learners.ncm.metric=cosine,cosin"], "metric"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(cil, place, mistake):  # noqa: F811
    arguments, message = MISTAKES[mistake]
    found = cil("tune", write(place / "c.yaml", learners=[PROBE, "ncm"]), *arguments)
    assert found.returncode == 2 and message in found.stderr and len(found.stderr.strip().splitlines()) == 1
    assert not (place / "results").exists()


def test_broken_files_of_the_first_task_alone_are_met(cil, place, picture_folder):  # noqa: F811
    root = picture_folder(classes=("ant", "bee", "cat", "dog"), train=6)
    data = {"dataset": "folder", "root": str(root)}
    (root / "train/dog/0.png").write_text("no image, and nobody looks")
    file = write(place / "c.yaml", data=data, stream={"increment": 2}, orders=["natural"])
    grid = ("--grid", "learner.metric=cosine,euclidean")
    assert cil("tune", file, *grid).returncode == 0
    (root / "train/ant/0.png").write_text("no image")
    refused = cil("tune", file, *grid)
    assert refused.returncode == 2 and "0.png: not a readable image" in refused.stderr
    assert cil("tune", file, "data.on_error=skip", *grid).returncode == 0
    assert json.loads((place / "results/t/tuned.json").read_text())["images"]["broken"] == 1
