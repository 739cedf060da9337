"""Stored runs found by images: kernel means against kernel sums, weights by the conditions of optimality, the table."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import multivariate_normal
from test_cli import cil  # noqa: F401 - a fixture
from test_join import part, trained
from test_runner import TINY

from cil import find, results
from cil.classifiers.lda import LDA
from cil.classifiers.tied import TiedGaussians
from cil.errors import DataError, RunError
from cil.growing import GrowingModel
from cil.prediction import open_run
from cil.reuse import describing, specification
from cil.reuse.finding import describe, mixture
from cil.reuse.specification import FILE, GAMMA, WIDTH, Specification, random_features, unit_length
from cil.selection.transferability import ncm_leave_one_out

LOW, HIGH = ["zero", "one", "two"], ["three", "four", "five"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("found")
    made = {
        "low": trained(place, LOW, {"name": "ncm"}),
        "high": trained(place, HIGH, {"name": "slda"}),
        "other": trained(place, ["six", "seven", "two"], {"name": "ncm"}, transform={"normalize": "none"}),
        "tuned": trained(place, ["eight", "nine"], {"name": "aper", "epochs": 1}),
    }
    describe([place])  # here, so that the tests do not depend on their order
    return made


@pytest.fixture
def pictures(tmp_path):
    """A factory: writes test digits of some names into class folders, or into one folder."""

    def make(names: list[str], flat: bool = False) -> Path:
        source, root = part("test", names), tmp_path / ("flat" if flat else "classes")
        for i, label in enumerate(source.labels):
            file = root / f"{i}.png" if flat else root / names[label] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            source.read(i).save(file)
        return root

    return make


def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.exp(-GAMMA * torch.cdist(x, y).square())


def points(count: int, shift: float, seed: int) -> torch.Tensor:
    x = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return unit_length(x + shift)


def test_random_features_approach_the_kernel_as_they_become_more(monkeypatch):
    """MMD² by features against exact kernel sums; the error falls as 1/√m."""
    x, y = points(60, 0.3, 0), points(50, -0.1, 1)
    exact = float(kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean())
    errors = []
    for width in (256, WIDTH, 65536):
        monkeypatch.setattr(specification, "WIDTH", width)
        specification._frequencies.cache_clear()
        found = float((random_features(x).mean(0) - random_features(y).mean(0)).square().sum())
        errors.append(abs(found - exact) / exact)
    specification._frequencies.cache_clear()
    assert errors[1] < 0.1 and errors[2] < 0.03 and errors[2] < errors[0]


def test_specifications_are_sums(tmp_path):
    x, y = points(40, 0.3, 0), torch.arange(40) % 3
    whole = Specification("abc", 12).add(5 * x, y)  # the length of a feature has no effect
    halves = [Specification("abc", 12).add(x[half], y[half]) for half in (slice(0, 25), slice(25, 40))]
    joint = Specification.joined("abc", halves)
    torch.testing.assert_close(joint.kernel_mean, whole.kernel_mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(joint.gaussians.covariance, whole.gaussians.covariance, rtol=1e-10, atol=1e-14)
    whole.save(tmp_path, "s")
    again = Specification.load(tmp_path, "s")
    assert again is not None and torch.equal(again.kernel, whole.kernel) and again.names == whole.names
    assert torch.equal(again.gaussians.logits(x), whole.gaussians.logits(x))
    assert Specification.load(tmp_path, "another stage") is None
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-9])
    with pytest.raises(RunError, match=r"damaged .*delete it"):
        Specification.load(tmp_path, "s")


def test_tied_gaussians_are_scipys_densities_and_their_softmax_is_ldas():
    rng = np.random.RandomState(0)
    x, y = rng.randn(60, 5) @ rng.randn(5, 5) + 2, np.arange(60) % 3
    tied, lda = TiedGaussians(5, 0.3).partial_fit(x, y), LDA(5, 0.3).partial_fit(x, y)
    means = np.stack([x[y == c].mean(0) for c in range(3)])
    within = (x - means[y]).T @ (x - means[y]) / 60
    shrunk = 0.7 * within + 0.3 * np.trace(within) / 5 * np.eye(5)
    expected = np.stack([multivariate_normal(mean, shrunk).logpdf(x) + np.log(1 / 3) for mean in means], 1)
    np.testing.assert_allclose(tied.logits(x).numpy(), expected, rtol=1e-9)
    torch.testing.assert_close(tied.logits(x).softmax(1), lda.logits(x).softmax(1), rtol=1e-8, atol=1e-12)
    single = TiedGaussians(5).partial_fit(x[:2], [0, 1])  # without any variance: the nearest mean
    assert single.logits(x[:2]).argmax(1).tolist() == [0, 1] and bool(single.logits(x).isfinite().all())


@pytest.mark.parametrize("inside", [True, False])
def test_mixture_weights_fulfil_the_conditions_of_optimality(inside):
    """On the simplex, with one gradient on the support and none smaller off it; a true mixture is found again."""
    rng = torch.Generator().manual_seed(0)
    means = torch.randn(6, 40, generator=rng, dtype=torch.float64)
    true = torch.tensor([0.5, 0, 0.3, 0, 0.2, 0], dtype=torch.float64)
    target = true @ means if inside else torch.randn(40, generator=rng, dtype=torch.float64)
    w = mixture(means, target)
    gradient = means @ (w @ means - target)
    support = w > 1e-12
    assert bool((w >= 0).all()) and abs(float(w.sum()) - 1) < 1e-12
    level = gradient[support].mean()
    torch.testing.assert_close(gradient[support], level.expand(int(support.sum())), rtol=0, atol=1e-9)
    assert bool((gradient[~support] >= level - 1e-9).all())
    if inside:
        torch.testing.assert_close(w, true, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_the_run_whose_images_are_alike_comes_first(runs, pictures):
    for names, first in ((LOW, "low"), (HIGH, "high")):
        found = find([runs["low"], runs["high"]], pictures(names, flat=True))
        assert found.matches[0].folder == runs[first] and not found.labelled
        assert found.matches[0].weight > 0.9 and found.ratios[1] > 2
        shutil.rmtree(pictures(names, flat=True))


def test_a_runs_own_training_images_are_at_distance_zero(runs, tmp_path):
    source = part("train", LOW)
    for i, label in enumerate(source.labels):
        file = tmp_path / "own" / LOW[label] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        source.read(i).save(file)
    [match] = find([runs["low"]], tmp_path / "own").matches
    assert match.mmd2 < 1e-10 and match.weight == 1 and match.common == 3


def test_labels_give_accuracy_through_each_runs_features_and_compare_spaces(runs, pictures, cil):  # noqa: F811
    """The nearest mean by numpy, on features that the learner gives image by image."""
    names = ["two", "one", "nine"]
    found = find(list(runs.values()), pictures(names))
    assert [match.accuracy for match in found.matches] == sorted((m.accuracy for m in found.matches), reverse=True)
    by_run = {match.folder: match for match in found.matches}
    assert [by_run[runs[name]].common for name in ("low", "high", "other", "tuned")] == [2, 0, 1, 1]
    assert by_run[runs["other"]].space == 2 and set(found.ratios) == {1}
    model, files = open_run(runs["tuned"]), sorted(pictures(names).rglob("*.png"))
    from cil.data.reading import read_image

    with torch.no_grad():
        features = torch.cat([model.learner.features(read_image(file, model.transforms)) for file in files])
    labels = np.array([names.index(file.parent.name) for file in files])
    assert abs(by_run[runs["tuned"]].accuracy - ncm_leave_one_out(features, labels)) < 0.5 / len(labels)
    ended = cil("find", *runs.values(), "--images", pictures(names), "--top", 1)
    assert ended.returncode == 0 and "NCM %" in ended.stdout and "compare runs of one space" in ended.stdout
    assert sum(str(folder) in ended.stdout for folder in runs.values()) == 2  # the best of each space


def test_a_specification_is_made_once_without_forward_passes_and_follows_the_run(runs, pictures, tmp_path, cil):  # noqa: F811
    folder = tmp_path / "copy"
    shutil.copytree(runs["high"], folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    (folder / FILE).unlink()
    assert "specification of 3 classes" in cil("find", folder).stdout
    made = load_file(folder / FILE)
    again = load_file(runs["high"] / FILE)
    for key, value in again.items():
        torch.testing.assert_close(made[key], value)
    after = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert {k: v for k, v in after.items() if k != FILE} == {k: v for k, v in before.items() if k != FILE}
    shutil.rmtree(folder / "stage-01")  # as if the second task had not been learned yet
    assert "specification of 2 classes" in cil("find", folder).stdout


def test_what_cannot_be_searched_is_named(runs, pictures, tmp_path, cil):  # noqa: F811
    ended = cil("find", tmp_path / "none", "--images", pictures(LOW))
    assert ended.returncode == 2 and "no such folder" in ended.stderr
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="no run there"):
        find([tmp_path / "empty"], pictures(LOW))
    with pytest.raises(DataError, match="no such folder or tar file"):
        find([runs["low"]], tmp_path / "none")
    with pytest.raises(DataError, match="no images in this folder"):
        find([runs["low"]], tmp_path / "empty")
    folder = tmp_path / "copy"
    shutil.copytree(runs["high"], folder)
    (folder / FILE).unlink()
    text = (folder / "metrics.json").read_text()
    moved = text.replace("test_join:part", "nowhere:part").replace('"checksum"', '"old"')
    (folder / "metrics.json").write_text(moved)
    with pytest.raises(
        RunError, match=r"its training images cannot be read here .*`cil find .*copy the folder"
    ) as told:
        find([folder], pictures(LOW))
    assert "\n" not in str(told.value)
    changed = text.replace('"half": -1', '"half": 0').replace('"five"', '"one"').replace('"checksum"', '"old"')
    (folder / "metrics.json").write_text(changed)
    with pytest.raises(RunError, match="no longer those that it learned"):
        find([folder], pictures(LOW))


def test_models_that_keep_learning_are_found_by_the_features_that_they_keep(pictures, tmp_path):
    folders = []
    for names in (LOW, HIGH):
        model = GrowingModel(tmp_path / names[0], None, TINY, device="cpu")  # its own features are those of all blocks
        model.learn(part("train", names))
        folders.append(model.path)
    model.forget("three", part("train", HIGH))
    found = find(folders, pictures(HIGH[1:]))
    best = min(found.matches, key=lambda match: match.mmd2)
    assert best.folder == folders[1] and best.classes == 2 and best.common == 2
    before = Specification.load(folders[1], _state(folders[1]))
    model.undo()
    again = min(find(folders, pictures(HIGH[1:])).matches, key=lambda match: match.mmd2)
    assert before is not None and before.names == ("four", "five") and again.classes == 3  # made again, of all classes


def _state(folder: Path) -> str:
    header = results.read_header(folder)
    return describing._state(folder, header, len(header["tasks"]))
