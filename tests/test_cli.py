"""The command line as a user meets it: help at once, one clear line for a mistake, exit codes, predictions by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image
from test_runner import FAST, TINY, settings

from cil.cli import main
from cil.runner import run


@pytest.fixture
def cil(monkeypatch, capsys):
    """Run the command in this process; (exit code, stdout, stderr)."""

    def command(*arguments, cwd=None):
        monkeypatch.setattr(sys, "argv", ["cil", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        if cwd is not None:
            monkeypatch.chdir(cwd)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return command


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def write(path, **changes):
    path.write_text(yaml.safe_dump({**FAST, **changes}))
    return path


HEAVY = ("torch", "timm", "avalanche", "peft", "numpy", "sklearn", "scipy", "matplotlib", "PIL", "accelerate")


def test_help_refusals_and_the_first_line_of_a_run_import_nothing_heavy():
    code = """
import sys
from typer.testing import CliRunner
from cil.cli import app
assert "check-learner" in CliRunner().invoke(app, ["--help"]).output
assert "learners, tuners, rules" in CliRunner().invoke(app, ["list", "--help"]).output
assert "did you mean 'ranpac'" in str(CliRunner().invoke(app, ["run", "quickstart", "learner=ranpak"]).exception)
key = "learners=[{name: ranpac, tuner: {name: ssf, rank: 3}, projectin: 5}]"
wrong = str(CliRunner().invoke(app, ["run", "quickstart", key]).exception)
assert "unknown key tuner.rank" in wrong and "did you mean 'projection'" in wrong, wrong
sys.modules["cil.runner"] = None  # its import fails here: all that follows is answered before it
for change, reason in {
    "steram.increment=2": "unknown key steram (did you mean 'stream'?)",
    "learner=ranpak": "did you mean 'ranpac'",
    "learner.metricc=cosine": "unknown key metricc (did you mean 'metric'?)",
    "--grid=learner.metricc=cosine,euclidean": "unknown key metricc (did you mean 'metric'?)",
    "--grid=learners.ncmm.metric=cosine,euclidean": "no learner 'ncmm' (did you mean 'ncm'?)",
    "--grid=steram.increment=2,5": "unknown key steram",
}.items():
    for command in "sweep", "tune":
        given = ["quickstart", "learner=ncm", change]
        wrong = str(CliRunner().invoke(app, [command, *given]).exception)
        assert reason in wrong and len(wrong.splitlines()) == 1, (command, wrong)
for kind, name in {"learners": "ranpac", "tuners": "vpt_deep", "rules": "opcm", "configs": "quickstart"}.items():
    assert name in CliRunner().invoke(app, ["list", kind]).output, kind
changes = ["learners=[ncm, ranpac]", "seeds=[0, 1]", "orders=[1, 2]", "--results", "here"]
first = CliRunner().invoke(app, ["run", "quickstart", *changes])
assert first.output.startswith("8 runs of ncm, ranpac on digits, to here"), first.output
assert isinstance(first.exception, ImportError)
"""
    code += f"print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert found.stdout.strip() == "[]"


def test_errors_reach_the_shell(tmp_path):
    """The one that goes through a process of its own: stderr, exit code, no traceback."""
    found = subprocess.run(
        [sys.executable, "-m", "cil", "run", "no_such_config"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("cil: no_such_config: no such file") and len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command", ["run", "compare", "tensorboard", "list", "check-learner", "new-learner", "merge", "predict"]
)
def test_every_command_has_help(cil, command):
    assert cil(command, "--help").returncode == 0


MISTAKES = {
    "unknown key": ({"stream": {"incremnt": 2}}, [], "unknown key stream.incremnt (did you mean 'increment'?)"),
    "wrong type": ({"stream": {"increment": "two"}}, [], "stream.increment: should be a valid integer"),
    "unknown learner": ({"learners": ["nmc"]}, [], "unknown learner 'nmc' (did you mean 'ncm'?)"),
    "class counts": (
        {"stream": {"sizes": [4, 4]}},
        [],
        "adds up to 8, the dataset has 10 classes; would fit: [4, 4, 2]",
    ),
    "override": ({}, ["stream.increment=99"], "stream.increment: 99 does not fit 10 classes; allowed: 1 to 10"),
    "learner key": ({}, ["learner.metrc=cosine"], "learner ncm: unknown key metrc (did you mean 'metric'?)"),
    "missing data": ({"data": {"dataset": "folder", "root": "nowhere"}}, [], "data.root: nowhere is not a folder"),
    "missing weights": ({"backbone": {**TINY, "weights": "w.pth"}}, [], "backbone.weights: w.pth: no such file"),
    "no such device": ({}, ["hardware.device=cuda:77"], "hardware.device"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(cil, tmp_path, mistake):
    changes, overrides, message = MISTAKES[mistake]
    found = cil("run", write(tmp_path / "c.yaml", **changes), *overrides, cwd=tmp_path)
    assert found.returncode == 2
    assert message in found.stderr and len(found.stderr.strip().splitlines()) == 1, found.stderr
    assert "Traceback" not in found.stderr + found.stdout
    assert not list(tmp_path.glob("results/**/metrics.json"))  # nothing half-written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no_such_config"], "no such file, nor a shipped configuration"),
        (["compare", "nowhere"], "nowhere: no such folder"),
        (["predict", "nowhere", "a.png"], "no metrics.json there"),
        (["list", "learner"], "did you mean 'learners'"),
        (["list", "learners", "nmc"], "no name matches 'nmc'; nearest: ncm"),
        (["list", "datasets", "CFAR100"], "no name matches 'CFAR100'; nearest: torch/cifar100"),
        (["list", "backbones", "xyz*"], "no name matches 'xyz*'; `cil list backbones` lists them"),
        (["check-learner", "nowhere.py:Mine"], "no such file nowhere.py"),
    ],
)
def test_other_commands_fail_the_same_way(cil, tmp_path, arguments, message):
    found = cil(*arguments, cwd=tmp_path)
    assert found.returncode == 2 and message in found.stderr and len(found.stderr.strip().splitlines()) == 1


def test_run_compare_predict_and_run_again(cil, tmp_path):
    config = write(tmp_path / "c.yaml", learners=["ncm", {"name": "linear_probe", "epochs": 1}])
    first = cil("run", config, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "ncm order1993-seed0  stage 3/3  accuracy" in first.stdout and "A_last %" in first.stdout
    assert (tmp_path / "results/t/compare.png").exists() and (tmp_path / "results/t/compare.html").exists()
    code = f"""
import sys
from cil.cli import main
sys.argv = ["cil", "run", {str(config)!r}]
try:
    main()
except SystemExit as ended:
    assert not ended.code
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    same_copy = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}  # of cil, not an installed one
    command = [sys.executable, "-c", code]
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100, env=same_copy)
    assert again.returncode == 0 and again.stdout.count("finished already") == 2 and "A_last %" in again.stdout
    assert again.stdout.endswith("['numpy']\n"), again.stdout  # neither torch nor matplotlib
    compared = cil("compare", tmp_path / "results", "--out", tmp_path / "out", cwd=tmp_path)
    assert compared.returncode == 0 and (tmp_path / "out/compare.html").exists()

    from cil.data.sources import digits

    source = digits("test")
    folder = tmp_path / "results/t/ncm/order1993-seed0"
    source.read(0).save(tmp_path / "digit.png")
    (tmp_path / "broken.png").write_text("no image")
    found = cil("predict", folder, tmp_path / "digit.png", "--top", "3")
    assert found.returncode == 0, found.stderr
    names = [part.split(" (")[0] for part in found.stdout.strip().split(": ", 1)[1].split(", ")]
    assert len(names) == 3 and set(names) <= set(source.class_names)
    broken = cil("predict", folder, tmp_path / "broken.png")
    assert broken.returncode == 2 and "not a readable image" in broken.stderr


def test_predict_gives_what_the_evaluator_counted(tmp_path):
    """A class's mean image is nearest to its own class mean, and its name comes out."""
    from cil.data.sources import digits
    from cil.prediction import predict

    [folder] = run(settings(), tmp_path)
    source = digits("train")
    path = tmp_path / "seven.png"
    Image.fromarray(
        np.mean([np.asarray(source.read(i)) for i in np.flatnonzero(source.labels == 7)], axis=0).astype(np.uint8)
    ).save(path)
    [(shown, ranked)] = predict(folder, [path], top=10)
    assert shown == path and sorted(n for n, _ in ranked) == sorted(source.class_names)
    assert [v for _, v in ranked] == sorted((v for _, v in ranked), reverse=True)


LISTED = {
    ("learners", ""): ["ncm", "linear_probe", "finetune", "joint", "aper", "merge_oracle"],
    ("learners", "merge"): ["merge", "merge_lca", "merge_oracle"],
    ("learners", "MERGE_*"): ["merge_lca", "merge_oracle"],
    ("tuners", "vpt"): ["vpt_shallow", "vpt_deep"],
    ("rules", "*ties"): ["ties", "continual_ties", "dare_ties"],
    ("rules", "lin"): ["lines"],
    ("datasets", "cifar"): ["torch/cifar10", "torch/cifar100"],
    ("backbones", "tinyimagenet"): ["vit_tiny_patch8_64.tinyimagenet100"],
    ("backbones", "ResNet50.a1_in1k*"): ["resnet50.a1_in1k"],
    ("configs", "quick*"): ["quickstart"],
}


@pytest.mark.parametrize(("kind", "pattern"), LISTED)
def test_a_list_holds_the_names_that_match(cil, kind, pattern):
    found = cil("list", kind, *([pattern] if pattern else []))
    assert found.returncode == 0, found.stderr
    names = [line.split()[0] for line in found.stdout.splitlines()[1:] if not line.startswith(" ")]
    assert names == LISTED[kind, pattern] or (not pattern and set(names) > set(LISTED[kind, pattern]))


def test_lists_say_what_a_name_is(cil):
    assert "kept" in cil("list", "learners", "joint").stdout
    assert "one adapter per task" in cil("list", "learners", "ease").stdout
    listed = cil("list", "tuners").stdout
    assert all(name in listed for name in ("adapter", "vpt_deep", "prefix", "osf")) and "bottleneck: 64" in listed
    assert "cil[hf]" in cil("list", "datasets").stdout
    backbones = cil("list", "backbones").stdout
    assert "vit_base_patch16_224.augreg_in21k" in backbones and "resnet" not in backbones


MINE = '''
from cil import Learner
from cil.classifiers import NCM


class Mine(Learner):
    """A nearest class mean of one's own."""

    paper = "none"

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.ncm = NCM(backbone.feature_dim)

    def learn(self, task, ctx):
        self.ncm.partial_fit(*ctx.features(self, task.train))

    def logits(self, features):
        return self.ncm.logits(features)
'''


def test_a_learner_from_one_file_is_checked_and_run(cil, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    checked = cil("check-learner", "mine.py:Mine", cwd=tmp_path)
    assert checked.returncode == 0 and "all checks passed" in checked.stdout, checked.stdout
    (tmp_path / "leaky.py").write_text(MINE.replace("logits(features)", "logits(features - features.mean(0))"))
    leaky = cil("check-learner", "leaky.py:Mine", cwd=tmp_path)
    assert leaky.returncode == 1 and "FAILED batch_independence" in leaky.stdout
    config = write(tmp_path / "c.yaml", learners=["ncm", {"class": "mine.py:Mine"}])
    ran = cil("run", config, cwd=tmp_path)
    assert ran.returncode == 0 and "Mine order1993-seed0  stage 3/3" in ran.stdout, ran.stderr
