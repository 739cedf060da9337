"""Run folders and what has changed since: data, settings, code, versions, places. What a message advises then works."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from marks import slow_beyond
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import cil, write  # noqa: F401 - a fixture
from test_runner import TINY, settings, stable

from cil import results
from cil.config import code
from cil.data.images import subset
from cil.data.sources import combine_domains, from_arrays
from cil.errors import DataError, PluginError, RunError
from cil.learners.ncm import NCMLearner
from cil.runner import identity, run
from cil.runner.checkpoint import RunFolder
from cil.utils import files

RUN = "order1993-seed0"
NATURAL = "ordernatural-seed0"
STAGES = 3

MINE = """
from next_to_mine import FACTOR
from cil.learners.ncm import NCMLearner
class Mine(NCMLearner):
    SIGN = 1
    def logits(self, features): return self.SIGN * FACTOR * super().logits(features)
"""


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Three tasks of two classes, six images per class and split; images are decoded when they are first used."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.RandomState(0)
    for split in ("train", "test"):
        for name in "abcdef":
            place = tmp_path / "set" / split / name
            place.mkdir(parents=True)
            for i in range(6):
                Image.fromarray(rng.randint(0, 256, (16, 16, 3)).astype(np.uint8)).save(place / f"{i}.png")
    return tmp_path / "set"


def from_folder(**changes):
    data = {"dataset": "folder", "root": "set", **changes.pop("data", {})}
    machine = {"device": "cpu", "memory_gib": 0, "feature_store": "off", "workers": 0, **changes.pop("hardware", {})}
    return settings(**{"stream": {"increment": 2}, "orders": ["natural"], "data": data, "hardware": machine, **changes})


def break_file(file: Path) -> bytes:
    good = file.read_bytes()
    file.write_bytes(good[:100])
    return good


def stored(place: Path) -> dict:
    """The content of metrics.json, to be written again after a change by hand: without its checksum."""
    return {k: v for k, v in json.loads((place / "metrics.json").read_text()).items() if k != "checksum"}


def same(one: Path, two: Path) -> None:
    """Two folders of the same run, bit for bit."""
    assert stable(results.read_run(one)) == stable(results.read_run(two))
    for stage in range(STAGES):
        for name in ("learner.safetensors", "predictions.safetensors"):
            a, b = (load_file(place / f"stage-{stage:02d}" / name) for place in (one, two))
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "task", "split"),
    slow_beyond(
        [("repaired", 1, "train"), ("skipped", 2, "test")],
        itertools.product(["repaired", "removed", "skipped"], range(STAGES), ["train", "test"]),
    ),
)
def test_the_advice_about_a_broken_file_works(pictures, tmp_path, split, task, way):
    """Whichever stage meets the file: repair it, remove it, or skip it; finished stages are kept as they are."""
    broken = pictures / split / "abcdef"[2 * task] / "3.png"
    good = break_file(broken)
    with pytest.raises(DataError, match=f"{split}/.*3.png: not a readable image.*repair or remove it, or set data"):
        run(from_folder(), "results")
    place = Path("results") / "t" / "ncm" / NATURAL
    assert RunFolder(place).finished() == task
    before = [(place / f"stage-{i:02d}" / "learner.safetensors").stat().st_mtime_ns for i in range(task)]
    config = from_folder()
    if way == "repaired":
        broken.write_bytes(good)
    elif way == "removed":
        broken.unlink()
    else:
        config = from_folder(data={"on_error": "skip"})
    run(config, "results")
    assert before == [(place / f"stage-{i:02d}" / "learner.safetensors").stat().st_mtime_ns for i in range(task)]
    found = results.read_run(place)
    assert found["complete"] and found["data"][split]["images"] == (36 if way == "repaired" else 35)
    assert found["config"]["data"]["on_error"] == config.data.on_error
    run(config, "whole")
    for stage in range(STAGES):
        file = Path("t/ncm") / NATURAL / f"stage-{stage:02d}" / "learner.safetensors"
        a, b = (load_file(top / file) for top in (Path("results"), Path("whole")))
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert run(from_folder(data={"on_error": "skip"}), "results") == [place]  # the same images: the same run


@pytest.mark.parametrize(
    ("change", "split"),
    slow_beyond([("edited", "train")], itertools.product(["edited", "removed", "added", "renamed"], ["train", "test"])),
)
def test_a_finished_stage_is_bound_to_its_images(pictures, cil, split, change):  # noqa: F811
    """A change in task 1 is refused, says from which stage on, and --redo computes exactly these stages again."""
    [place] = run(from_folder(), "results")
    file = pictures / split / "c" / "3.png"
    if change == "edited":
        Image.new("RGB", (16, 16)).save(file)
    elif change == "removed":
        file.unlink()
    elif change == "added":
        shutil.copy(file, file.with_name("9.png"))
    else:
        file.rename(file.with_name("33.png"))
    name = {"train": "training", "test": "test"}[split]
    with pytest.raises(RunError, match=rf"{name} images of task 1 .*; stage-01 to stage-02 depend on it: .*--redo"):
        run(from_folder(), "results")
    kept = (place / "stage-00" / "learner.safetensors").stat().st_mtime_ns
    run(from_folder(), "results", redo=True)
    assert (place / "stage-00" / "learner.safetensors").stat().st_mtime_ns == kept
    run(from_folder(), "whole")
    one, two = (results.read_run(Path(p) / "t/ncm" / NATURAL) for p in ("results", "whole"))
    assert stable(one) == stable(two)


@pytest.mark.slow
def test_a_class_added_at_the_end_is_one_more_task(pictures):
    run(from_folder(), "results")
    for split in ("train", "test"):
        for name in "gh":
            shutil.copytree(pictures / split / "a", pictures / split / name)
    [place] = run(from_folder(), "results")
    assert RunFolder(place).finished() == 4 and results.read_run(place)["complete"]
    for split in ("train", "test"):
        for name in "efgh":
            shutil.rmtree(pictures / split / name)
    with pytest.raises(RunError, match=r"classes of task 2 = \['e', 'f'\], now None; stage-02 to stage-03 depend"):
        run(from_folder(), "results")
    run(from_folder(), "results", redo=True)
    assert RunFolder(place).finished() == 2 and results.read_run(place)["complete"]


def test_folders_of_before_are_compared_by_the_whole_split(pictures):
    """Headers without digests of tasks and code keep the check they had."""
    [place] = run(from_folder(), "results")
    held = stored(place)
    for split in ("train", "test"):
        del held["data"][split]["tasks"]
    del held["code"]
    (place / "metrics.json").write_text(json.dumps(held))
    assert run(from_folder(), "results") == [place]
    Image.new("RGB", (16, 16)).save(pictures / "train" / "f" / "3.png")
    with pytest.raises(RunError, match=r"train data \(sha256\) = .*stage-00 to stage-02 depend"):
        run(from_folder(), "results")


@examples(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_the_digest_of_images_depends_on_these_images_alone(data):
    count = data.draw(st.integers(4, 12))
    labels = np.array(data.draw(st.permutations(list(np.arange(count) % 2))))
    pixels = np.random.RandomState(data.draw(st.integers(0, 99))).randint(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    source = from_arrays(pixels, labels, ["x", "y"])
    chosen = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True)))
    other = np.setdiff1d(np.arange(count), chosen)
    digest = source.fingerprint_of(chosen)
    if len(other):
        changed = pixels.copy()
        changed[data.draw(st.sampled_from(other.tolist()))] ^= 1
        again = from_arrays(changed, labels, ["x", "y"])
        assert again.fingerprint_of(chosen) == digest and again.fingerprint != source.fingerprint
        good = np.sort(np.append(chosen, other[1:]))  # without one of the others, positions move
        if len(set(labels[good])) == 2:
            moved = np.searchsorted(good, chosen)
            assert subset(source, good, "").fingerprint_of(moved) == digest
    changed = pixels.copy()
    changed[data.draw(st.sampled_from(chosen.tolist())), 0, 0, 0] ^= 1
    assert from_arrays(changed, labels, ["x", "y"]).fingerprint_of(chosen) != digest
    assert from_arrays(pixels, labels, ["y", "x"]).fingerprint_of(chosen) != digest
    both = combine_domains([source, from_arrays(pixels ^ 1, labels, ["x", "y"])])
    assert both.fingerprint_of(chosen) == digest != both.fingerprint_of(chosen + count)


# --- settings and stages ----------------------------------------------------------------------------------------------


def test_a_folder_without_a_finished_stage_is_no_run(tmp_path):
    """Whatever its metrics.json says; also one that cannot be read."""
    place = tmp_path / "t" / "ncm" / RUN
    for text in ('{"complete": false, "stages": []}', "{", ""):
        place.mkdir(parents=True, exist_ok=True)
        (place / "metrics.json").write_text(text)
        run(settings(), tmp_path)
        assert results.read_run(place)["complete"] and (place / "config.yaml").exists()
        shutil.rmtree(place)


@pytest.mark.slow
def test_a_lower_lr_after_a_nan(tmp_path, cil, monkeypatch):  # noqa: F811
    """In the first stage the repaired command runs; later it says what depends on the rate, and --redo does it."""
    monkeypatch.chdir(tmp_path)

    def config(lr, **changes):
        entry = {"name": "finetune", "epochs": 1, "train_batch_size": 64, "lr": lr}
        return write(tmp_path / "c.yaml", learners=[entry], **changes)

    ended = cil("run", config(1e9, name="first"))
    assert ended.returncode == 2 and "lower the learner's lr" in ended.stderr and "--redo" not in ended.stderr
    assert cil("run", config(1e-4, name="first")).returncode == 0
    assert cil("run", config(1e-4)).returncode == 0
    place = Path("results/t/finetune") / RUN
    shutil.rmtree(place / "stage-02")
    monkeypatch.setattr("cil.training.loop.math", SimpleNamespace(isfinite=lambda value: False, ceil=math.ceil))
    ended = cil("run", config(1e-4))
    assert (
        ended.returncode == 2 and "set its clip. Finished stages are kept" in ended.stderr and "--redo" in ended.stderr
    )
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    ended = cil("run", config(1e-5))
    assert ended.returncode == 2 and "stage-00 to stage-01 depend on it: run again with --redo" in ended.stderr
    ended = cil("run", config(1e-5), "--redo")
    assert ended.returncode == 0 and "stage 1/3 is computed again" in ended.stdout
    assert cil("run", config(1e-5), "--results", "alone").returncode == 0
    same(place, Path("alone/t/finetune") / RUN)


@pytest.mark.parametrize(
    ("stage", "checkpoints"), slow_beyond([(1, "all"), (2, "last")], itertools.product(range(STAGES), ["all", "last"]))
)
def test_a_removed_stage_is_computed_again(tmp_path, stage, checkpoints):
    """As the message about a damaged stage advises, though metrics.json says that the run is complete."""
    machine = {"device": "cpu", "checkpoints": checkpoints}
    [place] = run(settings(hardware=machine), tmp_path)
    shutil.copytree(place, tmp_path / "before")
    shutil.rmtree(place / f"stage-{stage:02d}")
    if checkpoints == "last" and stage:
        with pytest.raises(RunError, match="not there, so nothing can continue from this stage; run again with --redo"):
            run(settings(hardware=machine), tmp_path)
        run(settings(hardware=machine), tmp_path, redo=True)
    else:
        run(settings(hardware=machine), tmp_path)
    assert stable(results.read_run(place)) == stable(results.read_run(tmp_path / "before"))
    if checkpoints == "all":
        same(place, tmp_path / "before")


@pytest.mark.parametrize("damage", slow_beyond(["missing"], ["missing", "damaged"]))
def test_without_metrics_the_ways_that_are_named_work(tmp_path, damage):
    [place] = run(settings(), tmp_path)
    shutil.copytree(place, tmp_path / "before")
    if damage == "missing":
        (place / "metrics.json").unlink()
    else:
        (place / "metrics.json").write_text("{")
    with pytest.raises(RunError, match="move"):
        run(settings(), tmp_path)
    run(settings(), tmp_path, redo=True)
    same(place, tmp_path / "before")
    (place / "metrics.json").unlink()
    place.rename(tmp_path / "away")
    run(settings(), tmp_path)
    same(place, tmp_path / "before")


@pytest.mark.slow
def test_redo_changes_nothing_where_nothing_has_changed(tmp_path):
    [place] = run(settings(), tmp_path)
    before = {file: file.stat().st_mtime_ns for file in place.rglob("*") if file.name != "run.lock"}
    run(settings(), tmp_path, redo=True)
    assert before == {file: file.stat().st_mtime_ns for file in place.rglob("*") if file.name != "run.lock"}


# --- code, versions and places ----------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A finished run of a custom learner, with weights from a file; the working folder is then another one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "next_to_mine.py").write_text("FACTOR = 1.0\n")
    save_file(timm.create_model(TINY["name"], **TINY["options"]).state_dict(), "w.safetensors")
    config = {"learners": [{"class": "mine.py:Mine"}], "backbone": {**TINY, "weights": "w.safetensors"}}
    [place] = run(settings(**config), tmp_path / "results")
    Image.new("RGB", (8, 8)).save("p.png")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return place, config


def test_a_run_works_from_any_folder(mine, cil, tmp_path):  # noqa: F811
    place, _ = mine
    assert cil("predict", place, tmp_path / "p.png").returncode == 0
    assert cil("export", place).returncode == 0
    assert cil("predict", place / "export-safetensors", tmp_path / "p.png").returncode == 0
    shutil.rmtree(place / "stage-02")
    ended = cil("run", place / "config.yaml", "--results", tmp_path / "results")
    assert ended.returncode == 0 and "stage 3/3" in ended.stdout


def test_moved_weights_and_code_are_given_by_options(mine, cil, tmp_path):  # noqa: F811
    place, _ = mine
    before = cil("predict", place, tmp_path / "p.png").stdout
    assert cil("export", place, "--out", tmp_path / "exported").returncode == 0
    (tmp_path / "new").mkdir()
    for name in ("w.safetensors", "mine.py", "next_to_mine.py"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    weights, source = tmp_path / "new" / "w.safetensors", tmp_path / "new" / "mine.py"
    ended = cil("predict", place, tmp_path / "p.png")
    assert ended.returncode == 2 and re.search("mine.py: no such file.*--code FILE.py", ended.stderr)
    ended = cil("predict", place, tmp_path / "p.png", "--code", source)
    assert ended.returncode == 2 and re.search("no file .*w.safetensors.*--weights FILE", ended.stderr)
    assert cil("predict", place, tmp_path / "p.png", "--code", source, "--weights", weights).stdout == before
    assert cil("export", place, "--code", source, "--weights", weights).returncode == 0
    assert cil("predict", tmp_path / "exported", tmp_path / "p.png", "--code", source).stdout == before
    ended = cil("predict", tmp_path / "exported", tmp_path / "p.png", "--code", source, "--weights", weights)
    assert ended.returncode == 2 and "leave it out" in ended.stderr
    other = timm.create_model(TINY["name"], **TINY["options"]).state_dict()
    save_file({key: value + 1 for key, value in other.items()}, tmp_path / "other.safetensors")
    ended = cil("predict", place, tmp_path / "p.png", "--code", source, "--weights", tmp_path / "other.safetensors")
    assert ended.returncode == 2 and "the run used backbone weights with sha256" in ended.stderr


@pytest.mark.slow
def test_a_run_is_resumed_with_moved_weights_code_and_results(mine, tmp_path):
    place, config = mine
    (tmp_path / "new").mkdir()
    for name in ("w.safetensors", "mine.py", "next_to_mine.py", "results"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    config = {
        "learners": [{"class": str(tmp_path / "new" / "mine.py:Mine")}],
        "backbone": {**TINY, "weights": str(tmp_path / "new" / "w.safetensors")},
    }
    place = tmp_path / "new" / place.relative_to(tmp_path)
    shutil.rmtree(place / "stage-02")
    assert run(settings(**config), tmp_path / "new" / "results") == [place]
    assert results.read_run(place)["complete"]


@pytest.mark.parametrize("file", slow_beyond(["mine.py"], ["mine.py", "next_to_mine.py"]))
def test_edited_code_is_another_run(mine, cil, tmp_path, monkeypatch, caplog, file):  # noqa: F811
    """Never 'finished already' with old numbers: refused, or computed again, and said where a model is only used."""
    place, config = mine
    monkeypatch.chdir(tmp_path)
    write(Path("c.yaml"), **config)
    text = Path(file).read_text()
    Path(file).write_text(text.replace("SIGN = 1", "SIGN = -1").replace("FACTOR = 1.0", "FACTOR = -1.0"))
    sys_modules_without_beside(monkeypatch)
    ended = cil("run", "c.yaml")
    named = "class" if file == "mine.py" else "next_to_mine.py"
    assert ended.returncode == 2 and f"code of learners.0.{named} (sha256)" in ended.stderr and "--redo" in ended.stderr
    assert cil("predict", place, tmp_path / "p.png").returncode == 0
    assert "the code of its learner has changed since it was trained" in caplog.text and named in caplog.text
    old = results.read_run(place)["summary"]["accuracy_last"]
    assert cil("run", "c.yaml", "--redo").returncode == 0
    assert results.read_run(place)["summary"]["accuracy_last"] < old
    assert cil("run", "c.yaml").stdout.count("finished already") == 1
    Path(file).write_text(text)
    sys_modules_without_beside(monkeypatch)
    assert cil("run", "c.yaml").returncode == 2


def sys_modules_without_beside(monkeypatch):
    """As in a new process: a module beside a learner's file is imported once per process."""
    from cil.config import plugins

    monkeypatch.delitem(sys.modules, "next_to_mine", raising=False)
    plugins._run_file.cache_clear()


def test_code_is_the_file_and_what_it_imports_beside_it(tmp_path):
    for name, text in {
        "main.py": "import json, numpy, a\nfrom b import c\nimport pkg.d as d\ndef f():\n    import late\n",
        "a.py": "import main\n",
        "b.py": "c = 1\n",
        "late.py": "",
        "pkg/__init__.py": "",
        "pkg/d.py": "from . import e\n",
        "pkg/e.py": "",
        "unused.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {name for name, _ in code._sources(tmp_path / "main.py", "main")}
    assert found == {"main.py", "a.py", "b.py", "late.py", "pkg/__init__.py", "pkg/d.py", "pkg/e.py"}
    found = {name for name, _ in code._sources(tmp_path / "pkg" / "d.py", "pkg.d")}
    assert found == {"pkg/d.py", "pkg/__init__.py", "pkg/e.py"}


def test_code_of_nested_classes_has_digests_too(tmp_path):
    """A custom tuner or rule in a built-in learner; code of the package has none."""
    (tmp_path / "part.py").write_text("class Part:\n    pass\n")
    entry = {"name": "ncm", "tuner": {"class": f"{tmp_path}/part.py:Part", "rank": 4}, "rule": {"name": "average"}}
    before = code.digests(entry, NCMLearner)
    assert list(before) == ["tuner.class"]
    moved = (tmp_path / "elsewhere" / "part.py").absolute()
    moved.parent.mkdir()
    (tmp_path / "part.py").rename(moved)
    placed = code.found(entry, [moved])
    assert placed["tuner"] == {"class": f"{moved}:Part", "rank": 4} and code.digests(placed, NCMLearner) == before
    with pytest.raises(PluginError, match=r"part\.py: no such file.*--code FILE.py"):
        code.found(entry)
    moved.write_text(moved.read_text() + "# edited\n")
    assert code.digests(placed, NCMLearner) != before


def test_other_versions_are_said_and_recorded(tmp_path, cil, monkeypatch):  # noqa: F811
    """The fault's case, and a chain of three versions of which stages go back to the first."""
    monkeypatch.chdir(tmp_path)
    config = write(tmp_path / "c.yaml")
    assert cil("run", config).returncode == 0
    place = Path("results/t/ncm") / RUN
    held = stored(place)
    now, old = held["versions"], {**held["versions"], "torch": "1.13.0"}
    (place / "metrics.json").write_text(json.dumps({**held, "versions": old, "complete": False}))
    shutil.rmtree(place / "stage-02")
    ended = cil("run", config)
    assert f"continues after stage 2 of other versions: torch 1.13.0 → {now['torch'][:12]}" in ended.stdout
    found = results.read_run(place)
    assert found["versions"] == now and found["earlier_versions"] == [{"stages": 2, "versions": old}]
    assert "other versions" not in cil("run", config).stdout
    for keep, expected in ((2, [[2, old]]), (1, [[1, old]])):
        header = identity.continued({"versions": now}, found, keep)
        assert [[part["stages"], part["versions"]] for part in header["earlier_versions"]] == expected
    third = {**now, "torch": "9"}
    header = identity.continued({"versions": third}, found, 3)
    assert [part["stages"] for part in header["earlier_versions"]] == [2, 3]
    assert identity.version_changes(header, 3) == f"torch {now['torch'][:12]} → 9"
    assert identity.version_changes(identity.continued({"versions": now}, found, 3), 3) == ""
    assert "earlier_versions" not in identity.continued({"versions": old}, found, 1)
    assert "earlier_versions" not in identity.continued({"versions": now}, found, 0)


def test_recorded_paths_are_absolute(pictures, tmp_path):
    [place] = run(from_folder(hardware={"feature_store": "store"}), "results")
    config = results.read_run(place)["config"]
    assert config["data"]["root"] == str(tmp_path / "set")
    assert config["hardware"]["feature_store"] == str(tmp_path / "store")
    assert config["backbone"]["weights"] == "random"


def test_what_killed_processes_leave_is_removed_by_the_next_write(tmp_path):
    """Files and folders under temporary names of processes that have ended; those of living ones stay."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(60)
    gone = [f".table.csv.{dead.pid}", f".table.csv.{dead.pid}.0a1b2c3d", f".table.csv.old.{dead.pid}"]
    stay = [f".table.csv.{os.getppid()}", f".other.csv.{dead.pid}", f".table.csv.{dead.pid}.x", "table.csv.1"]
    for name in (*gone[:2], *stay):
        (tmp_path / name).write_text("half")
    (tmp_path / gone[2]).mkdir()
    (tmp_path / gone[2] / "model.json").write_text("half")
    files.write(tmp_path / "table.csv", "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*stay, "table.csv"])
