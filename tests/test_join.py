"""Runs joined by adding their sums: the classifier of one run over all images; what cannot be added is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from marks import slow_beyond
from safetensors.torch import load_file
from test_cli import cil  # noqa: F401 - a fixture
from test_runner import TINY, settings

from cil import results
from cil.classifiers import LDA, NCM, Gaussians, Mahalanobis, PartsLDA, Ridge, TruncatedSVD
from cil.data.arrays import from_arrays
from cil.data.source import ImageSource
from cil.data.sources import digits, rank_in_class
from cil.errors import ConfigError, RunError
from cil.export import export, load
from cil.growing import GrowingModel
from cil.prediction import open_run
from cil.reuse.joining import join
from cil.runner import run

SUMS = {
    "ncm": {},
    "slda": {"shrinkage": 0.1},
    "layer_lda": {},
    "fecam": {"shrinkage": [1, 1]},
    "ranpac": {"projection": 40, "strength": "gcv"},
}


def part(split: str, names: list[str], half: int = -1) -> ImageSource:
    """The digits of some names, with every second *one* if ``half`` is 0 or 1; a dataset of configurations."""
    source = digits(split)
    keep = np.isin(source.labels, [source.class_names.index(name) for name in names])
    if half >= 0 and split == "train":
        keep &= (source.labels != source.class_names.index("one")) | (np.arange(len(keep)) % 2 == half)
    if split == "test":
        keep &= rank_in_class(source.labels) % 4 == 0
    at = np.flatnonzero(keep)
    pixels = np.stack([np.asarray(source.read(int(i))) for i in at])
    labels = np.array([names.index(source.class_names[source.labels[i]]) for i in at])
    return from_arrays(pixels, labels, names)


def trained(place: Path, names: list[str], learner: dict, half: int = -1, **changes) -> Path:
    data = {"dataset": "test_join:part", "options": {"names": names, "half": half}}
    config = settings(data=data, learners=[learner], stream={"increment": 2}, orders=["natural"], **changes)
    [folder] = run(config, place / f"{'-'.join(names)}{half}")
    return folder


A, B = ["three", "one", "four"], ["five", "nine", "one", "two"]
"""Two sites; both know the digit one."""
ALL = ["three", "one", "four", "five", "nine", "two"]


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """A factory: learner → the folders of the two sites' runs and of one run over all their images."""
    made = {}

    def make(name: str) -> tuple[Path, Path, Path]:
        if name not in made:
            place, learner = tmp_path_factory.mktemp(name), {"name": name, **SUMS[name]}
            made[name] = tuple(trained(place, *one) for one in ((A, learner, 0), (B, learner, 1), (ALL, learner)))
        return made[name]

    return make


@pytest.fixture
def tests(tmp_path) -> Path:
    """Test images of all joined classes in class folders."""
    source = part("test", ALL)
    for i, label in enumerate(source.labels):
        file = tmp_path / "tests" / ALL[label] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        source.read(i).save(file)
    return tmp_path / "tests"


def random_images(count=7, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [
    lambda: NCM(6), lambda: LDA(6, 0.1), lambda: Ridge(6, 9, "gcv"), lambda: Ridge(6, None, 2.0),
    lambda: Mahalanobis(6), lambda: Gaussians(6), lambda: Gaussians(6, rank=6),
    lambda: PartsLDA(6, [[0, 4, 1], [5, 0]]),
], ids=["ncm", "lda", "ridge_gcv", "ridge", "mahalanobis", "gaussians", "gaussians_rank", "parts"])  # fmt: skip
def test_added_classifiers_are_one_that_saw_all_samples(make):
    """Against joint training, in float64; labels are permuted, and classes 1 and 2 have samples on both sides."""
    rng = np.random.RandomState(0)
    x, y = rng.randn(120, 6) + 3, np.arange(120) % 4
    one, two, joint = make(), make(), make()
    sides = np.isin(y, [0, 1, 2]) & (np.arange(120) % 3 > 0), None
    mine = sides[0]
    if isinstance(one, Ridge):
        for side in (one, two, joint):
            side.draw(torch.Generator().manual_seed(3))
    one.partial_fit(x[mine], y[mine])
    rows = [3, 2, 1, 0]  # its class i is class rows[i] here
    two.partial_fit(x[~mine], np.array([rows.index(label) for label in y[~mine]]))
    joint.partial_fit(x, y)
    found = one.add([(two, rows)]).logits(x)
    assert torch.equal(one.counts, joint.counts)
    torch.testing.assert_close(found, joint.logits(x), rtol=1e-10, atol=1e-10)
    one.clear().partial_fit(x, y)  # as if it had seen nothing before
    torch.testing.assert_close(one.logits(x), found, rtol=1e-10, atol=1e-10)


def test_a_ridge_keeps_the_strength_of_the_larger_side_where_samples_would_choose_it():
    rng = np.random.RandomState(0)
    one, two, three = (Ridge(5, None, "loo").partial_fit(rng.randn(n, 5), np.arange(n) % 3) for n in (10, 30, 20))
    for side, strength in ((one, 1e-3), (two, 1e-2), (three, 1e4)):
        side.strength_.fill_(strength)
    one.add([(two, [0, 1, 2]), (three, [0, 1, 2])])
    assert float(one.strength_) == 1e-2 and int(one.counts.sum()) == 60


def test_what_is_more_than_sums_is_not_added():
    with pytest.raises(ConfigError, match="Gaussians: cannot be added to one with another rank of covariances"):
        Gaussians(3, rank=1).add([(Gaussians(3, rank=2), [])])
    with pytest.raises(ConfigError, match="NCM: cannot be added to one with another width of features"):
        NCM(3).add([(NCM(4), [])])
    one, two = (Ridge(3, 5).draw(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    with pytest.raises(ConfigError, match="Ridge: cannot be added to one with another projection"):
        one.add([(two, [])])
    with pytest.raises(ConfigError, match="PartsLDA: cannot be added to one with another choice of parts"):
        PartsLDA(3, [[0], [1, 2]]).add([(PartsLDA(3, [[0, 1], [2]]), [])])
    with pytest.raises(ConfigError, match="another kind of classifier"):
        TruncatedSVD(3).add([(TruncatedSVD(3), [])])


@pytest.mark.parametrize("name", slow_beyond(["slda", "layer_lda"], SUMS))
def test_joined_runs_are_one_run_over_all_images(sites, name, tmp_path):
    """Class by class, whatever the order of rows: logits on random images, in float64 where features allow it."""
    one, two, whole = sites(name)
    joint = join([one, two], tmp_path / "joint")
    assert (joint.runs, joint.classes, joint.shared, joint.accuracy) == (2, 6, 1, None)
    found, known = open_run(joint.folder), open_run(whole)
    assert found.names == tuple(ALL)
    features = known.learner.features(random_images()).double()
    mine, theirs = (model.learner.logits(features)[:, [model.names.index(n) for n in ALL]] for model in (found, known))
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
    assert joint.images == sum(results.read_run(whole)["stages"][i]["costs"]["train_images"] for i in range(3))


def test_a_joined_run_predicts_exports_and_says_where_it_comes_from(sites, tmp_path, tests, cil):  # noqa: F811
    one, two, _ = sites("slda")
    out = tmp_path / "joint"
    ended = cil("join", one, two, "--out", out)
    assert ended.returncode == 0, ended.stderr
    assert "6 classes of 2 runs, 1 of them in several" in ended.stdout
    image = next((tests / "three").iterdir())
    assert "three" in cil("predict", out, image, "--top", 6).stdout
    assert "slda after stage 1 of 1" in cil("export", out).stdout
    card = (out / "export-safetensors" / "README.md").read_text()
    assert "has not been tested as a whole" in card and "Joined from 2 runs" in card
    exported, opened = load(out / "export-safetensors"), open_run(out)
    torch.testing.assert_close(exported(random_images())[0], opened(random_images())[0])
    header = json.loads((out / "metrics.json").read_text())
    for parent, folder in zip(header["joined"], (one, two), strict=True):
        known = json.loads((folder / "metrics.json").read_text())
        assert parent["checksum"] == known["checksum"] and parent["folder"] == str(folder.resolve())
        assert parent["data"]["train"]["tasks"] == known["data"]["train"]["tasks"]
    ended = cil("compare", out)  # without numbers, and not an error
    assert ended.returncode == 0, ended.stderr
    assert "slda" in ended.stdout


def test_with_test_images_it_is_a_tested_run(sites, tmp_path, tests):
    one, two, whole = sites("slda")
    joint = join([one, two], tmp_path / "joint", images=tests)
    known = open_run(whole)
    read = results.read_run(joint.folder)
    [row] = read["stages"]
    paths = sorted(tests.rglob("*.png"))
    from cil.prediction import predict

    hits = sum(ranked[0][0] == path.parent.name for path, ranked in predict(known, paths, top=1))
    assert row["correct"] == [hits] and row["total"] == [len(paths)]
    assert joint.accuracy == read["summary"]["accuracy_last"] == hits / len(paths)
    assert read["tested_on"] == "test" and read["data"]["test"]["images"] == len(paths)
    assert [run["folder"] for run in results.find([tmp_path / "joint"])] == [str(joint.folder)]


def test_joined_runs_are_joined_again(sites, tmp_path):
    """(A + B) + C = A + (B + C), and a run that is inside already is refused."""
    one, two, _ = sites("slda")
    three = trained(tmp_path, ["six", "one"], {"name": "slda", **SUMS["slda"]}, 1)
    left = join([join([one, two], tmp_path / "ab").folder, three], tmp_path / "ab-c")
    right = join([one, join([two, three], tmp_path / "bc").folder], tmp_path / "a-bc")
    a, b = (load_file(side.folder / "stage-00" / "learner.safetensors") for side in (left, right))
    torch.testing.assert_close(a["classifier.sums"], b["classifier.sums"], rtol=1e-14, atol=1e-12)
    assert open_run(left.folder).names == open_run(right.folder).names
    with pytest.raises(RunError, match=r"has learned the same images of 'five' as .*they would count twice"):
        join([left.folder, two], tmp_path / "again")


def test_what_cannot_be_joined_is_named_in_one_line_and_nothing_is_written(sites, tmp_path, tests):
    one, _, _ = sites("ranpac")
    slda, slda_too, _ = sites("slda")
    probe = trained(tmp_path, ["six", "seven"], {"name": "linear_probe", "epochs": 1})
    seed = trained(tmp_path, ["six", "eight"], {"name": "ranpac", **SUMS["ranpac"]}, seeds=[1])
    tuned = [trained(tmp_path, names, {"name": "slda", "tuner": "ssf", "epochs": 1}) for names in (A, ["six", "zero"])]
    other = trained(tmp_path, ["zero", "seven"], {"name": "ncm"}, transform={"normalize": "none"})
    cases = [
        ([one], "joining needs two runs or more"),
        ([one, one], "given twice"),
        ([one, slda_too], r"name = 'slda', and 'ranpac' in .*--route"),
        ([one, tmp_path / "none"], "no metrics.json there"),
        ([probe, probe.parent / "none"], "no metrics.json there"),
        ([one, seed], r"its projection differs from that of .*another seed.*--route"),
        (tuned, r"its tuner\.\S+ differs .*--route"),
        ([slda, other], r"transform\.mean = \[0.0, 0.0, 0.0\], and \[.*frozen features"),
    ]
    for folders, message in cases:
        with pytest.raises(RunError, match=message) as told:
            join(folders, tmp_path / "joint")
        assert "\n" not in str(told.value)
    with pytest.raises(RunError, match="linear_probe is not made of sums"):
        join(
            [probe, trained(tmp_path, ["zero", "eight"], {"name": "linear_probe", "epochs": 1}, 0)], tmp_path / "joint"
        )
    with pytest.raises(RunError, match=r"the class 'five'; give test images of exactly its 6"):
        join(sites("slda")[:2], tmp_path / "joint", images=_without(tests, "five"))
    with pytest.raises(RunError, match="exists already"):
        join(sites("slda")[:2], one)
    assert not (tmp_path / "joint").exists() and not list(tmp_path.glob(".joint*"))


def _without(folder: Path, name: str) -> Path:
    import shutil

    shutil.rmtree(folder / name)
    return folder


def test_equal_tuners_are_no_hindrance(tmp_path, sites):
    """A tuner that starts at the identity and is not trained is byte-equal at both sites."""
    learner = {"name": "slda", "tuner": "ssf", "epochs": 1, "lr": 1e-30, "weight_decay": 0}
    one, two = trained(tmp_path, A, learner, 0), trained(tmp_path, B, learner, 1)
    joint = join([one, two], tmp_path / "joint")
    plain = join(sites("slda")[:2], tmp_path / "plain")
    assert open_run(joint.folder).names == open_run(plain.folder).names
    assert export(joint.folder).is_dir()


def test_models_that_keep_learning_are_joined_without_what_they_forgot(tmp_path):
    """Two models of several lessons, one of which forgot a class: rows of the same name add, others stay."""
    one, two = (GrowingModel(tmp_path / name, "ncm", TINY, device="cpu") for name in ("one", "two"))
    one.learn(part("train", ["three", "four"]))
    one.learn(part("train", ["one"], 0))
    one.forget("three")
    two.learn(part("train", ["five", "one"], 1))
    joint = join([one.path, two.path], tmp_path / "joint")
    model = open_run(joint.folder)
    assert model.names == ("four", "one", "five") and joint.shared == 1
    found = model.learner.classifier
    known = [open_run(folder).learner.classifier for folder in (one.path, two.path)]
    counts = [int(known[0].counts[1]), int(known[0].counts[2] + known[1].counts[1]), int(known[1].counts[0])]
    assert found.counts.tolist() == counts and min(counts) > 0
    torch.testing.assert_close(found.sums[1], known[0].sums[2] + known[1].sums[1], rtol=1e-14, atol=0)
    assert open_run(join([one.path, two.path], tmp_path / "routed", route=True).folder).names == model.names
    two.forget("five", hide=True)
    with pytest.raises(RunError, match=r"hides the class 'five'.*teach it again"):
        join([one.path, two.path], tmp_path / "again")
