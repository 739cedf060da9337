"""What a user brings along: learners, tuners, classifiers, rules and datasets from files, as in ``examples/``."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from test_runner import settings

from cil import build_rule, build_tuner, learners
from cil.config import Section
from cil.config.plugins import load_object
from cil.config.reading import validated
from cil.data.images import load_images
from cil.errors import CilError, ConfigError, PluginError
from cil.features import FeatureCache
from cil.learner import Context
from cil.learners import registry
from cil.runner import run, run_stages
from cil.runner.plan import dump, plans
from cil.stream import Stream
from cil.stream.protocol import ClassIncremental
from cil.testing import parametrize_learner
from cil.testing.setting import Case, accelerator
from cil.tuning.configs import TunerConfig

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PAGES = {
    "my_learner.py": "your_own_learner.md",
    "my_tuner.py": "your_own_tuner.md",
    "my_classifier.py": "your_own_classifier.md",
    "my_rule.py": "your_own_rule.md",
    "my_dataset.py": "your_own_dataset.md",
}
LEARNER = f"{EXAMPLES}/my_learner.py:WhitenedMean"
TUNER = f"{EXAMPLES}/my_tuner.py:BlockShift"
BAYES = f"{EXAMPLES}/my_classifier.py:NaiveBayesLearner"
RULE = f"{EXAMPLES}/my_rule.py:MeanDirection"
DATASET = f"{EXAMPLES}/my_dataset.py:load"


def test_every_example_stands_on_its_page_and_is_short():
    assert {path.name for path in EXAMPLES.glob("my_*.py")} == PAGES.keys()
    for name, page in PAGES.items():
        code = (EXAMPLES / name).read_text(encoding="utf-8")
        assert len(code.splitlines()) <= 60, name
        assert f'```python title="{name}"\n{code}```' in (ROOT / "docs" / page).read_text(encoding="utf-8"), page
    assert len((EXAMPLES / "my_learner.py").read_text(encoding="utf-8").splitlines()) < 60


def test_renditions_are_made_of_the_images_and_equally_frequent(picture_folder):
    from cil.data.sources import folder

    load = load_object(f"{EXAMPLES}/renditions.py:load", "dataset")
    root = picture_folder(train=9)
    plain, made = folder(root / "train"), load("train", root)
    pixels = [(np.asarray(plain.read(i)).astype(int), np.asarray(made.read(i)).astype(int)) for i in range(len(plain))]
    kind = [made.describe(i).rsplit("(")[1].rstrip(")") for i in range(len(made))]
    for (before, after), name in zip(pixels, kind, strict=True):
        if name == "inverted":
            assert np.array_equal(after, 255 - before)
        elif name == "posterised":
            assert np.array_equal(after, np.where(before >= 128, 255, 0))
        elif name == "edges":
            assert np.ptp(after, axis=2).max() == 0 and after.min() == 0 and after.max() == 255
        else:
            assert name == "blurred" and abs(after.mean() - before.mean()) < 2 and after.std() < before.std() / 2
    for label in range(3):
        of_class = [name for name, c in zip(kind, made.labels, strict=True) if c == label]
        assert sorted(of_class[:4]) == sorted(of_class[4:8]) == ["blurred", "edges", "inverted", "posterised"]
    assert len({made.fingerprint, plain.fingerprint, load("train", root, seed=1).fingerprint}) == 3
    untouched = load("test", root, kinds=["original"])
    assert np.array_equal(untouched.read(0), folder(root / "val").read(0))
    with pytest.raises(ValueError, match="no rendition 'sketch'; there are edges"):
        load("train", root, kinds=["sketch"])


# the learners by themselves: cil check-learner on their pages, executed by test_docs.py
@parametrize_learner(
    [
        (BAYES, {"tuner": {"class": TUNER}, "epochs": 1}),
        ("merge", {"rule": {"class": RULE}, "epochs": 1, "statistics": 4, "tuner": "bitfit"}),
    ]
)
def test_example_passes_every_check(case, check):
    check(case)


# --- each against something independent -------------------------------------------------------------------------------


def test_the_learner_is_fishers_discriminant():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    rng = np.random.RandomState(0)
    labels = np.arange(90) % 3
    features = rng.normal(size=(90, 48)) + labels[:, None]
    case = Case(registry.resolve(LEARNER), {"shrinkage": 0.3})
    learner = case.learner()
    learner.begin(case.after(3).stream.tasks[2], Context(accelerator()))
    learner.counts, learner.sums = learner.counts[:3], learner.sums[:3]

    class Given:
        train = None

    class Features(Context):
        def features(self, eyes, data):
            return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)

    learner.learn(Given(), Features(accelerator(), FeatureCache(accelerator())))
    expected = LinearDiscriminantAnalysis("lsqr", shrinkage=0.3).fit(features, labels)
    found = learner.logits(torch.tensor(features, dtype=torch.float32)).numpy()
    theirs = features @ expected.coef_.T + expected.intercept_
    # scikit-learn shrinks every class's covariance on its own scale; equal class sizes make the traces agree
    np.testing.assert_allclose(found - found.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True), atol=0.02)


def test_the_classifier_is_gaussian_naive_bayes():
    from sklearn.naive_bayes import GaussianNB

    rng = np.random.RandomState(1)
    labels = np.arange(80) % 4
    features = rng.normal(size=(80, 6)) * (1 + labels[:, None]) + labels[:, None]
    ours = load_object(f"{EXAMPLES}/my_classifier.py:NaiveBayes", "classifier")(6, smoothing=1e-2)
    for part in (slice(0, 30), slice(30, 80)):
        ours.partial_fit(features[part], labels[part])
    theirs = GaussianNB(priors=[0.25] * 4, var_smoothing=1e-2).fit(features, labels)
    np.testing.assert_allclose(ours.logits(features).softmax(1).numpy(), theirs.predict_proba(features), atol=1e-9)


def test_the_tuner_shifts_what_every_block_gives(backbone):
    tuner = build_tuner({"class": TUNER, "scale": 2.0}, backbone)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(backbone(images, tuner), backbone(images))  # zero at first
    with torch.no_grad():
        tuner.shift[-1] = torch.randn(48, generator=torch.Generator().manual_seed(1))
    vit = backbone.model
    tokens = vit.blocks(vit._pos_embed(vit.patch_embed(images))) + 2.0 * tuner.shift[-1]
    expected = vit.forward_head(vit.norm(tokens), pre_logits=True)
    torch.testing.assert_close(backbone(images, tuner), expected)


def test_the_rule_by_hand():
    base = {"a": torch.zeros(2, 2)}
    rule = build_rule({"class": RULE, "scale": 0.5, "finalisers": [{"name": "norm_matching", "scale": 3.0}]})
    plain = build_rule({"class": RULE, "scale": 0.5})
    for r in (rule, plain):
        r.start(base)
        r.add({"a": torch.tensor([[3.0, 0], [0, 0]])}).add({"a": torch.tensor([[0, 0], [0, 4.0]])})
    # mean length 3.5, direction (3, 4) / 5, half of it
    torch.testing.assert_close(plain.merged()["a"], 0.5 * 3.5 * torch.tensor([[3.0, 0], [0, 4.0]]) / 5)
    torch.testing.assert_close(rule.merged()["a"].norm(), torch.tensor(3 * 3.5))


def test_the_dataset_has_its_classes_in_both_splits():
    make = load_object(DATASET, "dataset")
    train, test = make("train", per_class=3), make("test", per_class=3)
    assert train.class_names == test.class_names and len(train) == 24
    assert train.fingerprint == make("train", per_class=3).fingerprint != test.fingerprint
    assert np.asarray(train.read(0)).std() > 0


# --- through a benchmark ----------------------------------------------------------------------------------------------


def test_all_of_them_in_one_benchmark_and_again_from_its_resolved_configuration(tmp_path):
    config = settings(
        data={"dataset": DATASET, "options": {"per_class": 5}},
        learners=[
            LEARNER,
            {"class": BAYES, "label": "bayes", "tuner": TUNER, "epochs": 1},
            {"name": "merge", "rule": {"class": RULE, "scale": 0.9}, "tuner": "bitfit", "epochs": 1, "statistics": 4},
        ],
    )
    folders = run(config, tmp_path)
    assert [folder.parent.name for folder in folders] == ["WhitenedMean", "bayes", "merge"]
    written = yaml.safe_load((folders[1] / "config.yaml").read_text(encoding="utf-8"))
    assert written["learners"][0]["tuner"] == {"class": TUNER, "scale": 1.0}  # the default said
    merged = yaml.safe_load((folders[2] / "config.yaml").read_text(encoding="utf-8"))
    assert merged["learners"][0]["rule"] == {"class": RULE, "finalisers": [], "scale": 0.9}
    again = type(config).model_validate(written)
    assert [dump(plan.config) for plan in plans(again)] == [written]
    before = (folders[1] / "metrics.json").stat().st_mtime_ns
    run(again, tmp_path)  # finds the run finished
    assert (folders[1] / "metrics.json").stat().st_mtime_ns == before


def test_a_rule_of_ones_own_on_checkpoints_goes_on_from_its_state(tmp_path, monkeypatch):
    from cil.merging.on_disk import merge_files

    base = {"w": torch.zeros(3, 3)}
    tasks = [{"w": torch.randn(3, 3, generator=torch.Generator().manual_seed(t))} for t in range(2)]
    for name, state in (("base", base), ("one", tasks[0]), ("two", tasks[1])):
        save_file(state, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    config = {"class": RULE, "scale": 0.7}
    merge_files(config, "base.safetensors", ["one.safetensors"], "first.safetensors", state="state.safetensors")
    merge_files(config, "base.safetensors", ["two.safetensors"], "both.safetensors", state="state.safetensors")
    rule = build_rule(config).start(base).add(tasks[0]).add(tasks[1])
    torch.testing.assert_close(load_file("both.safetensors")["w"], rule.merged()["w"])
    with pytest.raises(ConfigError, match=re.escape(f"merge: {RULE} uses no statistics")):
        merge_files(config, "base.safetensors", ["one.safetensors"], "x.safetensors", stats=["s.safetensors"])


def test_a_dataset_from_a_list_of_files(tmp_path):
    """The one of the page: lazily read, with a root."""
    text = (ROOT / "docs" / "your_own_dataset.md").read_text(encoding="utf-8")
    (tmp_path / "listed.py").write_text(re.search(r'title="csv_dataset.py"\n(.*?)```', text, re.DOTALL)[1])
    for split in ("train", "test"):
        rows = [(f"{split}{i}.png", "ab"[i % 2]) for i in range(6)]
        for i, (file, _) in enumerate(rows):
            Image.fromarray(np.full((9, 9, 3), 40 * i, np.uint8)).save(tmp_path / file)
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    data = {"dataset": f"{tmp_path}/listed.py:load", "root": str(tmp_path)}
    [folder] = run(settings(data=data, stream={"increment": 1}), tmp_path / "results")
    assert (folder / "stage-01").is_dir()


# --- the mechanism ----------------------------------------------------------------------------------------------------

CODE = """
from __future__ import annotations
from typing import TYPE_CHECKING, Annotated
from pydantic import Field
from cil import Tuner
from cil.merging import Rule
if TYPE_CHECKING:
    from cil import Backbone

class Fits(Tuner):
    def __init__(self, backbone: Backbone, width: Annotated[int, Field(gt=0)] = 3, kind: str = "a", **more):
        super().__init__()
        self.given = width, kind, more

class Needs(Tuner):
    def __init__(self, backbone, width: int):
        super().__init__()

class Takes(Tuner):
    pass

class Unknowable(Tuner):
    def __init__(self, backbone, width: NoSuchType = 1):
        super().__init__()

class Other: ...

def nothing(split): return [1, 2]
def takes_nothing(): ...
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


@pytest.mark.parametrize(
    ("tuner", "message"),
    [
        ("{file}:Fts", "tuner: tuner '{file}:Fts': {file} has no 'Fts' .did you mean 'Fits'"),
        ("{file}:Other", "is <class '.*Other'>; it must be a subclass of Tuner"),
        ("{file}:Takes", "tuner '{file}:Takes': the constructor must take backbone first"),
        ("{file}:Unknowable", "its arguments cannot be checked: .*NoSuchType"),
        ("nowhere.py:X", "tuner 'nowhere.py:X': no such file nowhere.py"),
        ("no.such.module:X", "importing no.such.module failed with ModuleNotFoundError"),
        ({"class": "{file}:Needs"}, "^learner aper: tuner: width is missing$"),
        ({"class": "{file}:Needs", "widht": 2, "width": 1}, "tuner: unknown key widht .did you mean 'width'"),
        ({"class": "{file}:Fits", "width": 0}, "^learner aper: tuner: width: should be greater than 0, got 0$"),
        ({"class": "{file}:Fits", "width": "x", "kind": 3}, "tuner: width: .*\n.*tuner: kind: should be a"),
        ({"class": 3}, "tuner.class: should be a valid string, got 3"),
        ({"name": "class"}, "tuner.class is missing"),
        ({"name": "adapter", "class": "{file}:Fits"}, "unknown key tuner.class"),
        ("adaptr", "unknown 'adaptr' .did you mean 'adapter'.*osf, or class: file.py:Class$"),
    ],
)
def test_mistakes_are_one_line_each_and_name_the_key(file, tuner, message):
    def put(value):
        return value.replace("{file}", str(file)) if isinstance(value, str) else value

    tuner = {key: put(value) for key, value in tuner.items()} if isinstance(tuner, dict) else put(tuner)
    with pytest.raises(ConfigError, match=message.replace("{file}", re.escape(str(file)))) as error:
        list(plans(settings(learners=[{"name": "aper", "tuner": tuner}])))
    assert len(str(error.value).splitlines()) == (2 if "\n" in message else 1)


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ({"dataset": "{file}:nothing"}, PluginError, "returned list for train; it must return an ImageSource"),
        ({"dataset": "{file}:nothin"}, PluginError, "dataset '{file}:nothin': .* has no 'nothin' .did you mean"),
        (
            {"dataset": "{file}:takes_nothing"},
            PluginError,
            "'{file}:takes_nothing': the function must take split first",
        ),
        ({"dataset": DATASET, "options": {"per_clas": 1}}, ConfigError, "^data.options: unknown key per_clas .did you"),
        ({"dataset": DATASET, "options": {"per_class": "x"}}, ConfigError, "^data.options: per_class: should be a"),
        ({"dataset": DATASET, "root": "x"}, ConfigError, "^data.options: unknown key root"),
        ({"dataset": "shape"}, CilError, "hfds/<org>/<set>, file.py:function"),
    ],
)
def test_mistakes_about_datasets(file, tmp_path, data, kind, message):
    data = {**data, "dataset": data["dataset"].replace("{file}", str(file))}
    with pytest.raises(kind, match=message.replace("{file}", re.escape(str(file)))):
        run(settings(data=data), tmp_path)


def test_further_arguments_reach_a_class_that_takes_any(file, backbone):
    assert build_tuner({"class": f"{file}:Fits", "depth": 2}, backbone).given == (3, "a", {"depth": 2})


def test_a_file_is_run_once_and_anew_when_it_changed(tmp_path):
    (tmp_path / "json.py").write_text("from beside import VALUE\nclass Mine: value = VALUE\n")
    (tmp_path / "beside.py").write_text("VALUE = 1\n")
    first = load_object(f"{tmp_path}/json.py:Mine", "learner")
    assert first is load_object(f"{tmp_path}/json.py:Mine", "learner") and first.value == 1
    import json

    assert json.loads("[1]") == [1] and sys.modules["json"] is json  # the file's name takes nobody's place
    (tmp_path / "json.py").write_text("class Mine: value = 'changed'\n")
    assert load_object(f"{tmp_path}/json.py:Mine", "learner").value == "changed"


class Choice(Section):
    tuner: TunerConfig


def test_a_choice_survives_a_round_trip(file):
    choice = validated(Choice, {"tuner": {"class": f"{file}:Fits", "width": 5}})
    assert validated(Choice, choice.model_dump(mode="json")) == choice
    assert choice.model_dump()["tuner"] == {"class": f"{file}:Fits", "width": 5, "kind": "a"}


# --- without the runner -----------------------------------------------------------------------------------------------


def test_a_loop_of_ones_own_gives_what_the_runner_gives(backbone):
    def fresh():
        sources = {split: load_object(DATASET, "dataset")(split, per_class=4, size=32) for split in ("train", "test")}
        images = [load_images(source, split, backbone) for split, source in sources.items()]
        return Stream(*images, ClassIncremental(1993, increment=4))

    rows = run_stages(learners.build_learner("linear_probe", backbone), fresh(), accelerator=accelerator())
    stream, learner = fresh(), learners.build_learner({"name": "linear_probe"}, backbone)
    for task in stream.tasks:
        ctx = Context(stage=task.index)
        learner.begin(task, ctx)
        learner.learn(task, ctx)
    with stream.open_test() as test:
        for j, correct in enumerate(rows[-1]["correct"]):
            positions, labels = test.task(j)
            [(images, truth)] = test.images.batches(positions, labels, 64)
            assert int((learner.predict(images) == truth).sum()) == correct


def test_the_names_of_the_issue_are_there_and_cost_nothing():
    code = """
import sys
import cil
assert {"run", "Stream", "load_backbone", "learners", "build_learner", "load_images"} <= set(dir(cil))
assert not {"torch", "timm", "numpy"} & set(sys.modules)
from cil import run, Stream, load_backbone, learners
assert {"RanPAC", "NCMLearner"} <= set(dir(learners)) and learners.RanPAC.name == "ranpac"
assert cil.learners is learners
try:
    cil.nonsense
except AttributeError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "No cil attribute nonsense\n"


def test_a_learner_that_cannot_be_built_says_why(backbone):
    with pytest.raises(PluginError, match="unknown learner 'nmc'"):
        learners.build_learner("nmc", backbone)
    with pytest.raises(ConfigError, match="learner ncm: unknown key metrc"):
        learners.build_learner({"name": "ncm", "metrc": "cosine"}, backbone)


# --- cil new-learner; its checks are on docs/your_own_learner.md, executed by test_docs.py ---


def test_a_new_learner(tmp_path, monkeypatch, capsys):
    from cil.cli.learners import new_learner

    monkeypatch.chdir(tmp_path)
    new_learner("my_first_method")
    said = capsys.readouterr().out
    spec = "my_first_method.py:MyFirstMethod"
    assert f"cil check-learner {spec}" in said and f'{{class: "{spec}"}}' in said
    text = (tmp_path / "my_first_method.py").read_text(encoding="utf-8")
    assert "$" not in text and registry.resolve(spec).name == "my_first_method"
    with pytest.raises(ConfigError, match=r"my_first_method\.py exists already"):
        new_learner("my_first_method")
    assert (tmp_path / "my_first_method.py").read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", ["my-method", "class", "3d", "_", "_3", "a b", "../x", "", "json", "torch"])
def test_a_name_that_is_none_is_refused(tmp_path, monkeypatch, name):
    from cil.cli.learners import new_learner

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="cil new-learner: "):
        new_learner(name)
    assert not list(tmp_path.iterdir())


# --- the notebook -----------------------------------------------------------------------------------------------------


SHARED = """
from functools import partial
from pathlib import Path
import cil
from cil.store import FeatureStore
cil.run_stages = partial(cil.run_stages, store=FeatureStore(Path({place!r})))
"""
"""A first cell for the test: all streams of the notebook read the same frozen features, bit for bit, from one store."""


@pytest.mark.slow
def test_the_notebook_runs_and_says_what_it_said(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    to_curves = [line for source in code[:2] for line in source.splitlines() if line.strip()]
    assert len(to_curves) <= 20 and any("plot" in line for line in to_curves)
    committed = said(notebook)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SHARED.format(place=str(tmp_path / "store"))))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    assert any("image/png" in out.get("data", ()) for out in outputs(notebook))
    assert re.sub(r"[\d.]+ %", "", said(notebook)) == re.sub(r"[\d.]+ %", "", committed)
    numbers = [[float(x) for x in re.findall(r"([\d.]+) %", text)] for text in (said(notebook), committed)]
    np.testing.assert_allclose(*numbers, atol=1.0)  # another processor may round an image to another class
    assert len(numbers[0]) == 3
    assert list((tmp_path / "store").rglob("*.safetensors"))


def outputs(notebook):
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def said(notebook) -> str:
    return "".join(out.text for out in outputs(notebook) if out.get("name") == "stdout")
