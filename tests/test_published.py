"""Published numbers: rows that a configuration here can run, and ours beside them once it has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comparisons import header, rows

from cil import results
from cil.config import Config
from cil.config.reading import load_config
from cil.runner.plan import plans
from scripts.publish import published

ROOT = Path(__file__).parent.parent

FILE = ROOT / "results" / "published.json"
FOUND = published.read(FILE)
ROWS = FOUND["rows"]
FOLDERS = {"imagenet_r": "imagenet-r", "imagenet_a": "imagenet-a"}


def named(row: dict) -> str:
    return f"{row['dataset']}-{row['increment']}-{row['checkpoint']}-{row['method']}"


@pytest.fixture(scope="module")
def configs() -> dict[str, Config]:
    return {named(row): published.configuration(row["config"], tuple(row["overrides"])) for row in ROWS}


def test_every_row_is_of_its_configuration(configs):
    assert len(configs) == len(ROWS)  # no row twice
    for row in ROWS:
        config, dataset = configs[named(row)], row["dataset"]
        if dataset == "cifar100":
            assert config.data.dataset == "torch/cifar100"
        else:
            assert config.data.dataset == "folder" and config.data.root == Path("data", FOLDERS.get(dataset, dataset))
        assert config.stream.initial_classes == 0 and config.stream.increment == row["increment"], named(row)
        assert config.backbone.name == f"vit_base_patch16_224.{row['checkpoint']}", named(row)
        natural = dataset == "vtab" and row["method"] != "RSIAT"
        assert config.orders == (["natural"] if natural else [1993]), named(row)
        assert row["learner"] in [entry.title for entry in config.learners], named(row)
        assert [plan.parameters for plan in plans(config)]  # its hyper-parameters are valid
        assert config.name.startswith(f"{dataset}_b0_inc{row['increment']}")


def test_rows_do_not_share_a_results_folder_with_other_settings(configs):
    """The same folder and learner mean the same run; ``cil run`` would refuse another one there."""
    seen: dict[tuple[str, str], tuple[str, object]] = {}
    for row in ROWS:
        config = configs[named(row)]
        entry = next(e for e in config.learners if e.title == row["learner"])
        setting = (
            config.backbone,
            config.stream,
            config.transform,
            config.data,
            tuple(map(str, config.orders)),
            repr(entry),
        )
        place = (config.name, row["learner"])
        assert seen.setdefault(place, (named(row), setting))[1] == setting, (seen[place][0], named(row))


def test_numbers_have_a_source_that_may_be_quoted():
    for row in ROWS:
        for value in row["values"]:
            assert FOUND["sources"][value["source"]]["tag"] in ("P", "S")
            given = [v for v in (value["a_avg"], value["a_last"]) if v is not None]
            assert given and all(20 < v < 100 for v in given), named(row)
    assert {v["source"] for row in ROWS for v in row["values"]} == set(FOUND["sources"])


def test_known_copying_faults_are_not_repeated():
    """MOS with EASE's value, MOS with its own of another setting, APER with one of EASE's Inc5."""
    pairs = {(r["method"], r["increment"]): [(v["a_avg"], v["a_last"]) for v in r["values"]] for r in ROWS
             if (r["dataset"], r["checkpoint"]) == ("imagenet_r", "augreg_in21k")}  # fmt: skip
    assert (81.74, 76.17) not in pairs["MOS", 20] and (82.96, 77.93) not in pairs["MOS", 10]
    assert (72.35, 64.33) in pairs["APER adapter", 5] and (72.35, 64.33) not in pairs["APER adapter", 10]


def run_folder(tree: Path, config: Config, learner: str, name: str, complete=True, average=0.9, last=0.8) -> None:
    """A run of two tasks of 10,000 test images with this average and last accuracy."""
    folder = tree / "reference" / config.name / learner / name
    folder.mkdir(parents=True)
    first, second = round(10_000 * (2 * average - last)), round(10_000 * last)
    stages = rows([[0], [0, 0]])
    for row, correct in zip(stages, ([first], [second, second]), strict=True):
        row |= {"correct": correct, "correct_within_task": correct, "total": [10_000] * len(correct)}
    about = {**header(learner), "config": config.model_dump(mode="json")}
    run = results.assemble(about, stages, 2 if complete else 3)
    (folder / "metrics.json").write_text(json.dumps(run))


def test_ours_stands_beside_them_once_there_are_runs(tmp_path):
    file = tmp_path / "published.json"
    file.write_text(FILE.read_text(encoding="utf-8"), encoding="utf-8")

    def line() -> str:
        table = published.published(file / "imagenet_r").splitlines()
        (found,) = [text for text in table if "| B0 Inc20, augreg_in21k | EASE |" in text]
        return found

    assert "81.73 / 76.17<br>83.87 / 77.75 | EASE<br>E2 | not run here |" in line()
    assert "<code>cil run imagenet_r/ease_b0_inc20</code>: ease |" in line()
    config = load_config("imagenet_r/ease_b0_inc20")
    other = load_config("imagenet_r/ease_b0_inc20", ["backbone.name=vit_base_patch16_224.augreg_in21k_ft_in1k"])
    natural, inc10 = (load_config("imagenet_r/ease_b0_inc20", [o]) for o in ("orders=[natural]", "stream.increment=10"))
    for i, wrong in enumerate((other, natural, inc10)):
        run_folder(tmp_path, wrong, "ease", f"wrong{i}")
    run_folder(tmp_path, config, "ease", "half", complete=False)
    assert "| not run here |" in line()
    run_folder(tmp_path, config, "ease", "order1993-seed0", average=0.8173, last=0.7617)
    assert "| 81.73 / 76.17 |" in line().replace("<br>", "")
    run_folder(tmp_path, config, "ease", "order1994-seed0", average=0.8373, last=0.7617)
    assert "| 82.73 ± 1.41 / 76.17 ± 0.00 (2 runs) |" in line()
