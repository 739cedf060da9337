"""The marks of ``scripts/publish/values.py``, on runs and benches written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cil.errors import CilError
from scripts.publish import values

ROOT = Path(__file__).parent.parent

RUNS = {
    "a/order1-seed0": [[0.5, None], [0.25, 0.75]],
    "a/order2-seed0": [[0.6, None], [0.5, 0.9]],
    "b/order1-seed0": [[0.5, None], [0.5, 0.5]],
    "b/order2-seed0": [[0.5, None], [0.25, 0.5]],
    "c/order1-seed0": [[0.125, None], [0.0, 1.0]],
}


@pytest.fixture
def root(tmp_path):
    for name, r in RUNS.items():
        folder = tmp_path / "results" / "runs" / name
        folder.mkdir(parents=True)
        content = {
            "complete": True,
            "summary": {"accuracy_last": sum(r[1]) / 2, "kept_bytes": 4_000_000, "forgetting": None},
            "accuracy_matrix": r,
            "accuracy_matrix_within_task": [[1, None], [1, 1]],
            "curves": {"accuracy/seen": [r[0][0], sum(r[1]) / 2]},
            "stages": [{"usage": [3, 4]}, {"usage": [7, 77]}],
        }
        (folder / "metrics.json").write_text(json.dumps(content))
    (tmp_path / "results" / "bench").mkdir()
    bench = {"seconds": [30.0, 10.0, 11.0], "bare": {"fused head": 4.0}, "gap": 1.07e-5, "device": "cpu", "ok": True}
    (tmp_path / "results" / "bench" / "b.json").write_text(json.dumps(bench))
    return tmp_path


@pytest.mark.parametrize(
    ("expression", "number"),
    [
        ("c accuracy_last", "50.0"),
        ("a accuracy_last", "60.0"),  # mean over orders of 50 and 70
        ("min a accuracy_last", "50.0"),
        ("a/order2-seed0 accuracy_last", "70.0"),
        ("max a,b,c accuracy_last .0%", "70"),
        ("min [abc] accuracy_last", "37.5"),
        ("a R.-1.0", "37.5"),
        ("a/order2-seed0 R.-1.1:", "90.0"),
        ("c R.1", "50.0"),  # a list: its mean
        ("a R_task.1.0 .1f", "1.0"),
        ("c curves.accuracy/seen.0", "12.5"),
        ("c stages.-1.usage.-1 .0f", "77"),
        ("sum c stages.-1.usage .0f", "84"),
        ("a accuracy_last - b accuracy_last", "16.2"),  # (50 − 50, 70 − 37.5), paired by run
        ("max a accuracy_last - b accuracy_last", "32.5"),
        ("b accuracy_last - a accuracy_last", "−16.2"),
        ("max a accuracy_last - c accuracy_last", "20.0"),  # one run against each
        ("min a,b accuracy_last - a accuracy_last", "−32.5"),  # each label's runs against one's
        ("lowest a,b accuracy_last", "43.8"),  # of the labels' means, 60 and 43.75
        ("highest a,b,c accuracy_last - c accuracy_last", "10.0"),
        ("lowest a,b accuracy_last - a accuracy_last", "−16.2"),
        ("c accuracy_last - c R.1", "0.0"),
        ("a kept_bytes / 1e6 .0f", "4"),
        ("c kept_bytes / c stages.-1.usage.0 - 1 * 2 ,.0f", "1,142,855"),  # from left to right
        ("median bench/b.json seconds .1f", "11.0"),
        ("bench/b.json seconds / bench/b.json seconds.0 .2f", "0.57"),
        ("bench/b.json 'bare.fused head' .2f", "4.00"),
        ("bench/b.json gap .1e", "1.1e-05"),
        ("c accuracy_last - c accuracy_last", "0.0"),
        ("bench/b.json gap * -1 .1f", "0.0"),  # no minus sign on zero
    ],
)
def test_value(root, expression, number):
    assert values.value(expression, "runs", root) == number


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("d accuracy_last", "results/runs/d or results/d"),
        ("bench/c.json seconds", "bench/c.json"),
        ("a,d accuracy_last", "results/runs/d or results/d"),
        ("c accuracy_lst", "did you mean 'accuracy_last'"),
        ("c R.5.0", "no index 5 in 'R.5.0', the list has 2"),
        ("c R.0.1", "'R.0.1' is no number"),  # null
        ("c forgetting", "'forgetting' is no number"),
        ("c R", "'R' is no number and no list of numbers"),
        ("bench/b.json device", "is no number"),
        ("bench/b.json ok", "is no number"),
        ("bench/b.json gap.x", "nothing to look 'x' up in"),
        ("a accuracy_last - a,b accuracy_last", "other runs than before (4 numbers against 2)"),
        ("a accuracy_last - c,b/order1-seed0 accuracy_last", "other runs"),  # as many, but not the same
        ("b,c accuracy_last - a accuracy_last", "other runs than before (2 numbers against 3)"),  # c has one of them
        ("lowest bench/b.json seconds", "lowest is of runs, got 3 numbers from 1 runs"),
        ("c accuracy_last / c R.-1.0", "comes to inf"),
        ("a accuracy_last -", "a term is"),
        ("", "a term is"),
        ("a accuracy_last twice", "got 'a accuracy_last twice'"),
        ("'a accuracy_last", "quotation"),
    ],
)
def test_errors_are_one_line(root, expression, says):
    with pytest.raises(CilError) as error:
        values.render(f"<!-- from runs -->\nIt has <!-- = {expression} -->1.0 %.", root)
    assert says in str(error.value)
    assert str(error.value).startswith("line 2: ") and "\n" not in str(error.value)


def test_damaged_and_unfinished_files_are_named(root):
    (root / "results" / "bench" / "b.json").write_text("{")
    with pytest.raises(CilError, match=r"b\.json: damaged"):
        values.value("bench/b.json seconds", "", root)
    file = root / "results" / "runs" / "c" / "order1-seed0" / "metrics.json"
    file.write_text(json.dumps({"complete": False, "stages": []}))
    with pytest.raises(CilError, match="the run is not finished"):
        values.value("c accuracy_last", "runs", root)


def test_a_page_is_written_and_stays(root):
    page = (
        "<!-- from runs -->\n\nIt has <!-- = c accuracy_last -->12.3 % against <!-- = a accuracy_last -->%.\n\n"
        "<!-- from bench/b.json -->\n\n"
        "| <!-- = sum seconds ,.0f -->1,234.5e-10 | <!-- = max bench/b.json seconds .0f --> |.\n"
    )
    written = values.render(page, root)
    assert written == (
        "<!-- from runs -->\n\nIt has <!-- = c accuracy_last -->50.0 % against <!-- = a accuracy_last -->60.0%.\n\n"
        "<!-- from bench/b.json -->\n\n"
        "| <!-- = sum seconds ,.0f -->51 | <!-- = max bench/b.json seconds .0f -->30 |.\n"
    )
    assert values.render(written, root) == written
    assert [file.parent.name for mark in values.marks(page) for file in values.files(mark, root)] == [
        "order1-seed0",
        "order1-seed0",
        "order2-seed0",
        "bench",
        "bench",
    ]


def test_text_without_marks_is_left_alone(root):
    text = "67.9 % <!-- a word --> and\n<!-- table: results/runs -->\n| 1.0 |\n<!-- /table -->\n"
    assert values.render(text, root) == text


@pytest.mark.parametrize("before", ["", "  ", "- ", "  - ", "> ", "1. "])
def test_a_mark_may_not_begin_a_line(root, before):
    """Markdown takes a line that begins with a comment for HTML."""
    with pytest.raises(CilError, match=r"line 3: .* begins its line"):
        values.render(f"First\nof\n{before}<!-- = runs/c accuracy_last -->1", root)


def test_marks_are_invisible_on_the_site():
    markdown = pytest.importorskip("markdown")
    text = '- It has <!-- = c accuracy_last -->50.0 % and\n  (<!-- = "x.y z" * 2 -->1.0).\n\n'
    text += "| <!-- = c R.-1.0 -->2 |\n|---|\n"
    html = markdown.markdown(text, extensions=["tables"])
    words = values.MARK.sub(lambda m: m["number"], html)
    assert "<li>It has 50.0 % and\n  (1.0).</li>" in words and "<th>2</th>" in words and "=" not in words


def test_against_the_counts_of_a_published_run():
    folder = "reference/split_tiny_imagenet100_50/ncm"
    stages = json.loads((ROOT / "results" / folder / "order1993-seed0" / "metrics.json").read_text())["stages"]
    correct, total = stages[-1]["correct"], stages[-1]["total"]
    assert values.value(f"{folder} R.-1.0", "", ROOT) == f"{100 * correct[0] / total[0]:.1f}"
    assert values.value(f"{folder} accuracy_last", "", ROOT) == f"{100 * sum(correct) / sum(total):.1f}"
