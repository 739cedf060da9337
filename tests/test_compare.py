"""Comparisons: what a cell says against numpy, pairing, rows, refusals, filters, and tables and figures as files."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from comparisons import falling, write
from rich.console import Console
from test_cli import cil  # noqa: F401 - a fixture

from cil import report
from cil.errors import RunError
from cil.report import figures


def row_of(compared, title):
    return next(row for row in compared.rows if row.title == title)


def last(counts):
    """A_last of a run by hand: per image, and all tasks have as many."""
    return np.mean(counts[-1])


@pytest.fixture
def bench(tmp_path):
    """Three learners: `good` on orders 1 and 2, `base` on order 1 and 3, `kept` with old images."""
    for learner, order, seed, count in (
        ("good", 1, 0, 70),
        ("good", 2, 0, 61),
        ("good", 3, 0, 64),
        ("base", 1, 0, 50),
        ("base", 3, 0, 47),
        ("base", 3, 1, 20),
    ):
        write(tmp_path, learner, falling(count), order, seed, costs={"seconds": count})
    write(tmp_path, "kept", falling(80), stores_images=True, costs={"parameters": 123456})
    return tmp_path


def test_nothing_heavy_is_imported():
    code = "import sys, cil.report; print([m for m in ('torch', 'timm', 'tensorboard') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert found.stdout.strip() == "[]"


def test_a_cell_is_mean_and_sample_deviation(bench):
    [compared] = report.compare_runs([bench])
    counts = [last(falling(n)) for n in (70, 61, 64)]
    assert report.NAMED["accuracy_last"].cell(row_of(compared, "good")) == (
        f"{np.mean(counts):.1f} ± {np.std(counts, ddof=1):.1f}"
    )
    assert report.NAMED["forgetting"].cell(row_of(compared, "kept")) == "10.0"  # 90 when learned, 80 in the end
    assert report.NAMED["backward_transfer"].cell(row_of(compared, "kept")) == "-10.0"
    assert report.NAMED["forgetting_within_task"].cell(row_of(compared, "kept")) == "10.0"
    assert report.NAMED["trainable_parameters"].cell(row_of(compared, "kept")) == "123,456"
    assert report.NAMED["trainable_parameters"].cell(row_of(compared, "good")) == "0"  # the same thrice: no ± 0
    assert report.NAMED["kept_bytes"].cell(row_of(compared, "kept")) == "1.00"
    minutes = np.array([3 * n / 60 for n in (70, 61, 64)])
    assert report.NAMED["minutes"].cell(row_of(compared, "good")) == f"{minutes.mean():.1f} ± {minutes.std(ddof=1):.1f}"


def test_differences_pair_identical_orders_and_seeds_only(bench):
    [compared] = report.compare_runs([bench], baseline="base")
    # `good` and `base` share (1, 0) and (3, 0); (2, 0) and (3, 1) have no partner
    by_hand = [(last(falling(a)) - last(falling(b))) for a, b in ((70, 50), (64, 47))]
    cell = report.NAMED["difference"].cell
    assert cell(row_of(compared, "good"), compared.baseline) == (
        f"+{np.mean(by_hand):.1f} ± {np.std(by_hand, ddof=1):.1f} (2)"
    )
    assert cell(row_of(compared, "kept"), compared.baseline) == "+20.0 (1)"
    assert cell(row_of(compared, "base"), compared.baseline) == "baseline"
    [other] = report.compare_runs([bench], baseline="kept")
    assert cell(row_of(other, "base"), other.baseline) == "-20.0 (1)"


def test_an_order_is_what_it_is_not_what_it_is_called(tmp_path):
    write(tmp_path, "a", falling(60), order="natural")
    write(tmp_path, "b", falling(50), order=[0, 1, 2, 3, 4, 5])
    write(tmp_path, "c", falling(50), order=7)
    [compared] = report.compare_runs([tmp_path], baseline="a")
    assert report.paired(row_of(compared, "b"), compared.baseline) == pytest.approx([-20 / 300])
    assert report.paired(row_of(compared, "c"), compared.baseline) == []
    assert report.NAMED["difference"].cell(row_of(compared, "c"), compared.baseline) == "–"


def test_where_nothing_can_be_subtracted_that_is_said(tmp_path):
    write(tmp_path / "a", "one", falling(60))
    write(tmp_path / "a", "two", falling(50), order=2)
    write(tmp_path / "b", "three", falling(50), tested_on="validation")
    first, second = report.compare_runs([tmp_path], baseline="one")
    assert "no differences: no other finished run shares a class order and seed with one" in shown(first, None)
    assert "no differences: there is no run of one" in shown(second, None)
    assert "Δ" not in shown(first, None) + shown(second, None)


def test_the_baseline_is_the_best_that_keeps_no_images_unless_one_says(bench):
    assert [row.title for row in report.compare_runs([bench])[0].rows] == ["kept", "good", "base"]
    assert report.compare_runs([bench])[0].baseline.title == "good"
    none = report.compare_runs([bench], baseline="none")[0]
    assert none.baseline is None and "Δ" not in report.markdown(none)
    [filtered] = report.compare_runs([bench], report.Filters(learner=["good"]), baseline="base")
    assert [row.title for row in filtered.rows] == ["good"] and "(2)" in report.markdown(filtered)


def test_unfinished_runs_are_not_ranked(tmp_path):
    write(tmp_path, "done", falling(50))
    write(tmp_path, "done", falling(80, stages=1), order=2)
    write(tmp_path, "begun", falling(80, stages=2))
    write(tmp_path, "begun", falling(80, stages=1), order=2)
    [compared] = report.compare_runs([tmp_path])
    assert [row.title for row in compared.rows] == ["done", "begun"]  # though 85 % after two stages is more
    done, begun = compared.rows
    assert report.NAMED["accuracy_last"].cell(done) == f"{last(falling(50)):.1f}"
    assert done.note() == "1 unfinished left out"
    assert begun.note() == "not ranked: stage 2 of 3, 1 unfinished left out"
    assert report.paired(begun, done) == []
    assert [row.title for row in report.compare_runs([tmp_path], report.Filters(complete=True))[0].rows] == ["done"]
    assert [line["stages"] for line in csv.DictReader(io.StringIO(report.as_csv(compared)))] == ["3", "1", "2", "1"]


def test_settings_of_one_learner_are_rows_of_their_own(tmp_path):
    for place, lr, count in (("a", 0.1, 60), ("b", 0.01, 70)):
        write(tmp_path / place, "l", falling(count), parameters={"lr": lr, "epochs": 1})
    write(tmp_path / "c", "l", falling(65), order=2, parameters={"lr": 0.1, "epochs": 1})
    [compared] = report.compare_runs([tmp_path])
    assert [(row.title, len(row.runs)) for row in compared.rows] == [("l (lr=0.01)", 1), ("l (lr=0.1)", 2)]
    assert [row.title for row in report.compare_runs([tmp_path], report.Filters(learner=["l (lr=0.1)"]))[0].rows] == [
        "l (lr=0.1)"
    ]


def test_the_same_run_twice_is_told_by_its_folder_and_never_counted_twice(tmp_path, monkeypatch):
    for place, count in (("before", 60), ("after", 70)):
        write(tmp_path / place, "l", falling(count))
    monkeypatch.chdir(tmp_path)
    [compared] = report.compare_runs([Path("before"), Path("after"), tmp_path / "before"])
    assert [(row.title, len(row.runs)) for row in compared.rows] == [("l (after/bench)", 1), ("l (before/bench)", 1)]


def test_different_protocols_are_apart_and_say_why(tmp_path):
    write(tmp_path / "a", "l", falling(60))
    write(tmp_path / "b", "l", falling(70), stream={"validation": 0.1})
    write(tmp_path / "c", "l", falling(80), backbone={"name": "vit", "sha256": "12" * 32, "feature_dim": 8})
    compared = report.compare_runs([tmp_path])
    assert [one.number for one in compared] == [1, 2, 3]
    assert [one.differs["backbone"] for one in compared] == ["vit (abababab)", "vit (abababab)", "vit (12121212)"]
    assert [one.differs["stream.validation"] for one in compared] == ["–", "0.1", "–"]
    [one] = report.compare_runs([tmp_path], report.Filters(protocol=2))
    assert one.number == 2 and np.mean(one.rows[0].values("accuracy_last")) == pytest.approx(last(falling(70)) / 100)
    with pytest.raises(
        RunError, match=r"f.pdf: runs of 3 protocols .* differ in backbone, stream.validation; select one"
    ):
        report.only(compared, "--figure f.pdf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learner", "bade"], "--learner bade: matches none (did you mean 'base'?); there are: base, good, kept"),
        (["--learner", "god*"], "matches none (did you mean 'good'?)"),
        (["--order", "11"], "--order 11: no such run (did you mean '1'?); there are: 1, 2, 3"),
        (["--seed", "7"], "--seed 7: no such run; there are: 0, 1"),
        (["--order", "1", "--seed", "1"], "none of the 7 runs passes --order 1 --seed 1"),
        (["--columns", "forgeting"], "--columns forgeting: no such column (did you mean 'forgetting'?)"),
        (["--sort", "second"], "--sort second: no such column (did you mean 'seconds'?)"),
        (
            ["--baseline", "bas"],
            "--baseline bas: no such row (did you mean 'base'?); there are: base, good, kept, none",
        ),
        (["--protocol", "2"], "--protocol 2: no such protocol; allowed: 1 to 1"),
        (["--export", "t.xlsx"], "--export t.xlsx: the suffix selects the format; allowed: .csv, .md, .tex"),
        (["--figure", "f.eps"], "--figure f.eps: the suffix selects the format; allowed: .pdf, .svg, .png"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(cil, bench, arguments, message):  # noqa: F811
    before = sorted(bench.rglob("*"))
    found = cil("compare", bench, *arguments, cwd=bench)
    assert found.returncode == 2 and found.stdout == ""
    assert message in found.stderr and len(found.stderr.strip().splitlines()) == 1, found.stderr
    assert sorted(bench.rglob("*")) == before


def test_mixed_protocols_have_tables_but_no_common_file(cil, tmp_path):  # noqa: F811
    write(tmp_path / "a", "first", falling(60))
    write(tmp_path / "b", "second", falling(70), tested_on="validation")
    found = cil("compare", tmp_path, "--figure", tmp_path / "f.pdf", "--export", tmp_path / "t.csv")
    assert found.returncode == 2 and len(found.stderr.strip().splitlines()) == 1
    assert (
        "t.csv: runs of 2 protocols are not ranked together, they differ in tested on; select one with --protocol"
        in found.stderr
    )
    assert found.stdout.count("not to be ranked with the others: tested on = ") == 2
    assert not list(tmp_path.glob("*.*"))
    found = cil("compare", tmp_path, "--protocol", 2, "--export", tmp_path / "t.csv")
    assert found.returncode == 0 and "second" in (tmp_path / "t.csv").read_text()
    assert "first" not in found.stdout + (tmp_path / "t.csv").read_text()


def test_everything_a_command_writes(cil, bench):  # noqa: F811
    files = [bench / "out" / name for name in ("t.csv", "t.md", "t.tex", "f.pdf", "f.svg", "f.png")]
    options = [word for f in files for word in ("--figure" if f.stem == "f" else "--export", f)]
    found = cil("compare", bench, "--out", bench / "page", "--sort", "seconds", "--baseline", "base", *options)
    assert found.returncode == 0, found.stderr
    assert sorted(p.name for p in bench.rglob("out/*")) == sorted(f.name for f in files)
    assert sorted(p.name for p in bench.rglob("page/*")) == ["compare.html", "compare.png"]
    shown = [line.split()[0] for line in found.stdout.splitlines() if line.startswith(("good", "base", "kept"))]
    assert shown == ["base", "kept", "good"]  # 117, 180 and 195 seconds
    assert "Δ base" in (bench / "out/t.md").read_text()


def shown(compared, width, columns=report.COLUMNS):
    console = Console(width=width or 500, record=True, file=io.StringIO())
    console.print(report.table(compared, columns, width))
    return console.export_text()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 150, None])
def test_a_narrow_terminal_has_fewer_columns_and_says_so(bench, width):
    [compared] = report.compare_runs([bench])
    text = shown(compared, width)
    assert "…\n" not in text and max(map(len, text.splitlines())) <= (width or 500)
    head = next(line for line in text.splitlines() if line.startswith("learner"))
    left = re.findall(r"\w+", text.partition("omitted at")[2])
    for column in report.COLUMNS:
        title = column.title(compared.baseline)
        assert (title in head) == (column.name not in left), title
    assert bool(left) == (width is not None)
    assert "A_last %" in head and "keeps" in text  # a note is never lost
    assert all(any(line.startswith(f"{name} ") for line in text.splitlines()) for name in ("good", "base", "kept"))


def test_a_long_title_wraps_and_brackets_are_no_markup(tmp_path):
    for lr in ("[bold]", "x" * 40):
        write(tmp_path / lr, "l", falling(60), parameters={"lr": lr})
    text = shown(report.compare_runs([tmp_path])[0], 60)
    assert "l (lr=[bold])" in text and text.count("66.7") == 0 and text.count("70.0") == 2
    assert "x" * 20 in text and "x" * 40 not in text


def test_columns_are_those_asked_for(bench):
    [compared] = report.compare_runs([bench])
    head = shown(compared, None, report.select_columns(["forgetting_clipped, seconds", "accuracy_last"])).splitlines()[
        1
    ]
    assert head.split("  ") and re.split(r"\s{2,}", head.strip()) == [
        "learner", "runs", "forgetting ≥ 0", "seconds", "A_last %", "note"
    ]  # fmt: skip
    assert report.select_columns([], report.NAMED["seconds"])[:2] == (
        report.NAMED["seconds"],
        report.NAMED["accuracy_last"],
    )


def test_numbers_an_older_version_did_not_write_are_unknown(tmp_path):
    write(tmp_path, "l", falling(60))
    file = next(tmp_path.rglob("metrics.json"))
    run = json.loads(file.read_text())
    del run["summary"]["passes_per_test_image"]
    file.write_text(json.dumps(run))
    [compared] = report.compare_runs([tmp_path])
    assert report.NAMED["passes_per_test_image"].cell(compared.rows[0]) == "–"
    assert report.page([compared])


def test_csv_has_every_run_unrounded(bench):
    [compared] = report.compare_runs([bench], baseline="base")
    found = list(csv.DictReader(io.StringIO(report.as_csv(compared))))
    assert len(found) == 7
    runs = {run["folder"]: run for row in compared.rows for run in row.runs}
    for line in found:
        run = runs[line["folder"]]
        for key, value in run["summary"].items():
            assert line[key] == str(value), key
        assert [line[f"accuracy/seen/{i}"] for i in (1, 2, 3)] == [str(v) for v in run["curves"]["accuracy/seen"]]
        assert line["forgetting/mean/1"] == ""  # undefined
    good, base = ({(r["class_order"], r["seed"]): float(r["accuracy_last"]) for r in found if r["learner"] == name}
                  for name in ("good", "base"))  # fmt: skip
    recomputed = [good[key] - base[key] for key in good.keys() & base.keys()]
    assert sorted(recomputed) == pytest.approx(sorted(report.paired(row_of(compared, "good"), compared.baseline)))


def test_markdown_and_latex_are_the_ranked_table(tmp_path):
    write(tmp_path, "a|b_50%", falling(60))
    write(tmp_path, "a|b_50%", falling(62), order=2)
    write(tmp_path, "~{x}^&#$\\<", falling(50), chosen_by="first_task")
    [compared] = report.compare_runs([tmp_path])
    columns = report.select_columns(["accuracy_last,difference,backward_transfer"])
    lines = report.markdown(compared, columns).splitlines()
    assert (
        lines[0] == "| learner | runs | A_last % | Δ a\\|b_50% | BWT | note |"
        and lines[1] == "|---|---|---|---|---|---|"
    )
    assert lines[2].startswith("| a\\|b_50% | 2 | ") and len(lines) == 4
    text = report.latex(compared, columns)
    assert r"a|b\_50\% & 2 & 70.7 $\pm$ 0.9 & baseline & $-$29.0 $\pm$ 1.4 &  \\" in text
    assert r"\textasciitilde{}\{x\}\textasciicircum{}\&\#\$\textbackslash{}\textless{} & 1 & 63.3 & $-$6.7 (1)" in text
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")].splitlines()
    told = text.split(r"\begin{tabular}{")[1].split("}")[0]
    assert told == "lrrrrl"
    for line in body:
        if not line.startswith("\\"):
            assert len(re.findall(r"(?<!\\)&", line)) == len(told) - 1 and line.endswith(r" \\")
    for opened, closed in zip("{", "}", strict=True):
        bare = text.replace("\\" + opened, "").replace("\\" + closed, "")
        assert bare.count(opened) == bare.count(closed)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "t.md"
    report.write(target, "old")

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match=r"t.md: cannot write: the disk is full"):
        report.write(target, "new")
    monkeypatch.undo()
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_paper_figure_has_its_fonts_and_every_name(bench, tmp_path):
    [compared] = report.compare_runs([bench])
    report.write_figure(compared, tmp_path / "f.pdf")
    pdf = (tmp_path / "f.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType, embedded
    report.write_figure(compared, tmp_path / "again.pdf")
    assert (tmp_path / "again.pdf").read_bytes() == pdf
    width, height = map(float, re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", pdf).groups())
    assert width == pytest.approx(72 * figures.PAPER_WIDTH) and 150 < height < 300
    drawn = b"".join(
        zlib.decompress(s) for s in re.findall(rb"stream\r?\n(x.*?)\r?\nendstream", pdf, re.DOTALL) if s[:1] == b"x"
    )
    assert drawn.count(b" l\n") > 50  # lines, not a picture
    report.write_figure(compared, tmp_path / "f.svg")
    assert (tmp_path / "f.svg").read_text().count('<g id="line2d') > 6
    report.write_figure(compared, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"


def test_a_long_legend_stays_on_the_page():
    names = [f"learner_with_a_long_name_{i:02d}" for i in range(28)]
    curves = {"accuracy/seen": [0.9, 0.8], "forgetting/mean": [float("nan"), 0.1]}
    groups = {name: [{"curves": curves}] for name in names}
    for figure in (figures.comparison(groups, "many"), figures.paper_figure(groups)):
        figure.canvas.draw()
        [legend] = figure.legends
        box, page = legend.get_window_extent(), figure.bbox
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert box.y1 <= figure.axes[0].get_window_extent().y0 and len(legend.get_texts()) == 28
        assert figure.axes[0].get_window_extent().height > 120  # and leaves room for the curves


def test_a_band_is_mean_and_sample_deviation_per_stage():
    curves = [[0.9, 0.5, 0.4], [0.7, 0.6, 0.2], [0.8, None, 0.3]]
    runs = [{"curves": {"a": values}} for values in curves]
    mean, spread = figures.band(runs, "a")
    np.testing.assert_allclose(mean, [80, np.nan, 30])
    np.testing.assert_allclose(spread, [10, np.nan, 10])
    assert np.isnan(figures.band(runs[:1], "a")[1]).all()


def test_confidence_and_base_classes_are_columns():
    """The stored runs, against their files: all numbers of the summary on confidence and base classes."""
    folder = Path(__file__).parent.parent / "results" / "reference" / "split_tiny_imagenet100_confidence"
    [compared] = report.compare_runs([folder])
    summaries = [json.loads(file.read_text())["summary"] for file in (folder / "layer_lda").glob("*/metrics.json")]
    names = [key for key in summaries[0] if key.startswith(("calibration_error", "unknown_"))]
    names += ["accuracy_base", "accuracy_novel", "accuracy_harmonic"]
    [row] = [row for row in compared.rows if row.title == "layer_lda"]
    for column in report.select_columns(names):
        values = np.array([100 * summary[column.name] for summary in summaries])
        assert column.cell(row) == f"{values.mean():.1f} ± {values.std(ddof=1):.1f}", column.name
        assert column.ascending == ("error" in column.name or "fpr95" in column.name)
    assert len(names) == 13
