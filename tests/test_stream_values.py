"""Metrics of few shots, long tails and returning classes: by hand, from counts to tables, figures and the page."""

from __future__ import annotations

import json

import numpy as np
import pytest
from comparisons import falling, header, rows, write

from cil import metrics, report, results, stream_values
from cil.errors import RunError
from cil.report import figures
from cil.runner.evaluation import Predictions, count_correct
from cil.stream import ClassIncremental, Repetition, Sampling, Stream

NAN = float("nan")
R = np.array([[0.9, NAN, NAN], [0.5, 0.8, NAN], [0.6, 0.9, 0.3]])
COUNTS = [[90], [50, 80], [60, 90, 30]]  # the same as images of 100
LABELS = np.arange(6).repeat(120)


def of_stream(stream, counts=COUNTS):
    return [{**row, "stream": stream} for row in rows(counts)]


def test_by_hand():
    assert metrics.performance_drop(np.array([0.9, 0.7, 0.65])) == pytest.approx(0.25)
    assert metrics.frequency_group(np.array([500, 101, 100, 20, 19, 1])).tolist() == [0, 0, 1, 1, 2, 2]
    # 10 images at 0.8 and 30 at 0.4; equal distances give the mean
    assert metrics.anytime_accuracy(np.array([0.8, 0.4]), np.array([10, 30])) == pytest.approx(0.5)
    assert metrics.anytime_accuracy(np.array([0.8, NAN, 0.4]), np.array([5, 9, 5])) == pytest.approx(0.6)
    assert [metrics.base_forgetting(R, i) for i in (1, 2)] == pytest.approx([0.4, 0.3])
    assert metrics.novel_forgetting(R) == pytest.approx(-0.1)
    undefined = metrics.base_forgetting(R, 0), metrics.novel_forgetting(R, 0), metrics.novel_forgetting(R, 1)
    assert np.isnan(undefined).all()
    expected = [[NAN, NAN, NAN], [0.4, NAN, NAN], [0.3, -0.1, NAN]]
    np.testing.assert_allclose(metrics.forgetting_matrix(R), expected)


def test_numbers_that_a_stream_gives_a_meaning():
    plain = results.summarise(rows(COUNTS))
    few = results.summarise(of_stream({"few_shots": True}))
    assert few.keys() - plain.keys() == {"performance_drop", "forgetting_base", "forgetting_novel"}
    assert few["performance_drop"] == pytest.approx(0.9 - 0.6) and few["forgetting_base"] == pytest.approx(0.3)
    assert few["accuracy_novel"] == pytest.approx(0.6) and few["accuracy_harmonic"] == pytest.approx(0.6)
    returning = of_stream({"returning": True})
    for row, images in zip(returning, (10, 30, 60), strict=True):
        row["costs"] = {**row["costs"], "train_images": images}
    found = results.summarise(returning)
    assert found["accuracy_anytime"] == pytest.approx((10 * 0.9 + 30 * 0.65 + 60 * 0.6) / 100)
    tail = results.summarise(of_stream({"by_frequency": {"correct": [100, 80, 0], "total": [120, 160, 20]}}))
    assert tail.keys() - plain.keys() == set(stream_values.LONG_TAIL)
    assert [tail[f"accuracy_{name}"] for name in metrics.FREQUENCIES] == pytest.approx([100 / 120, 0.5, 0])
    for row in (*returning, *of_stream({"few_shots": True})):
        assert set(stream_values.names(row)) <= {*found, *few}
    curves = results.curves(of_stream({"few_shots": True}))
    np.testing.assert_allclose(curves["forgetting/base"], [NAN, 0.4, 0.3])


def test_counts_by_frequency_come_from_the_training_images(image_set):
    """Six classes of 120, 47, 19, 7, 3 and 1 training images, whatever the test images are."""
    sampling = Sampling(imbalance=(0.01, "ordered"))
    order = ClassIncremental("natural", increment=3)
    stream = Stream(image_set(LABELS), image_set(np.arange(6).repeat(2)), order, sampling=sampling)
    assert stream.long_tail.tolist() == [120, 47, 19, 7, 3, 1]
    label = np.arange(6).repeat(2)
    predicted = np.array([0, 0, 1, 0, 2, 2, 3, 0, 0, 0, 5, 0])
    zero = np.zeros(12, np.int64)
    predictions = Predictions(zero, label // 3, label, predicted, predicted, predicted[:, None], 0, 0)
    row = count_correct(predictions, stream, 1)
    assert row["stream"] == {"by_frequency": {"correct": [2, 1, 4], "total": [2, 2, 8]}}
    assert sum(row["correct"]) == 7
    plain = Stream(image_set(LABELS), image_set(np.arange(6)), order)
    assert "stream" not in count_correct(predictions, plain, 1)
    kinds = {"few_shots": (order, Sampling(shots=2)), "returning": (Repetition(order, 1.0), Sampling())}
    for kind, (tasks, sampling) in kinds.items():
        other = Stream(image_set(LABELS), image_set(np.arange(6)), tasks, sampling=sampling)
        assert count_correct(predictions, other, 1)["stream"] == {kind: True}


@pytest.fixture
def few_shots(tmp_path):
    for name, novel in (("drowned", 0), ("repaired", 40)):
        counts = [[90], [80, novel], [70, novel, novel]]
        run = results.assemble(header(name, stream={"shots": 5}), of_stream({"few_shots": True}, counts), 3)
        folder = tmp_path / "bench" / name / "order1-seed0"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(run))
    return tmp_path


def test_tables_page_and_figure_show_them(few_shots):
    [compared] = report.compare_runs([few_shots])
    names = [column.name for column in compared.shown(report.select_columns([]))]
    assert names[names.index("accuracy_average") + 1 :][:6] == [*stream_values.FEW_SHOTS, *stream_values.BY_GROUP]
    assert [c.name for c in compared.shown(report.select_columns(["accuracy_last"]))] == ["accuracy_last"]
    row = next(line for line in report.markdown(compared).splitlines() if line.startswith("| drowned"))
    assert "| 70.0 | 0.0 | 0.0 |" in row  # base, novel, harmonic
    page = report.page([compared])
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])[0]
    assert {"accuracy/novel", "forgetting/base"} <= set(data["curves"])
    assert data["rows"][0]["runs"][0]["forgetting"] == [[None], [10.0, None], [20.0, 0.0, None]]
    groups = {one.title: list(one.runs) for one in compared.rows}
    drawn = figures.comparison(groups, "few shots")
    assert [axes.get_ylabel() for axes in drawn.axes][2] == figures.OF_STREAM["accuracy_harmonic"][1]


def test_returning_classes_share_a_table_whatever_the_orders_make_of_the_tasks(tmp_path):
    for order, tasks in ((1, [[0, 1, 2], [1, 3], [4, 5]]), (2, [[0, 1], [2, 3], [0, 4, 5]])):
        write(tmp_path, "ncm", falling(60), order, stream={"type": "blurry"}, tasks=tasks)
    [compared] = report.compare_runs([tmp_path])
    assert len(compared.rows[0].runs) == 2 and "3 tasks, 6 classes, which return" in compared.title


def test_other_streams_have_none_of_it(tmp_path):
    write(tmp_path, "plain", falling(60))
    [compared] = report.compare_runs([tmp_path])
    assert compared.of_stream == ()
    assert compared.shown(report.COLUMNS) == [column for column in report.COLUMNS if not column.difference]
    page = report.page([compared])
    assert "accuracy/novel" not in page and '"forgetting":' not in page
    assert len(figures.comparison({"plain": list(compared.rows[0].runs)}, "plain").axes) == 2


def test_counts_that_contradict_each_other(few_shots):
    file = next(few_shots.rglob("metrics.json"))
    run = json.loads(file.read_text())
    run["stages"][1]["stream"] = {"by_frequency": {"correct": [1, 1, 1], "total": [100, 100, 0]}}
    file.write_text(json.dumps(run))
    with pytest.raises(RunError, match="stage 1 has other numbers of correct images by frequency than by task"):
        results.read_run(file.parent)
