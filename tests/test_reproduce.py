"""scripts/publish/reproduce.py: what it runs, what it skips, how it stops, and the figure of all learners."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from comparisons import header, rows
from marks import on_any_backbone
from test_cli import write
from waiting import until

from cil import results
from cil.config.reading import load_config
from cil.errors import RunError
from cil.learners import registry
from scripts.publish import campaigns, curves, reproduce

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    """Pytest keeps its own."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def finished(folder: Path, name: str, last: int, order: int = 1, label: str | None = None, **changes) -> None:
    """A finished run of three stages in which ``last`` of 100 images of every task are right in the end."""
    place = folder / (label or name) / f"order{order}-seed0"
    place.mkdir(parents=True)
    about = {**header(name, order, **changes), "learner": label or name}
    run = results.assemble(about, rows([[90], [80, 80], [last] * 3]), 3)
    (place / "metrics.json").write_text(json.dumps(run), encoding="utf-8")


# --- what is run ------------------------------------------------------------------------------------------------------


def test_default_configurations_hold_every_learner_as_it_is():
    for name in ("cifar10/defaults", "digits/defaults", "split_tiny_imagenet100/defaults"):
        entries = load_config(name).learners
        assert {entry.name for entry in entries} == set(on_any_backbone())
        assert [entry.label for entry in entries if entry.parameters] == ["fecam_shrunk"]


def test_chosen_settings_are_those_of_the_first_tasks():
    """Each stands in a configuration of Split-Tiny-ImageNet-100 whose rates were chosen on first tasks."""
    there = [
        (entry.name, registry.configure(entry)[1].model_dump())
        for name in ("bounds", "adapted", "prompts", "avalanche", "ewc", "merging", "records")
        for entry in load_config(f"split_tiny_imagenet100/{name}").learners
    ]
    tiny = "split_tiny_imagenet100"
    for name in ("cifar10/chosen", "digits/chosen", f"{tiny}/long_chosen", f"{tiny}/orders"):
        for entry in load_config(name).learners:
            assert (entry.name, registry.configure(entry)[1].model_dump()) in there, entry.title


NOT_RUN_YET = {
    "amalgamate",
    "cds",
    "inflora",
    "loda",
    "sd_lora",
    "macil",
    "cl_lora",
    "e2_lora",
    "acil",
    "air",
    "ds_al",
    "gkeal",
    "care",
    "care_ensemble",
    "min",
    "moal",
    "acmap",
    "cofima",
    "duct",
    "smile",
    "routed",
}
"""Learners of which there are no runs on these streams."""


def test_two_configurations_take_every_learner_through_the_same_streams():
    orders, records = (load_config(f"split_tiny_imagenet100/{name}") for name in ("orders", "records"))
    assert {entry.name for entry in (*orders.learners, *records.learners)} == set(on_any_backbone()) - NOT_RUN_YET
    own = {"name", "learners", "chosen_by"}
    assert orders.model_dump(exclude=own) == records.model_dump(exclude=own)
    defaults = load_config("split_tiny_imagenet100/defaults")
    assert defaults.model_dump(exclude={*own, "orders"}) == records.model_dump(exclude={*own, "orders"})


def test_published_runs_are_done_and_budgets_have_folders_of_their_own(tmp_path):
    picked = campaigns.pick(["quickstart"])
    shutil.copytree(ROOT / "results" / "reference" / "quickstart", tmp_path / "quickstart")  # not the 800 runs of all
    found = campaigns.jobs(campaigns.runs(picked), tmp_path)
    assert len(found) == 8 and all(job.complete for job in found)
    cut = campaigns.runs(picked, ["n*"], ["1994"], per_class=3)
    assert [trial.plan.place.as_posix() for trial in cut] == ["quickstart_at_3/ncm/order1994-seed0"]
    assert cut[0].plan.config.data.per_class == 3
    own = campaigns.runs(picked, orders=["1994"])  # finetune and joint name the only order they are run on
    assert {trial.plan.entry.title for trial in own} == {"ncm", "linear_probe"}


def test_a_run_of_other_settings_is_not_taken_for_done(tmp_path):
    [wanted] = campaigns.runs(campaigns.pick(["quickstart"]), ["ncm"], ["1993"])
    published = ROOT / "results" / "reference" / wanted.plan.place / "metrics.json"
    place = tmp_path / wanted.plan.place
    place.mkdir(parents=True)
    run = json.loads(published.read_text(encoding="utf-8"))
    run["config"]["learners"][0]["metric"] = "euclidean"
    (place / "metrics.json").write_text(json.dumps(run), encoding="utf-8")
    [job] = campaigns.jobs([wanted], tmp_path)
    assert not job.complete and job.state() == "holds a run of other settings"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--streams", "digits_50", "--learners", "nmc"], "--learners nmc: matches none (did you mean 'ncm'?)"),
        (["--streams", "cifar"], "--streams cifar: matches none"),
        (["--streams", "cifar10_50", "--data-root", "nowhere"], "does not exist; say where with --data-root"),
    ],
)
def test_a_users_mistake_is_one_line(capsys, tmp_path, given, said):
    assert reproduce.main([*given, "--results", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("reproduce: ") and said in line


def test_longest_first_and_a_failure_stops_nobody(monkeypatch, tmp_path):
    """The processes are a shell script that notes what it was asked for; the times are another class order's."""
    for learner, seconds in (("ncm", 5.0), ("slda", 50.0), ("fecam", 20.0)):
        place = tmp_path / "digits_50" / learner / "order1-seed0"
        place.mkdir(parents=True)
        run = results.assemble(header(learner), rows([[9], [8, 8], [7, 7, 7]], seconds=seconds), 3)
        (place / "metrics.json").write_text(json.dumps(run), encoding="utf-8")
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\necho "$OMP_NUM_THREADS $*" >> {tmp_path}/asked\n'
        'case "$*" in *slda*) echo "cil: no"; exit 2;; esac\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    names = ["ncm", "slda", "fecam", "ranpac"]
    todo = campaigns.jobs(campaigns.runs(campaigns.pick(["digits_50"]), names, ["1993"]), tmp_path)
    lines: list[str] = []
    failed = reproduce.run(todo, tmp_path, 1, lines.append)
    asked = (tmp_path / "asked").read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("1 -m cil run digits/defaults ") and "orders=[1993]" in line for line in asked)
    assert [next(n for n in names if f"name: {n}}}" in line) for line in asked] == ["ranpac", "slda", "fecam", "ncm"]
    assert [job.trial.plan.entry.title for job in failed] == ["slda"]
    assert (tmp_path / "digits_50/slda/order1993-seed0/failed.log").read_text(encoding="utf-8") == "cil: no\n"
    assert lines[1] == "[2/4] digits_50/slda/order1993-seed0  failed: cil: no"


def begun(folder: Path) -> bool:
    return (folder / "metrics.json").exists() and bool(results.read_run(folder)["stages"])


@pytest.mark.slow
def test_stopped_resumed_and_drawn_again(tmp_path, capsys, monkeypatch):
    """Real runs: stopped after a stage, gone on with beside another learner, then nothing left to do."""
    epochs = 20  # of about 0.1 s: two stages take longer than the way of the signal
    file = write(tmp_path / "t.yaml", learners=[{"name": "finetune", "epochs": epochs}, "ncm"])
    monkeypatch.setattr(campaigns, "CAMPAIGNS", (campaigns.Campaign("t", (str(file),)),))
    few = ["--orders", "1993", "--per-class", "30", "--results", str(tmp_path / "r")]
    code = (
        "from scripts.publish import campaigns, reproduce\n"
        f"campaigns.CAMPAIGNS = (campaigns.Campaign('t', ({str(file)!r},)),)\n"
        f"raise SystemExit(reproduce.main({[*few, '--learners', 'finetune']!r}))"
    )
    first = tmp_path / "r" / "t_at_30" / "finetune" / "order1993-seed0"
    driver = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )
    try:
        until(lambda: begun(first) or driver.poll() is not None, 200, "no stage is finished")
        driver.send_signal(signal.SIGTERM)
        assert b"run the same command to resume" in driver.communicate(timeout=60)[1]
    finally:
        driver.kill()
    assert driver.returncode == 130 and not results.read_run(first)["complete"]
    kept = results.read_run(first)["stages"]

    more = [*few, "--learners", "finetune", "ncm"]
    assert reproduce.main([*more, "--list"]) == 0
    listed = capsys.readouterr().out
    assert f"order1993-seed0 {len(kept)} stages done" in listed and "2 to do" in listed
    assert reproduce.main([*more, "--jobs", "2"]) == 0
    assert "[2/2]" in capsys.readouterr().out
    assert results.read_run(first)["complete"] and results.read_run(first)["stages"][: len(kept)] == kept
    files = [first / "metrics.json", tmp_path / "r" / "t_at_30" / "compare.png"]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    assert reproduce.main(more) == 0
    assert "2 of 2 runs are done, 0 to do" in capsys.readouterr().out
    assert files[0].stat().st_mtime_ns == before[0][1]  # a finished run is not written again
    assert [file.read_bytes() for file in files] == [content for content, _ in before]
    assert reproduce.main([*more, "--list"]) == 0
    assert "2 runs done" in capsys.readouterr().out


# --- what is drawn and written ----------------------------------------------------------------------------------------


def test_a_curve_is_a_learners_best_setting_on_the_orders_all_share(tmp_path):
    for order in (1, 2):
        finished(tmp_path, "ncm", 60, order)
        finished(tmp_path, "aper", 50 + 20 * order, order, label="aper_a")
    finished(tmp_path, "ncm", 5, 3)  # nobody else has this class order
    finished(tmp_path, "aper", 99, 2, label="aper_b")  # ends higher, but lacks a class order
    finished(tmp_path, "aper", 100, 1, label="aper_no_tuner")
    finished(tmp_path, "aper", 100, 2, label="aper_no_tuner")
    for order in (1, 2):
        finished(tmp_path, "avalanche", 10, order, label="ewc", parameters={"strategy": {"name": "EWC"}})
        finished(tmp_path, "avalanche", 20, order, label="lwf", parameters={"strategy": {"name": "LwF"}})
    found = curves.curves([tmp_path])
    assert [(c.learner, c.label, len(c.runs)) for c in found] == [
        ("aper", "aper_a", 2), ("ncm", "ncm", 2), ("LwF", "lwf", 2), ("EWC", "ewc", 2),
    ]  # fmt: skip
    assert found[0].last == pytest.approx(0.8) and found[1].last == pytest.approx(0.6)


def test_curves_of_several_protocols_are_refused(tmp_path):
    finished(tmp_path / "a", "ncm", 60)
    finished(tmp_path / "b", "aper", 60, backbone={"name": "vit", "sha256": "00" * 32, "feature_dim": 8})
    with pytest.raises(RunError, match="2 protocols"):
        curves.curves([tmp_path / "a", tmp_path / "b"])


def test_the_figure_is_the_same_bytes_and_holds_colours(tmp_path):
    for learner, last in (("ncm", 60), ("finetune", 5), ("ranpac", 70), ("slda", 50), ("ease", 40)):
        finished(tmp_path, learner, last)
    drawn = curves.draw(curves.curves([tmp_path]))
    assert drawn == curves.draw(curves.curves([tmp_path]))
    (tmp_path / "curves.png").write_bytes(drawn)
    pixels = matplotlib.image.imread(tmp_path / "curves.png")[:, :, :3]
    leader = [int(curves.CYCLE[0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    assert (abs(pixels - leader).max(-1) < 0.01).sum() > 100  # the best one's curve and name


def test_names_stand_apart():
    assert curves.spread_out([1.0, 1.0, 9.0], 2.0) == [0.0, 2.0, 9.0]
    assert curves.spread_out([5.0, 1.0], 2.0) == [5.0, 1.0]
    placed = curves.spread_out([3.0, 2.9, 3.1, 2.0], 1.0)
    assert sorted(placed) == pytest.approx([1.25, 2.25, 3.25, 4.25]) and placed[3] < placed[1] < placed[0] < placed[2]


def test_a_campaign_gets_its_section_once(tmp_path):
    page = "# Results\n\n## Reproduce the results\n\nend\n"
    assert campaigns.sections(page, tmp_path) == page
    finished(tmp_path / "digits_50", "ncm", 60)
    once = campaigns.sections(page, tmp_path)
    assert once.count("<!-- settings: results/reference/digits_50 -->\n<!-- /table -->") == 1
    assert once.index("digits_50") < once.index("## Reproduce the results") and once.endswith("\n\nend\n")
    assert campaigns.sections(once, tmp_path) == once
    finished(tmp_path / "split_tiny_imagenet100_defaults", "ncm", 60)
    both = campaigns.sections(once, tmp_path)
    assert "/split_tiny_imagenet100_defaults:split_tiny_imagenet100_orders,split_tiny_imagenet100_records -->" in both
    assert campaigns.sections(both, tmp_path) == both


def test_costs_are_sums_over_finished_runs(tmp_path):
    finished(tmp_path / "digits_50", "ncm", 60)
    finished(tmp_path / "digits_50", "ncm", 60, 2)
    *_, row, last = campaigns.costs(tmp_path).splitlines()
    assert row.endswith("| 2 | 1, 2 | 0.1 |") and last.endswith("| 2 | | 0.1 |")  # 2 runs × 3 stages × 60 s
