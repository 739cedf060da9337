"""Published runs are smaller than those that `cil run` writes, and say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comparisons import TASKS, falling, write

from cil import report, results
from cil.errors import RunError
from scripts.publish import campaigns, reproduce, slim, tables, values

CURVE = [["loss", 3.0], ["lr", 0.1], ["loss", 2.0], ["lr", 0.0]]


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run that logged two curves in every stage."""
    written = write(tmp_path / "results", "ease", falling(60))
    for row in written["stages"]:
        row["log"] = CURVE
    file = tmp_path / "results" / "bench" / "ease" / "order1-seed0" / "metrics.json"
    file.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return file


def test_what_is_left_out_is_rebuilt(run):
    before = results.read_run(run.parent)
    slim.publish(run.parents[3])
    written, after = json.loads(run.read_text(encoding="utf-8")), results.read_run(run.parent)
    assert before.keys() - written.keys() == set(results.DERIVED) and before.keys() == after.keys()
    assert [row.pop("log") for row in after["stages"]] == [[["loss", 2.0], ["lr", 0.0]]] * TASKS
    assert [row.pop("log") for row in before["stages"]] == [CURVE] * TASKS
    assert after == before


def test_every_reader_says_the_same(run):
    def told() -> list[str]:
        [compared] = report.compare_runs([run.parents[2]])
        numbers = [values.value(f"ease {key}", "bench", run.parents[4]) for key in ("R.-1.0", "accuracy_last")]
        return [report.page([compared]), report.as_csv(compared, report.COLUMNS), *numbers]

    before = told()
    slim.publish(run.parents[3])
    assert told() == before


def test_it_reads_well_in_a_diff_and_a_second_time_changes_nothing(run):
    slim.publish(run.parents[3])
    lines = run.read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith('  {"correct"') for line in lines) == TASKS
    assert sum(line.startswith(' "') for line in lines) == len(json.loads("\n".join(lines)))
    changed = run.stat().st_mtime_ns
    assert list(slim.unpublished(run.parents[3])) == []
    slim.publish(run.parents[3])
    assert run.stat().st_mtime_ns == changed


def test_an_unfinished_run_is_not_touched(tmp_path):
    write(tmp_path, "ease", falling(60)[:2])
    assert list(slim.unpublished(tmp_path)) == []


def test_what_does_not_follow_from_the_rows_is_not_lost(run):
    written = json.loads(run.read_text(encoding="utf-8"))
    written["accuracy_matrix"][1][0] += 1e-9
    run.write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(RunError, match=r"metrics.json: accuracy_matrix of ease does not follow"):
        slim.publish(run.parents[3])
    assert json.loads(run.read_text(encoding="utf-8")) == written


def test_reproduce_publishes_in_this_form(run, tmp_path, monkeypatch):
    (tmp_path / "results" / "README.md").write_text("", encoding="utf-8")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "stale", dict)
    picked = campaigns.pick(["quickstart"])
    reproduce.render(picked, [], tmp_path / "results")  # a folder of the user's own
    assert "curves" in json.loads(run.read_text(encoding="utf-8"))
    monkeypatch.setattr(slim, "REFERENCE", tmp_path / "results")
    reproduce.render(picked, [], tmp_path / "results")
    assert "curves" not in json.loads(run.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_what_is_published_is_in_this_form(capsys):
    assert slim.main(["--check"]) == 0, capsys.readouterr().out
