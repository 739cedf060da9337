"""`cil teach` without its server: what the page does with a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from marks import slow_beyond
from safetensors.torch import load_file
from test_growing import picture
from test_runner import TINY

from cil import IncrementalClassifier
from cil.app.teaching import Teacher, Upload, checked_name
from cil.errors import ConfigError, DataError, RunError
from cil.growing import GrowingModel
from cil.growing.calibration import open_sure
from cil.growing.summary import facts
from cil.prediction import open_confident, predict
from cil.runner.checkpoint import RunFolder
from cil.runner.tensorboard import Tracker

EVIL = "<img src=x onerror=document.title='broken'>"


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch):
    """TensorBoard's figure of the matrix takes most of a lesson's time here."""
    monkeypatch.setattr(Tracker, "_matrix", lambda self, r, stage: None)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Eight images each of four classes, in class folders."""
    root = tmp_path_factory.mktemp("images")
    for c, name in enumerate(("ant", "bee", "cat", "dog")):
        for i in range(8):
            picture(root / name / f"{name}{i}.png", 100 * c + i)
    return root


def files(images: Path, name: str, *which: int) -> list[Path]:
    return [images / name / f"{name}{i}.png" for i in which or range(8)]


def uploads(images: Path, name: str, *which: int) -> list[Upload]:
    return [Upload(file.name, file.read_bytes()) for file in files(images, name, *which)]


@pytest.fixture(scope="module")
def first(images, tmp_path_factory) -> Path:
    """``given`` with the images of two classes, and ``model``, which has learned them."""
    root = tmp_path_factory.mktemp("first")
    for name in ("ant", "bee"):
        shutil.copytree(images / name, root / "given" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "_matrix", lambda self, r, stage: None)
        GrowingModel(root / "model", "ncm", TINY, device="cpu").learn(root / "given", holdout=0.25)
    return root


@pytest.fixture
def folder(first, tmp_path) -> Path:
    """A model that knows two classes."""
    return shutil.copytree(first / "model", tmp_path / "model")


def stored(folder: Path) -> dict[str, bytes]:
    """The contents of all files that a model consists of."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith("events.") and file.name != "run.lock"
    }


# --- without a server -------------------------------------------------------------------------------------------------
def test_it_predicts_teaches_and_undoes_as_the_commands_do(folder, first, images, tmp_path):
    """Against `cil predict` on the same files, and a copy of the model that a folder with the same images teaches."""
    teacher = Teacher(folder, device="cpu", holdout=0.25)
    before, wanted = stored(folder), files(images, "cat", 0, 1) + files(images, "ant", 2)
    found = teacher.predict([Upload(file.name, file.read_bytes()) for file in wanted])
    assert found["calibrated"]
    assert found["note"] == "Unknown images cannot be told yet: 4 images are held out, 19 are needed."
    expected = [list(ranked) for _, ranked in predict(open_sure(folder)[0], wanted, 3)]
    assert [one["classes"] for one in found["images"]] == expected

    shutil.copytree(images / "cat", tmp_path / "lesson" / "cat")
    copy = GrowingModel(tmp_path / "copy", "ncm", TINY, device="cpu")
    copy.learn(first / "given", holdout=0.25)
    assert copy.learn(tmp_path / "lesson", holdout=0.25).stage == 1
    answer = teacher.teach(uploads(images, "cat"), " cat ")
    assert answer == {"message": "Learned cat from 6 images; 2 held out.", "notes": []}
    mine, theirs = (load_file(one / "stage-01" / "learner.safetensors") for one in (folder, copy.path))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    lessons = [facts(one)["lessons"][-1] for one in (folder, copy.path)]
    assert lessons[0]["sha256"] == lessons[1]["sha256"]
    state = teacher.state()
    assert state["classes"] == ["ant", "bee", "cat"] and state["undo"] == "lesson 2 (cat)"
    assert [one["accuracy_now"] for one in state["lessons"]] == [
        one["accuracy_now"] for one in facts(copy.path)["lessons"]
    ]
    assert "cat" in {name for name, _ in teacher.predict(uploads(images, "cat", 0))["images"][0]["classes"]}
    assert "Nothing new" in teacher.teach(uploads(images, "cat"), "cat")["message"]
    assert teacher.undo(state["version"])["message"] == "Undone: lesson 2 (cat)."
    assert stored(folder) == before and teacher.state()["classes"] == ["ant", "bee"]


def test_the_first_lesson_makes_the_model(images, tmp_path, monkeypatch):
    monkeypatch.setattr("cil.growing.setting.DEFAULT_LEARNER", {"name": "ncm"})
    teacher = Teacher(tmp_path / "new", device="cpu", holdout=0.25)
    assert teacher.state()["version"] == "" and not (tmp_path / "new").exists()
    assert teacher.predict(uploads(images, "ant", 0)) == {
        "images": [{"classes": [], "known": None}],
        "calibrated": False,
        "note": "The model knows no class yet.",
    }
    teacher.teach(uploads(images, "ant"), "ant")
    state = teacher.state()
    assert state["classes"] == ["ant"] and state["accuracy"] == 1
    teacher.undo(state["version"])
    assert teacher.state()["undo"] is None and teacher.predict(uploads(images, "ant", 0))["images"][0]["classes"] == []
    with pytest.raises(ConfigError, match="reject: 1; allowed: above 0 and below 1"):
        Teacher(tmp_path / "new", reject=1)
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text("{}")
    with pytest.raises(RunError, match="no model of `cil learn`"):
        Teacher(run)


def test_a_calibrated_model_gives_probabilities_and_says_unknown(images, tmp_path):
    known = files(images, "ant") + files(images, "bee")
    model = IncrementalClassifier("ncm", TINY, device="cpu", holdout=0.5)
    model.fit(known, [file.parent.name for file in known]).save(tmp_path / "model")
    given = uploads(images, "cat") + uploads(images, "dog") + uploads(images, "ant")
    found = Teacher(tmp_path / "model", device="cpu", reject=0.2).predict(given)
    assert found["calibrated"] and not found["note"]
    paths = files(images, "cat") + files(images, "dog") + files(images, "ant")
    expected = list(predict(open_confident(tmp_path / "model", reject=0.2), paths))
    assert [one["known"] for one in found["images"]] == [ranked.known for _, ranked in expected]
    assert {one["known"] for one in found["images"]} == {True, False}
    for one in found["images"]:
        assert sum(score for _, score in one["classes"]) == pytest.approx(1)
    strict = Teacher(tmp_path / "model", device="cpu", reject=0.05).predict(given)
    assert strict["note"] == "Unknown images cannot be told yet: 8 images are held out, 19 are needed."
    assert {one["known"] for one in strict["images"]} == {None}


BAD = ["", "  ", "a/b", "..", ".hidden", "c\\d", "x" * 101, "two\nlines", "a\u202eb", "nul\0"]


@pytest.mark.parametrize("name", BAD)
def test_names_that_no_folder_can_have_are_refused(name):
    with pytest.raises(DataError, match=r"^class name .*give another name$"):
        checked_name(name)


def test_names_are_shown_and_kept_as_they_are(folder, images):
    teacher = Teacher(folder, device="cpu")
    assert EVIL in teacher.teach(uploads(images, "cat"), EVIL)["message"]
    assert teacher.state()["classes"] == ["ant", "bee", EVIL]
    with pytest.raises(DataError, match="only in case"):
        teacher.teach(uploads(images, "dog"), "ANT")


def test_broken_files_are_named_and_the_others_used(folder, images):
    teacher = Teacher(folder, device="cpu", holdout=0, max_pixels=20 * 20)
    broken = [Upload("words.png", b"no image"), Upload("half.png", files(images, "cat", 0)[0].read_bytes()[:60])]
    given = [*broken, *uploads(images, "cat", 0, 1)]
    answers = teacher.predict(given)["images"]
    assert [("error" in one, len(one.get("classes", ()))) for one in answers] == [(True, 0)] * 2 + [(False, 2)] * 2
    assert answers[0]["error"].startswith("not a readable image") and "\n" not in answers[1]["error"]
    answer = teacher.teach(given, "cat")
    assert answer["message"].startswith("Learned cat from 2 images")
    assert answer["notes"] == ["2 unreadable files left out (half.png, words.png)"]
    before = stored(folder)
    with pytest.raises(DataError, match=r"none of the 2 images can be read: words\.png"):
        teacher.teach(broken, "dog")
    with pytest.raises(DataError, match="no image to teach"):
        teacher.teach([], "dog")
    strict = Teacher(folder, device="cpu", max_pixels=15 * 15)
    assert "too large an image (256 pixels" in strict.predict(uploads(images, "cat", 0))["images"][0]["error"]
    assert stored(folder) == before


def test_a_model_that_another_process_teaches_is_read_again(folder, images, tmp_path):
    teacher = Teacher(folder, device="cpu", holdout=0)
    seen = teacher.state()["version"]
    teacher.predict(uploads(images, "cat", 0))
    other = Teacher(folder, device="cpu", holdout=0)
    other.teach(uploads(images, "cat"), "cat")
    assert len(teacher.predict(uploads(images, "cat", 0))["images"][0]["classes"]) == 3
    before = stored(folder)
    with pytest.raises(RunError, match="has changed meanwhile"):
        teacher.undo(seen)
    with RunFolder(folder).locked():
        for action in (
            lambda: teacher.teach(uploads(images, "dog"), "dog"),
            lambda: teacher.undo(other.state()["version"]),
        ):
            with pytest.raises(RunError, match="another process is running in this folder"):
                action()
    assert stored(folder) == before
    other._growing.rename("cat", "kitten")
    assert teacher.state()["undo"] == "renaming cat to kitten"
    other._growing.forget("bee")
    assert teacher.state()["undo"] == "bee being forgotten"
    assert teacher.undo(teacher.state()["version"])["message"] == "Undone: bee being forgotten."
    assert teacher.state()["classes"] == ["ant", "bee", "kitten"]


class Killed(BaseException):
    """Stands for a signal that ends the process."""


@pytest.mark.parametrize("place", slow_beyond(["saved", "committed"], ["learned", "saved", "commit", "committed"]))
def test_a_lesson_that_is_killed_leaves_the_model_before_or_after(place, folder, images):
    def point(name: str) -> None:
        if name == place:
            raise Killed

    dying = Teacher(folder, device="cpu")
    dying._growing._folder.point = point
    with pytest.raises(Killed):
        dying.teach(uploads(images, "cat"), "cat")
    happened = place == "committed"
    teacher = Teacher(folder, device="cpu")
    assert teacher.state()["classes"] == ["ant", "bee"] + ["cat"] * happened
    assert len(teacher.predict(uploads(images, "cat", 0))["images"][0]["classes"]) == 2 + happened
    assert ("Nothing new" in teacher.teach(uploads(images, "cat"), "cat")["message"]) == happened
    assert teacher.state()["classes"] == ["ant", "bee", "cat"]
