"""The note by which `cil run` knows a finished benchmark at once: what it takes for unchanged, and what it does not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from cil import finished
from cil.cli import benchmark, main
from cil.config import Config

RUN = "ncm/order1993-seed0"
FAST = {
    "name": "t",
    "backbone": {"name": "vit_tiny_patch16_224", "weights": "random"},
    "stream": {"increment": 4},
    "learners": ["ncm"],
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with two class folders of images, and with what a finished run on them leaves."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / "data" / split / name / "0.png")
    (tmp_path / "results/t" / RUN / "stage-00").mkdir(parents=True)
    for name in ("metrics.json", "stage-00/stage.json", "../../compare.html"):
        (tmp_path / "results/t" / RUN / name).write_text("{}")
    return tmp_path


def config(**changes) -> Config:
    return Config.model_validate({**FAST, "data": {"dataset": "folder", "root": "data"}, **changes})


def noted(config: Config) -> finished.Finished | None:
    """What a second command finds after the note of a first one."""
    root = Path("results")
    finished.note(config, root, finished.inputs(config), [root / "t" / RUN], [root / "t/compare.html"])
    return finished.unchanged(config, root)


def test_unchanged_files_are_finished_and_their_overview_is_up_to_date(place):
    root = Path("results")
    assert noted(config()) == ([root / "t" / RUN], [root / "t/compare.html"])
    (place / "results/t/compare.html").write_text("edited")
    assert finished.unchanged(config(), root) == ([root / "t" / RUN], [])  # to be written again
    (place / "results/t/other").mkdir()
    (place / "results/t/other/metrics.json").write_text("{}")  # a further run belongs into it
    assert finished.unchanged(config(), root) == ([root / "t" / RUN], [])


CHANGES = {
    "an image more": lambda: Image.new("RGB", (4, 4)).save("data/train/a/1.png"),
    "an image less": lambda: Path("data/test/b/0.png").unlink(),
    "a file changed": lambda: os.utime("data/train/a/0.png", ns=(1, 1)),
    "a run changed": lambda: Path(f"results/t/{RUN}/metrics.json").write_text("{ }"),
    "a run gone": lambda: Path(f"results/t/{RUN}/metrics.json").unlink(),
    "a stage gone": lambda: Path(f"results/t/{RUN}/stage-00/stage.json").unlink(),
    "a damaged note": lambda: Path("results/t/.finished.json").write_text("{"),
    "no note": lambda: Path("results/t/.finished.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_files_leaves_it_to_the_runner(place, change):
    assert noted(config()) is not None
    CHANGES[change]()
    assert finished.unchanged(config(), Path("results")) is None


def test_what_changes_during_the_runs_counts_as_changed(place):
    before = finished.inputs(config())
    CHANGES["an image more"]()
    finished.note(config(), Path("results"), before, [Path("results/t") / RUN], [])
    assert finished.unchanged(config(), Path("results")) is None


def test_other_settings_versions_and_code_leave_it_to_the_runner(place, monkeypatch):
    assert noted(config()) is not None
    for changes in (
        {"seeds": [1]},
        {"learners": [{"name": "ncm", "metric": "euclidean"}]},
        {"stream": {"increment": 2}},
    ):
        assert finished.unchanged(config(**changes), Path("results")) is None
    with monkeypatch.context() as patched:
        patched.setattr(finished, "version", lambda package: "0")
        assert finished.unchanged(config(), Path("results")) is None
    elsewhere = place / "package"
    elsewhere.mkdir()
    (elsewhere / "finished.py").write_text("")
    monkeypatch.setattr(finished, "__file__", str(elsewhere / "finished.py"))  # as after an update of the package
    assert finished.unchanged(config(), Path("results")) is None


def test_what_is_not_known_from_files_has_no_note(place):
    timm = {"name": "vit_tiny_patch16_224.augreg_in21k"}
    (place / "data/images.csv").write_text("a/0.png,a\n")
    (place / "more").mkdir()
    (place / "more/list.txt").write_text("")
    for changes in (
        {},  # a list of images beside the folders
        {"data": {"dataset": "hfds/org/set"}},
        {"data": {"dataset": "mine.py:images"}},
        {"data": {"dataset": "torch/cifar10"}},
        {"data": {}, "backbone": timm},
        {"data": {}, "backbone": {**timm, "name": "hf-hub:org/model"}},
        {"data": {}, "learners": [{"class": "mine.py:Mine"}]},
        {"data": {}, "learners": [{"name": "aper", "tuner": {"class": "mine.py:Mine"}}]},
        {"data": {}, "learners": [{"name": "of_another_package"}]},
        {"data": {}, "stream": {"type": "class_incremental", "increment": 2, "shots_files": "more"}},
    ):
        assert noted(config(**changes)) is None and not Path("results/t/.finished.json").exists(), changes
    assert noted(config(data={})) is not None  # the digits


def test_the_command_does_not_reach_the_runner(place, monkeypatch, capsys):
    """Two finished runs are named, the table is printed, and figures that fit are left alone."""
    (place / "c.yaml").write_text("learner: ncm\n")
    shown = []
    monkeypatch.setattr(
        finished, "unchanged", lambda config, root: finished.Finished([root / "c" / RUN], [Path("x.png")])
    )
    monkeypatch.setattr(benchmark, "show_results", lambda folder, overview: shown.append((folder, overview)))
    monkeypatch.setattr("sys.argv", ["cil", "run", "c.yaml"])
    monkeypatch.setitem(sys.modules, "cil.runner", None)  # its import would fail
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and f"ncm order1993-seed0  finished already: results/c/{RUN}" in capsys.readouterr().out
    assert shown == [(Path("results/c"), [Path("x.png")])]
