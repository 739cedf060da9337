"""Two CPU processes against one: the same batches, the same statistics, the same metrics."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh import command as code
from fresh import together
from safetensors.torch import load_file
from test_cli import cil  # noqa: F401 - a fixture

from cil.cli import main
from cil.learners.lae import LAE
from cil.results import read_run

NO_DROPOUT = {"tuner": {"name": "adapter", "dropout": 0, "bottleneck": 8}}
"""Each process draws its own dropout."""

LEARNERS = {
    "ncm": {"name": "ncm"},
    "probe": {"name": "linear_probe", "epochs": 3},
    "ranpac": {"name": "ranpac", "projection": 200},
    "fecam": {"name": "fecam"},
    "aper": {
        "name": "aper",
        "epochs": 2,
        "lr": 0.1,
        "train_batch_size": 10,
        **NO_DROPOUT,
    },
    "ease": {"name": "ease", "epochs": 1, "lr": 0.1, "train_batch_size": 7, "bottleneck": 8, "dropout": 0},
    "slca": {"name": "slca", "epochs": 2, "milestones": [1], "train_batch_size": 10, "samples": 20},
    "l2p": {"name": "l2p", "epochs": 1, "pool": 4, "top": 2, "init": 0.05, "train_batch_size": 10},
    "lae": {
        "name": "lae",
        "epochs": 2,
        "frozen_epochs": 1,
        "train_batch_size": 10,
        "tuner": {**LAE.Config().tuner.model_dump(), "blocks": [0, 1]},
    },
    "coda_prompt": {"name": "coda_prompt", "epochs": 1, "train_batch_size": 10, "blocks": [0, 1]},
    "ssiat": {"name": "ssiat", "first_epochs": 2, "epochs": 1, "train_batch_size": 10, "samples": 10, **NO_DROPOUT},
    "rsiat": {
        "name": "rsiat",
        "first_epochs": 2,
        "epochs": 1,
        "train_batch_size": 17,
        "samples": 10,
        "metric_weight": 5,
        "metric_warmup": 0,
        **NO_DROPOUT,
    },
    "held": {
        "name": "finetune",
        "epochs": 2,
        "train_batch_size": 17,
        "optimizer": "sgd",
        "lr": 1e-3,
        "anchor": {"norm": "l1", "alpha": 1e-4},
        "distill": {"what": "relations", "teacher": "pretrained", "weight": 10},
        "bss": 1e-3,
    },
    "tuna": {"name": "tuna", "epochs": 1, "train_batch_size": 10, "samples": 10, "bottleneck": 8, "dropout": 0},
    "mos": {
        "name": "mos",
        "epochs": 2,
        "train_batch_size": 17,
        "samples": 10,
        "contrast": 5,
        "bottleneck": 8,
        "dropout": 0,
    },
}
"""Batches of 7 and 10 of 18 and 72 images leave last batches that no two processes can share evenly. Losses that
compare a step's images weigh enough to be missed, and batches of 17 of 18 leave a last image to one process alone."""

FROZEN = ("ncm", "ranpac", "fecam")
"""Their features come in whole batches on either process, hence every bit is that of one process."""


def same_hits(learner: str, one: list[int], two: list[int]) -> bool:
    """Equal; after training up to one image: sums over processes round otherwise, and a tie may fall either way."""
    return np.abs(np.subtract(one, two)).max() <= (learner not in FROZEN)


def command(results: Path, learners: Sequence[str]) -> list[str]:
    entries = [{**LEARNERS[label], "label": label} for label in learners]
    changes = ["data.per_class=18", "stream.validation=0.5", "stream.test_on=validation"]  # 9 to train, 9 to test
    changes += [f"learners={json.dumps(entries)}", "orders=[1993]", "stream.sizes=[2, 8]"]
    changes += ["stream.increment=null", "inference_batch_size=16", "hardware.device=cpu"]
    changes += ["backbone.weights=random", "backbone.options={depth: 2}"]
    return ["run", "quickstart", *changes, "--results", str(results)]


def launch(results: Path, processes: int, *more: str, learners=tuple(LEARNERS)) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "accelerate.commands.launch"]
    start += ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]  # --cpu would start one process
    start += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    return subprocess.run(
        [*start, "cil", *command(results, learners), *more],
        capture_output=True,
        text=True,
        timeout=350,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "CIL_CACHE": str(results / "cache"),
        },
    )


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[int, Path]:
    """Processes → results folder of a whole benchmark run with so many; the one process is this one."""
    found = {processes: tmp_path_factory.mktemp(f"processes{processes}") for processes in (1, 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIL_CACHE", str(found[1] / "cache"))
        patch.setattr(sys, "argv", ["cil", *command(found[1], tuple(LEARNERS))])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    done = launch(found[2], 2)
    assert done.returncode == 0, done.stderr[-3000:]
    return found


def run_of(place: Path, learner: str) -> Path:
    return place / "quickstart" / learner / "order1993-seed0"


def check_metrics(places: dict[int, Path], learner: str) -> None:
    one, two = (read_run(run_of(places[n], learner)) for n in (1, 2))
    assert one["machine"]["processes"] == 1 and two["machine"]["processes"] == 2
    assert one["complete"] and two["complete"]
    for a, b in zip(one["stages"], two["stages"], strict=True):
        assert a["total"] == b["total"] and a["unchanged_since"] == b["unchanged_since"]
        for key in ("correct", "correct_within_task"):
            assert same_hits(learner, a[key], b[key]), key
        for cost in ("train_passes", "test_passes", "train_images", "trainable_parameters"):
            assert a["costs"][cost] == b["costs"][cost], cost  # nothing computed twice, nothing padded
        logged = [[value for name, value in row["log"] if name in ("loss", "accuracy")] for row in (a, b)]
        np.testing.assert_allclose(*logged, rtol=1e-3, atol=1e-3)


def check_state(places: dict[int, Path], learner: str) -> None:
    for stage in ("stage-00", "stage-01"):
        one, two = (load_file(run_of(places[n], learner) / stage / "learner.safetensors") for n in (1, 2))
        assert one.keys() == two.keys()
        for key in one:
            if learner in FROZEN:
                assert torch.equal(one[key], two[key]), key
            else:
                torch.testing.assert_close(one[key], two[key], rtol=2e-3, atol=2e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_two_processes_give_what_one_gives(cil, tmp_path):  # noqa: F811
    """One learner that trains nothing and one that trains; the one process is this one."""
    places, chosen = {1: tmp_path / "one", 2: tmp_path / "two"}, ("ncm", "aper")
    assert cil(*command(places[1], chosen)).returncode == 0
    places[2].mkdir()
    for status, _, err in together(code(*command(places[2], chosen)), 2, places[2]):
        assert status == 0, err[-3000:]
    for learner in chosen:
        check_metrics(places, learner)
        check_state(places, learner)


@pytest.mark.slow
@pytest.mark.parametrize("learner", LEARNERS)
def test_two_processes_give_the_metrics_of_one(places, learner):
    check_metrics(places, learner)


@pytest.mark.slow
@pytest.mark.parametrize("learner", LEARNERS)
def test_two_processes_end_with_the_state_of_one(places, learner):
    check_state(places, learner)


@pytest.mark.slow
def test_only_the_main_process_writes(places):
    for n in (1, 2):
        assert len(list(run_of(places[n], "ncm").glob("events.*"))) == 1


@pytest.mark.slow
def test_a_run_begun_by_one_process_goes_on_with_two(places, tmp_path):
    """Finished runs are skipped by both, and the main process alone says so."""
    begun, finished = ("ncm", "aper", "slca", "l2p"), ("fecam", "ease")
    for learner in begun + finished:
        shutil.copytree(run_of(places[1], learner), run_of(tmp_path, learner))
    for learner in begun:
        shutil.rmtree(run_of(tmp_path, learner) / "stage-01")
    done = launch(tmp_path, 2, learners=begun + finished)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("finished already") == len(finished)
    for learner in begun:
        rows = [read_run(run_of(p, learner))["stages"] for p in (places[1], tmp_path)]
        assert all(same_hits(learner, a["correct"], b["correct"]) for a, b in zip(*rows, strict=True)), learner


def test_a_mistake_is_said_once(tmp_path):
    ended = together(code(*command(tmp_path, tuple(LEARNERS)), "learners.ncm.metric=cosin"), 2, tmp_path)
    said = "".join(err for _, _, err in ended)
    assert [status for status, _, _ in ended] == [2, 2]
    assert said.count("cil: ") == 1 and "metric" in said
