"""Predictions on files and folders: the learner's own, whatever the batch; in order, in bounded memory, as a file."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import cil  # noqa: F401 - a fixture
from test_runner import settings

from cil.data.sources import digits
from cil.errors import DataError, ExportError
from cil.export import export
from cil.prediction import find_images, model, open_run, predict
from cil.prediction.output import open_writer
from cil.runner import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    [folder] = run(settings(data={"per_class": 20}), tmp_path_factory.mktemp("runs"))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Eleven digits in nested folders, beside what is no picture."""
    source, root = digits("test"), tmp_path_factory.mktemp("pictures")
    places = ["b.png", "a/9.png", "a/10.PNG", "a/deep/x.jpg", "c.webp", "d.bmp", *[f"z/{i}.png" for i in range(5)]]
    for i, place in enumerate(places):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        source.read(40 * i).resize((20 + i, 31)).save(root / place)
    (root / "a" / "notes.txt").write_text("no picture")
    (root / "folder.png").mkdir()
    return root


@pytest.fixture
def broken(tmp_path, pictures) -> Path:
    """A folder with a picture, a text that calls itself one, and half a picture."""
    whole = (pictures / "b.png").read_bytes()
    root = tmp_path / "some"
    root.mkdir()
    (root / "1.png").write_bytes(whole)
    (root / "2.png").write_text("no picture")
    (root / "3.png").write_bytes(whole[: len(whole) // 2])
    (root / "4.png").write_bytes(whole)
    return root


def test_folders_are_searched_in_order_and_each_picture_is_seen_once(pictures):
    numbered = [f"z/{i}.png" for i in range(5)]
    found = [p.relative_to(pictures).as_posix() for p in find_images([pictures])]
    assert found == ["a/10.PNG", "a/9.png", "a/deep/x.jpg", "b.png", "c.webp", "d.bmp", *numbered]
    some = [pictures / "z", pictures / "b.png", pictures / "z" / "1.png", pictures / "a" / "notes.txt"]
    found = [p.relative_to(pictures).as_posix() for p in find_images(some)]
    assert found == [*numbered, "b.png", "a/notes.txt"]  # a file is taken at its word
    with pytest.raises(DataError, match=r"folder\.png: no images in this folder; looked for .*\.jpg"):
        find_images([pictures / "folder.png"])
    with pytest.raises(DataError, match=r"none\.png: no such file or folder"):
        find_images([pictures / "b.png", pictures / "none.png"])


def test_predictions_are_the_learners_whatever_the_batch(trained, pictures):
    """Against the learner on one image at a time, prepared by PIL and numpy alone and ranked by numpy."""
    model, paths = open_run(trained), find_images([pictures])
    card, expected = model.transforms.card, []
    assert card["crop_mode"] == "center" and card["crop_pct"] == 0.9 and card["interpolation"] == "bicubic"
    for path in paths:
        image = Image.open(path).convert("RGB")
        scale = 17 / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = round((image.width - 16) / 2), round((image.height - 16) / 2)
        x = np.asarray(image.crop((left, top, left + 16, top + 16)), np.float32) / 255
        x = torch.from_numpy((x - np.float32(card["mean"])) / np.float32(card["std"])).permute(2, 0, 1)[None]
        with torch.no_grad():
            scores = model.learner.logits(model.learner.features(x))[0].numpy()
        order = np.argsort(-scores)[:3]
        expected.append([(model.names[i], scores[i]) for i in order])
    for batch_size in (1, 4, 32):
        found = list(predict(trained, paths, top=3, batch_size=batch_size))
        assert [path for path, _ in found] == paths
        for (_, ranked), truth in zip(found, expected, strict=True):
            assert [name for name, _ in ranked] == [name for name, _ in truth]
            np.testing.assert_allclose([v for _, v in ranked], [v for _, v in truth], atol=1e-5)


def test_pictures_are_read_a_batch_at_a_time(trained, pictures, monkeypatch):
    read = []
    monkeypatch.setattr(
        model, "read_image", lambda path, *rest, real=model.read_image: read.append(path) or real(path, *rest)
    )
    paths = find_images([pictures])
    going = predict(open_run(trained), paths, batch_size=2)
    assert read == []
    next(going)
    next(going)
    assert sorted(read) == paths[:2]
    next(going)
    assert sorted(read) == paths[:4]


def test_images_above_the_limit_are_refused_or_skipped(trained, pictures):
    small, large = pictures / "small.png", pictures / "large.png"
    Image.new("L", (30, 30)).save(small)
    Image.new("L", (30, 31)).save(large)
    with pytest.raises(DataError, match=r"large\.png: too large an image \(930 pixels, max_pixels allows 900\)"):
        list(predict(trained, [small, large], max_pixels=900))
    skipped = []
    found = list(predict(trained, [small, large], max_pixels=900, on_broken=skipped.append))
    assert [path for path, _ in found] == [small] and len(skipped) == 1
    small.unlink()
    large.unlink()


def test_progress_counts_images(trained, pictures):
    seen = []

    def track(items, description, length):
        for item in items:
            seen.append((description, length))
            yield item

    assert len(list(predict(trained, find_images([pictures]), batch_size=4, track=track))) == 11
    assert seen == [("images", 11)] * 11


def test_broken_pictures_are_named_and_raise_or_are_left_out(trained, broken):
    paths, skipped = find_images([broken]), []
    with pytest.raises(DataError, match=r"2\.png: not a readable image .*--on-error skip"):
        list(predict(trained, paths))
    for batch_size in (1, 2, 32):
        skipped.clear()
        found = list(predict(trained, paths, batch_size=batch_size, on_broken=lambda e: skipped.append(str(e))))
        assert [p.name for p, _ in found] == ["1.png", "4.png"]
        assert ["2.png: not a readable" in skipped[0], "3.png: not a readable" in skipped[1]] == [True, True]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_predictions_as_a_file(suffix, cil, trained, pictures, tmp_path):  # noqa: F811
    out = tmp_path / f"found{suffix}"
    out.write_text("older")
    done = cil("predict", trained, pictures, "--out", out, "--top", "2", "--batch-size", "3")
    assert done.returncode == 0 and done.stdout.strip() == f"{out}: 11 images", done.stderr
    text = out.read_text(encoding="utf-8")
    if suffix == ".csv":
        with out.open(newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
        assert head == ["path", "class_1", "score_1", "class_2", "score_2"]
        found = [(path, [(a, float(x)), (b, float(y))]) for path, a, x, b, y in rows]
    else:
        items = json.loads(text) if suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        found = [(item["path"], [(c["class"], c["score"]) for c in item["classes"]]) for item in items]
    expected = [(str(path), ranked) for path, ranked in predict(trained, find_images([pictures]), 2, batch_size=3)]
    assert found == expected
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_names_with_quotes_and_scores_without_end(tmp_path):
    rows = [(Path('a "b", c\n.png'), [("x, y", 0.5), ("ü", float("-inf"))])]
    for name in ("f.csv", "f.json", "f.jsonl"):
        with open_writer(tmp_path / name, 2) as add:
            for row in rows:
                add(*row)
    with (tmp_path / "f.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1] == [str(rows[0][0]), "x, y", "0.5", "ü", "-inf"]
    [item] = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert item == {
        "path": str(rows[0][0]),
        "classes": [{"class": "x, y", "score": 0.5}, {"class": "ü", "score": None}],
    }
    assert [json.loads((tmp_path / "f.jsonl").read_text(encoding="utf-8"))] == [item]
    with open_writer(tmp_path / "none.json", 2):
        pass
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_a_file_is_there_whole_or_as_it_was(cil, trained, broken, tmp_path):  # noqa: F811
    out = tmp_path / "found.csv"
    out.write_text("older")
    failed = cil("predict", trained, broken, "--out", out, "--batch-size", "1")
    assert failed.returncode == 2 and "2.png: not a readable image" in failed.stderr
    assert out.read_text() == "older" and sorted(p.name for p in tmp_path.iterdir()) == ["found.csv", "some"]
    done = cil("predict", trained, broken, "--out", out, "--on-error", "skip")
    assert done.returncode == 0 and done.stdout.strip() == f"{out}: 2 of 4 images"
    assert all(f"skipped {broken / name}: not a readable image" in done.stderr for name in ("2.png", "3.png"))
    assert len(out.read_text().splitlines()) == 3


def test_lines_for_people(cil, trained, pictures, broken):  # noqa: F811
    done = cil("predict", trained, pictures / "z", "--top", "2")
    lines = done.stdout.splitlines()
    expected = list(predict(trained, find_images([pictures / "z"]), top=2))
    assert lines == [f"{p}: " + ", ".join(f"{n} ({v:.3f})" for n, v in ranked) for p, ranked in expected]
    some = cil("predict", trained, broken, "--on-error", "skip")
    assert some.returncode == 0 and len(some.stdout.splitlines()) == 2 and "2 of 4 images could be read" in some.stderr


def test_an_exported_model_in_place_of_the_run(cil, trained, pictures, tmp_path):  # noqa: F811
    expected = list(predict(trained, find_images([pictures])))
    for kind in ("safetensors", "torch.export"):
        folder = export(trained, tmp_path / kind, kind)
        done = cil("predict", folder, pictures, "--out", tmp_path / "f.jsonl")
        assert done.returncode == 0, done.stderr
        for line, (path, ranked) in zip((tmp_path / "f.jsonl").read_text().splitlines(), expected, strict=True):
            item = json.loads(line)
            assert item["path"] == str(path) and [c["class"] for c in item["classes"]] == [name for name, _ in ranked]
            np.testing.assert_allclose([c["score"] for c in item["classes"]], [v for _, v in ranked], atol=1e-5)


def test_mistakes_are_one_line(cil, trained, pictures, broken, tmp_path):  # noqa: F811
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "metrics.json").write_text((trained / "metrics.json").read_text())
    (broken / "1.png").unlink()
    (broken / "4.png").unlink()
    picture = pictures / "b.png"
    for arguments, message in (
        ([tmp_path / "none", picture], "none: no metrics.json there"),
        ([begun, picture], "begun: no stage is finished"),
        ([trained, pictures / "folder.png"], "no images in this folder"),
        ([trained, pictures / "none.png"], "none.png: no such file or folder"),
        ([trained, picture, "--out", tmp_path / "f.txt"], "f.txt: predictions are written as .json, .jsonl, .csv"),
        ([trained, picture, "--out", tmp_path / "no" / "f.csv"], f"there is no folder {tmp_path / 'no'}"),
    ):
        found = cil("predict", *arguments)
        assert found.returncode == 2 and message in found.stderr, found.stderr
        assert len(found.stderr.strip().splitlines()) == 1 and found.stdout == ""
    unreadable = cil("predict", trained, broken, "--on-error", "skip", "--out", tmp_path / "f.csv")
    assert unreadable.returncode == 2 and "none of the 2 images can be read" in unreadable.stderr
    assert not (tmp_path / "f.csv").exists()


def test_a_program_stays_on_the_cpu(trained, tmp_path):
    from cil.export import load

    folder = export(trained, tmp_path / "m", "torch.export")
    with pytest.raises(ExportError, match=r"torch\.export runs on the CPU here, not on cuda"):
        load(folder, "cuda")
