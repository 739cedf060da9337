"""Damaged, exchanged, foreign and linked files give the right answer or one line; long runs stay small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from comparisons import header, rows, write
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_runner import settings, stable

from cil import metrics, report, results
from cil.errors import CilError, ExportError, RunError
from cil.export import export, load
from cil.prediction import open_run
from cil.runner import run
from cil.runner.checkpoint import to_json
from cil.runner.tensorboard import Tracker
from cil.utils.stored import read_json
from scripts.fuzz.files import fuzz

RUN = Path("t/ncm/order1993-seed0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    [folder] = run(settings(), tmp_path_factory.mktemp("finished"))
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of a finished run of three stages, in a results folder of its own."""
    shutil.copytree(finished, tmp_path / "results" / RUN)
    return tmp_path / "results" / RUN


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


def older(folder: Path) -> None:
    """Rewrite a run as the version before checksums wrote it."""
    whole = results.read_run(folder)
    (folder / "metrics.json").write_text(json.dumps(whole, indent=1))
    for i, row in enumerate(whole["stages"]):
        (folder / f"stage-{i:02d}" / "stage.json").write_text(json.dumps(row, indent=1))
        file = folder / f"stage-{i:02d}" / "predictions.safetensors"
        found = load_file(file)
        dense = metrics.confusion_matrix(found["label"].numpy(), found["predicted"].numpy(), min(10, 4 * i + 4))
        save_file({**found, "confusion": torch.from_numpy(dense)}, file)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "seed"), [(40, 7), pytest.param(110, 8, marks=pytest.mark.slow)])
def test_no_damaged_file_gives_a_wrong_answer(tmp_path, count, seed):
    """150 damages in all: none of those in the fast set is repeated in the slow one."""
    told: list[str] = []
    outcomes = fuzz(count, seed, tmp_path, told.append)
    assert not told and outcomes["files"] == count
    assert outcomes["named"] > count / 4 and outcomes["right"] > count / 4  # both happen, so both were tried


@pytest.mark.parametrize("name", ["learner.safetensors", "learner.json", "stage.json"])
def test_a_damaged_file_of_a_stage_is_named_by_all_that_read_it(folder, tmp_path, name):
    file = folder / "stage-02" / name
    if name == "learner.json":
        file.write_text(json.dumps({"extra": 1}))
    else:
        flip(file, -100)
    for reader in (lambda: open_run(folder), lambda: export(folder, tmp_path / "out")):
        with pytest.raises(RunError, match=rf"stage-02.{name}: .*damaged"):
            reader()
    assert not (tmp_path / "out").exists()
    shutil.rmtree(folder / "stage-02")  # what the message advises
    assert stable(results.read_run(run(settings(), tmp_path / "results")[0])["stages"])


def test_a_stage_in_the_middle_can_be_computed_again(folder, finished, tmp_path):
    flip(folder / "stage-01" / "stage.json", 30)
    with pytest.raises(RunError, match=r"stage-01.stage\.json: damaged.*delete the folder of that stage"):
        report.compare_runs([tmp_path])
    shutil.rmtree(folder / "stage-01")
    with pytest.raises(RunError, match=r"stage-01.stage\.json: not there"):
        report.compare_runs([tmp_path])
    run(settings(), tmp_path / "results")
    assert stable(results.read_run(folder)) == stable(results.read_run(finished))


def test_files_of_two_stages_or_runs_cannot_be_exchanged(folder, finished, tmp_path):
    [other] = run(settings(orders=[5]), tmp_path / "other")
    for name in ("stage-01/stage.json", "metrics.json"):
        shutil.copy(other / name, folder / name)
        for reader in (lambda: results.read_run(folder), lambda: resume(folder, tmp_path / "again")):
            with pytest.raises(RunError, match=str(tmp_path)):
                reader()
        shutil.copy(finished / name, folder / name)
    assert results.read_run(folder)["complete"]
    shutil.copy(other / "stage-01" / "learner.safetensors", folder / "stage-01")
    with pytest.raises(RunError, match=r"stage-01.learner\.safetensors: is damaged"):
        resume(folder, tmp_path / "again")


def resume(folder: Path, place: Path) -> None:
    """Make the last stage of a copy of a run again."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place / RUN)
    shutil.rmtree(place / RUN / "stage-02")
    run(settings(), place)


def test_damaged_predictions_are_named_where_they_are_used(folder):
    counts = results.confusion(folder, 1)
    assert counts.shape == (8, 8) and counts.sum() == sum(results.read_run(folder)["stages"][1]["total"])
    flip(folder / "stage-01" / "predictions.safetensors", -9)
    with pytest.raises(RunError, match=r"stage-01.predictions\.safetensors: is damaged"):
        results.confusion(folder, 1)


def test_an_exported_model_is_covered_as_a_whole(folder, tmp_path):
    place = export(folder, tmp_path / "model")
    assert load(place).names == open_run(folder).names
    facts = json.loads((place / "model.json").read_text())
    for change in ({"classes": facts["classes"][::-1]}, {"preprocessing": {**facts["preprocessing"], "crop_pct": 0.5}}):
        (place / "model.json").write_text(json.dumps({**facts, **change}))
        with pytest.raises(ExportError, match=r"model\.json: damaged: its content does not match its checksum"):
            load(place)
    del facts["checksum"]  # as an earlier version wrote it
    (place / "model.json").write_text(json.dumps(facts))
    assert load(place).names == open_run(folder).names


# --- numbers and types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("summary", "accuracy_last"), 7.5),
        (("summary", "accuracy_last"), 0.123),  # within its range, but not what the rows say
        (("summary", "forgetting"), "0.1"),
        (("stages", 1, "correct"), [90]),
        (("stages", 1, "correct", 0), 101),
        (("stages", 2, "total", 0), 99),
        (("stages", 0, "top5_accuracy"), -0.5),
        (("stages", 0, "costs", "seconds_learn"), None),
        (("accuracy_matrix", 1, 0), 0.3),
        (("config", "seeds"), []),
        (("config",), []),
        (("tasks",), None),
    ],
)
def test_numbers_out_of_range_and_keys_of_another_type_are_named(tmp_path, keys, value):
    found = write(tmp_path, "ncm", [[90], [80, 90], [70, 80, 90]])
    at = found
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    file = next(tmp_path.rglob("metrics.json"))
    file.write_text(json.dumps(found))
    with pytest.raises(RunError, match=r"metrics\.json: damaged: ") as told:
        report.compare_runs([tmp_path])
    assert "\n" not in str(told.value)


ODD = [
    b"",
    b"[]",
    b"3",
    b"{",
    b"\xff\xfe{}",
    b'{"a":NaN}',
    b"[" * 100_000,
    b'{"a":' * 500 + b"1" + b"}" * 500,
    b"1" * 9999,
]


@pytest.mark.parametrize("content", ODD, ids=range(len(ODD)))
def test_what_is_no_object_of_json_is_one_line(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(RunError, match=r"x\.json: damaged: .*; do so") as told:
        read_json(tmp_path / "x.json", advice="do so")
    assert "\n" not in str(told.value) and len(str(told.value)) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@given(key=st.sampled_from(sorted(header("ncm")) + ["summary", "stages", "complete", "stage_checksums"]), value=JSON)
@examples(derandomize=True, deadline=None, max_examples=25)
def test_any_value_of_any_key_is_read_or_named(tmp_path_factory, key, value):
    place = tmp_path_factory.mktemp("any")
    found = write(place, "ncm", [[90], [80, 90], [70, 80, 90]])
    next(place.rglob("metrics.json")).write_text(json.dumps({**found, key: value}))
    try:
        results.find([place])
    except CilError as error:
        assert str(place) in str(error) and "\n" not in str(error)


def test_a_directory_and_a_foreign_file_are_named(tmp_path):
    (tmp_path / "a" / "metrics.json").mkdir(parents=True)
    with pytest.raises(RunError, match=r"a.metrics\.json: damaged: Is a directory"):
        results.find([tmp_path])
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "metrics.json").write_text('{"eval_loss": 0.3, "epoch": 3}')
    with pytest.raises(RunError, match=r"metrics\.json: damaged: config: field required"):
        results.find([tmp_path])


def test_a_run_that_lost_its_metrics_is_named(folder, tmp_path):
    write(tmp_path / "results", "other", [[90], [80, 90], [70, 80, 90]])
    (folder / "metrics.json").unlink()
    with pytest.raises(RunError, match=r"order1993-seed0: holds the stages of a run but no metrics\.json"):
        report.compare_runs([tmp_path / "results"])


# --- earlier versions -------------------------------------------------------------------------------------------------


def test_runs_of_before_checksums_are_read_and_resumed(folder, finished, tmp_path):
    whole, model = results.read_run(folder), open_run(folder)
    older(folder)
    assert results.read_run(folder) == whole
    assert (results.confusion(folder, 2) != results.confusion(finished, 2)).nnz == 0
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(open_run(folder)(x), model(x), strict=True))
    shutil.rmtree(folder / "stage-02")
    run(settings(), tmp_path / "results")
    assert stable(results.read_run(folder)) == stable(whole)


# --- links ------------------------------------------------------------------------------------------------------------


def test_nothing_outside_is_written_through_links_in_a_run_folder(folder, finished, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    shutil.rmtree(folder / "stage-02")
    shutil.move(folder / "metrics.json", outside / "metrics.json")
    (folder / "metrics.json").symlink_to(outside / "metrics.json")
    (folder / "config.yaml").unlink()
    before = (outside / "metrics.json").read_bytes()
    for name in ("config.yaml", ".metrics.json", ".stage-02", ".stage-01", "stage-02", "events.out.tfevents.0"):
        (folder / name).symlink_to(outside / "file" if "stage" not in name else outside)
    run(settings(), tmp_path / "results")
    assert {path.name for path in outside.iterdir()} == {"file", "metrics.json"}
    assert (outside / "file").read_text() == "mine" and (outside / "metrics.json").read_bytes() == before
    assert stable(results.read_run(folder)) == stable(results.read_run(finished))
    assert not (folder / "metrics.json").is_symlink() and not list(folder.glob(".*"))
    (folder / "run.lock").unlink(missing_ok=True)
    (folder / "run.lock").symlink_to(outside / "file")
    with pytest.raises(RunError, match=r"run\.lock: is a link; delete it"):
        run(settings(), tmp_path / "results")
    assert (outside / "file").read_text() == "mine"


# --- growth -----------------------------------------------------------------------------------------------------------


def long_run(stages: int, learner: str = "ncm") -> tuple[dict, list]:
    """A run of one-class tasks of 100 images each: its header and rows, the accuracy decreasing by chance."""
    rng = np.random.RandomState(stages)
    known = {**header(learner), "tasks": [[i] for i in range(stages)], "class_names": [f"c{i}" for i in range(stages)]}
    return known, rows([rng.randint(0, 96, i + 1).tolist() for i in range(stages)])


def test_metrics_grow_with_stages_and_not_with_their_square():
    def size(stages):
        known, found = long_run(stages)
        return len(to_json(results.run_file(known, found, ["0" * 64] * stages, stages)))

    assert size(200) - size(100) < 1.05 * (size(100) - size(50)) * 2


def test_a_stage_keeps_no_more_than_its_images(folder):
    stored = load_file(folder / "stage-02" / "predictions.safetensors")
    assert {len(values) for values in stored.values()} == {445} and "confusion" not in stored
    many = metrics.confusion_counts(np.arange(100), np.arange(100)[::-1] * 9_999 // 99, 10_000)
    assert many.nnz == 100 and many.shape == (10_000, 10_000)
    dense = metrics.confusion_matrix(np.array([0, 1, 1, 2]), np.array([0, 2, 2, 2]), 3)
    assert dense.tolist() == [[1, 0, 0], [0, 0, 2], [0, 0, 1]]
    sparse = metrics.confusion_counts(np.array([0, 1, 1, 2]), np.array([0, 2, 2, 2]), 3)
    assert metrics.class_mean_accuracy(dense) == metrics.class_mean_accuracy(sparse) == pytest.approx(2 / 3)


def test_a_resume_replays_a_long_run_quickly(tmp_path):
    import time

    known, found = long_run(300)
    started = time.process_time()
    tracker = Tracker(tmp_path, known)
    tracker.replay(found)
    tracker.close()
    assert time.process_time() - started < 8  # 15.6 s before, 2 s now, on a busy core


def test_the_page_of_twenty_long_runs_is_small_and_keeps_its_last_stage(monkeypatch):
    known, found = long_run(300)
    one = results.assemble(known, found, 300)
    runs = [{**one, "learner": f"l{i}", "folder": f"/r/l{i}/order1-seed0"} for i in range(20)]
    monkeypatch.setattr(results, "find", lambda paths: runs)
    [compared] = report.compare_runs([])
    page = report.page([compared])
    assert len(page.encode()) < 2_000_000
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    drawn = data[0]["rows"][0]["runs"][0]
    assert drawn["at"][-1] == 300 and len(drawn["seen"]) == len(drawn["at"]) == 60
    assert drawn["seen"][-1] == [pytest.approx(100 * one["accuracy_matrix"][-1][j - 1], abs=1e-3) for j in drawn["at"]]
