"""Exported models: every learner gives its own logits in them; a folder is whole or not there; the card runs."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache

import numpy as np
import pytest
import timm
import torch
import yaml
from marks import on_any_backbone, slow_beyond
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import cil  # noqa: F401 - a fixture
from test_runner import TINY

from cil import results
from cil.backbone import load_backbone
from cil.config import BackboneConfig, Config
from cil.data.images import read_image
from cil.data.transforms import Transforms
from cil.errors import ExportError
from cil.export import FORMATS, export, load, writing
from cil.export import program as programs
from cil.export.card import licence
from cil.export.recipe import usage
from cil.export.writing import compare
from cil.learners import registry
from cil.prediction import Trained, open_run, predict
from cil.runner.plan import dump
from cil.testing import Case
from cil.testing.setting import NAMES, SIZES

VIT = {"name": "vit_tiny_patch16_224", "options": {**TINY["options"], "img_size": 32}, "weights": "random"}
LEARNERS = {
    "ncm": {},
    "linear_probe": {"epochs": 1},
    "finetune": {"epochs": 1},
    "joint": {"epochs": 1},
    "aper": {"epochs": 1},
    "amalgamate": {"epochs": 1},
    "ranpac": {"projection": 50},
    "acil": {"projection": 50},
    "air": {"projection": 50},
    "ds_al": {"projection": 50},
    "gkeal": {"centres": 20},
    "loranpac": {"projection": 50},
    "fecam": {"shrinkage": [10, 10]},
    "ease": {"epochs": 1, "bottleneck": 4, "init_ptm": True, "beta": 0.5},
    "slca": {"epochs": 1, "milestones": [1], "samples": 8, "alignment_epochs": 1},
    "ssiat": {"epochs": 1, "first_epochs": 1, "samples": 8, "alignment_epochs": 1},
    "cds": {"epochs": 1, "first_epochs": 1, "samples": 8, "alignment_epochs": 1},
    "rsiat": {"epochs": 1, "first_epochs": 1, "samples": 8, "alignment_epochs": 1, "code": 8},
    "macil": {"epochs": 1, "first_epochs": 1, "rank": 2, "samples": 8, "alignment_epochs": 1},
    "tuna": {"epochs": 1, "bottleneck": 4, "alignment_epochs": 1, "samples": 8},
    "mos": {"epochs": 1, "bottleneck": 4, "alignment_epochs": 1, "samples": 8},
    "care": {"epochs": 1, "bottleneck": 4, "shared": 4, "alignment_epochs": 1, "samples": 8},
    "care_ensemble": {"epochs": 1, "bottleneck": 4, "shared": 4, "alignment_epochs": 1, "samples": 8},
    "lae": {"epochs": 2, "frozen_epochs": 1, "tuner": {"name": "prefix", "compensate": True}},
    "min": {"epochs": 1, "width": 4, "projection": 50},
    "moal": {"epochs": 1, "projection": 50},
    "l2p": {"epochs": 1, "pool": 4, "top": 2},
    "dualprompt": {"epochs": 1, "general_blocks": [0], "expert_blocks": [1]},
    "coda_prompt": {"epochs": 1, "blocks": [0], "components": 2, "length": 2},
    "merge": {"epochs": 1},
    "merge_lca": {"epochs": 1, "alignment_epochs": 1, "samples": 8},
    "acmap": {"epochs": 1, "bottleneck": 4},
    "cofima": {"epochs": 1, "milestones": [1], "samples": 8, "alignment_epochs": 1, "statistics": 8},
    "duct": {"epochs": 1, "head_epochs": 1},
    "merge_oracle": {"epochs": 1},
    "smile": {"epochs": 1},
    "routed": {"epochs": 1},
    "slda": {},
    "layer_lda": {},
    "l2_sp": {"epochs": 1},
    "loda": {"epochs": 1, "rank": 2},
    "inflora": {"epochs": 1, "rank": 2},
    "sd_lora": {"epochs": 1, "rank": 2},
    "cl_lora": {"epochs": 1, "rank": 2},
    "e2_lora": {"epochs": 1, "schedule": "constant", "milestones": [], "samples": 8, "alignment_epochs": 1},
    "avalanche": {"epochs": 1},
    "avalanche_replay": {"epochs": 1},
}
ONNX = ["ranpac", "fecam", "ease", "mos", "lae", "l2p"]
"""Learners whose operations the others share; what is left to ONNX is to translate these.

The program that is translated is the one that ``torch.export`` stores, so these are not exported in that format too,
except the one that is exported in all formats.
"""
FAMILIES = ["ncm", "finetune", "aper", "ease", "slca", "l2p", "lae", "merge", "avalanche"]
"""One learner for each base that others share."""


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """A factory: learner and hyper-parameters → the folder of a run that finished two of three tasks."""

    def make(spec, parameters=None, **changes):
        depth = 2 if spec in ("dualprompt", "cl_lora") else 1
        config = Config.model_validate(
            {
                "name": "checks",
                "backbone": {**VIT, "options": {**VIT["options"], "depth": depth}},
                "stream": {"sizes": SIZES},
                "learners": [{"class" if ":" in spec else "name": spec, **(parameters or {})}],
                "orders": ["natural"],
                **changes,
            }
        )
        vit = load_backbone(config.backbone)
        folder = tmp_path_factory.mktemp("run")
        cls, _ = registry.configure(config.learners[0])
        done = Case(cls, parameters or {}).run(vit=vit, folder=folder, stop_after=2)
        transforms = Transforms(vit.data_config, config.transform)
        header = {
            "learner": config.learners[0].title,
            "paper": cls.paper,
            "stores_images": cls.stores_images,
            "trains_backbone": cls.trains_backbone,
            "chosen_by": "default",
            "tested_on": "test",
            "config": dump(config),
            "class_names": list(NAMES),
            "class_order": list(range(len(NAMES))),
            "tasks": [list(task.classes) for task in done.stream.tasks],
            "backbone": {"name": vit.name, "sha256": vit.fingerprint, "feature_dim": vit.feature_dim},
            "transform": transforms.card,
            "data": {"train": {"sha256": "0", "images": 85}, "test": {"sha256": "0", "images": 48}},
            "versions": {"cil": "0", "torch": "2"},
            "machine": {"device": "cpu"},
        }
        (folder / "metrics.json").write_text(json.dumps(results.assemble(header, done.rows, len(SIZES))))
        return folder

    return make


def images(count, seed=5):
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(32, 32))


def check_same(run, folder):
    """The artifact against the learner restored from the run, on other images and batch sizes than export looked at."""
    mine, theirs = open_run(run), load(folder)
    assert theirs.names == mine.names == NAMES[:5]
    for count in (1, 3, 8):
        with torch.no_grad():
            features = mine.learner.features(images(count)).float()
            logits = mine.learner.logits(features)
            found = theirs(images(count))
        scale = float(logits.abs().max())
        assert float((found[0] - logits).abs().max()) <= 1e-4 * scale
        torch.testing.assert_close(found[1], features, rtol=1e-4, atol=1e-4)
        assert found[0].argmax(1).tolist() == logits.argmax(1).tolist()


@pytest.fixture(scope="module")
def run_of(make_run):
    """Learner → its run, one for all formats."""
    return cache(lambda name: make_run(name, LEARNERS[name]))


@pytest.mark.parametrize(
    ("name", "kind"),
    slow_beyond(
        [*(("ranpac", kind) for kind in FORMATS), *((name, "safetensors") for name in FAMILIES)],
        [
            (name, kind)
            for name in LEARNERS
            for kind in FORMATS
            if name == "ranpac" or kind != ("torch.export" if name in ONNX else "onnx")
        ],
    ),
)
def test_every_learner_can_be_exported(name, kind, run_of, tmp_path):
    run = run_of(name)
    folder = export(run, tmp_path / kind, kind)
    check_same(run, folder)
    facts = json.loads((folder / "model.json").read_text())
    assert facts["check"]["logits"]["of_largest"] <= 1e-4 and facts["check"]["features"]["of_largest"] <= 1e-5
    assert [p.name for p in tmp_path.iterdir()] == [kind]


def test_all_built_in_learners_are_here():
    assert LEARNERS.keys() == set(on_any_backbone())


@pytest.mark.parametrize("tuner", slow_beyond(["lora"], ["lora", "vpt_deep"]))
def test_tuners_as_programs(tuner, make_run, tmp_path):
    run = make_run("aper", {"epochs": 1, "tuner": tuner})
    check_same(run, export(run, tmp_path / "p", "torch.export"))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"router": "smile"}, {"router": "gates"}, {"router": "entropy", "scores": "task"}])
def test_routers_as_programs(more, make_run, tmp_path):
    run = make_run("routed", {"epochs": 1, **more})
    check_same(run, export(run, tmp_path / "p", "torch.export"))


def test_merged_parameters_as_a_program(make_run, tmp_path):
    run = make_run("merge", {"epochs": 1, "tuner": {"name": "adapter", "bottleneck": 2}, "rule": "average"})
    check_same(run, export(run, tmp_path / "p", "torch.export"))


# --- what is in it ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ncm(make_run):
    return make_run("ncm")


def test_a_program_holds_each_weight_once_and_no_statistics(make_run):
    def tensors(name, parameters):
        model = open_run(make_run(name, parameters))
        model(*programs.example(model))
        program = programs.trace(model, name)
        count = sum(p.numel() for p in model.backbone.model.parameters())
        return program, {**program.state_dict, **program.constants}, count

    _, ranpac, backbone = tensors("ranpac", {"projection": 50})
    sizes = sorted(tuple(t.shape) for key, t in ranpac.items() if not key.startswith("backbone"))
    assert sizes == [(5,), (24, 50), (50, 5)]  # counts, projection, solution: no Gram matrix [50, 50]
    _, finetune, backbone = tensors("finetune", {"epochs": 1})
    assert sum(t.numel() for t in finetune.values()) == backbone + 5 * 24 + 5  # not the frozen weights besides
    program, lora, backbone = tensors("aper", {"epochs": 1, "tuner": {"name": "lora", "rank": 2}})
    assert sum(t.numel() for t in lora.values()) == backbone + 2 * (24 + 72) + 5 * 48 + 5  # one backbone for two views
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)


def test_safetensors_is_the_learner_itself(make_run, tmp_path):
    run = make_run("ranpac", {"projection": 50, "tuner": "adapter", "epochs": 1})
    folder = export(run, tmp_path / "m")
    mine, theirs = open_run(run), load(folder)
    assert isinstance(theirs, Trained) and theirs.learner.stages == 2
    for key, value in mine.learner.state_dict().items():
        assert torch.equal(value, theirs.learner.state_dict()[key]), key
    with torch.no_grad():
        assert torch.equal(mine(images(4))[0], theirs(images(4))[0])
    assert mine.transforms.card == {**theirs.transforms.card, "augment": mine.transforms.card["augment"]}
    run.rename(tmp_path / "gone")
    load(folder)  # needs nothing but itself


def test_the_facts_say_what_was_trained(ncm, tmp_path):
    facts = json.loads((export(ncm, tmp_path / "m") / "model.json").read_text())
    assert facts["classes"] == list(NAMES[:5]) and facts["tasks"] == [[0, 1, 2, 3], [4]]
    assert facts["learner"]["parameters"]["metric"] == "cosine"
    assert facts["stages"] == {"finished": 2, "planned": 3}
    assert facts["backbone"]["sha256"] == open_run(ncm).backbone.fingerprint
    assert facts["preprocessing"]["input_size"] == 32 and facts["preprocessing"]["mean"] == [0.5] * 3
    assert facts["summary"]["accuracy_last"] == results.read_run(ncm)["summary"]["accuracy_last"]
    assert facts["files"]["model.safetensors"]["bytes"] == (tmp_path / "m" / "model.safetensors").stat().st_size
    assert str(tmp_path) not in json.dumps(facts)
    assert len({p.stat().st_mode for p in (tmp_path / "m").iterdir()}) == 1


# --- the card --------------------------------------------------------------------------------------------------------


def run_the_card(folder, blocked, monkeypatch):
    text = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    pixels = (images(1)[0].permute(1, 2, 0).numpy() * 40 + 128).clip(0, 255).astype(np.uint8)
    Image.fromarray(np.kron(pixels, np.ones((2, 3, 1), np.uint8))).save(folder / "photo.png")
    if not blocked:
        monkeypatch.chdir(folder)
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "README.md", "exec"), {})  # noqa: S102
        return printed.getvalue().strip()
    start = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    found = subprocess.run(
        [sys.executable, "-c", start + code], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


@pytest.mark.parametrize(
    ("kind", "blocked"),
    [
        ("safetensors", []),
        ("torch.export", ["cil", "timm", "torchvision"]),
        ("onnx", ["cil", "timm", "torch", "torchvision"]),
    ],
)
def test_the_card_runs_where_it_says(kind, blocked, ncm, tmp_path, monkeypatch):
    folder = export(ncm, tmp_path / "m", kind)
    printed = run_the_card(folder, blocked, monkeypatch)
    [(_, ranked)] = predict(ncm, [folder / "photo.png"])
    assert ranked[0][0] in printed.split("\n")[-1].replace("'", " ").split()
    head, body = (folder / "README.md").read_text(encoding="utf-8").removeprefix("---\n").split("---\n", 1)
    facts = json.loads((folder / "model.json").read_text())
    head = yaml.safe_load(head)
    assert head["pipeline_tag"] == "image-classification" and head["license"] == "unknown"
    accuracy = facts["summary"]["accuracy_last"]
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == round(accuracy, 4)
    assert f"over all classes seen, % | {100 * accuracy:.1f} |" in body
    assert "1 further tasks of the stream have not been learned yet" in body.replace("\n", " ")


@pytest.mark.parametrize(
    "config",
    [
        {"crop_mode": "center", "crop_pct": 0.9, "interpolation": "bicubic"},
        {"crop_mode": "center", "crop_pct": 32 / 47.5, "interpolation": "bilinear"},
        {"crop_mode": "squash", "crop_pct": 0.8, "interpolation": "lanczos"},
        {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "nearest"},
        {"crop_mode": "border", "crop_pct": 0.9, "interpolation": "bicubic"},
    ],
)
@pytest.mark.parametrize("size", [(50, 33), (33, 50), (200, 31), (32, 32)])
def test_the_cards_pixels_are_those_of_the_run(config, size, ncm, tmp_path, monkeypatch):
    """The recipe for readers without cil against timm's transform, to the rounding of the normalisation."""
    facts = {"format": "onnx", "preprocessing": {"input_size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2] * 3, **config}}
    code = usage(facts)[1].removeprefix("```python\n").split("session =")[0].replace("import onnxruntime\n", "")
    transforms = Transforms({**facts["preprocessing"], "input_size": (3, 32, 32)})
    picture = np.random.RandomState(0).randint(0, 256, (*size, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera that was turned
    Image.fromarray(picture).save(tmp_path / "photo.png", exif=exif)
    (tmp_path / "model.json").write_text(json.dumps(facts))
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)  # noqa: S102
    expected = read_image(tmp_path / "photo.png", transforms)
    np.testing.assert_allclose(scope["pixels"]("photo.png"), expected.numpy(), atol=1e-5)


def test_licences():
    vit = load_backbone()
    assert licence(vit, None)["id"] == "other" and "Tiny-ImageNet" in licence(vit, None)["text"]
    assert licence(vit, "mine.safetensors")["id"] == licence(vit, "random")["id"] == "unknown"
    timm_vit = load_backbone(BackboneConfig.model_validate(VIT))
    assert licence(timm_vit, None)["id"] == timm.get_pretrained_cfg("vit_tiny_patch16_224").license


# --- what can go wrong -----------------------------------------------------------------------------------------------


MINE = """
import torch
from cil.learners.ncm import NCMLearner

class Branches(NCMLearner):
    def logits(self, features):
        if features.mean() > 0:
            features = features * 2
        return super().logits(features)

class Untranslatable(NCMLearner):
    def logits(self, features):
        return super().logits(torch.special.bessel_j0(features))

class Draws(NCMLearner):
    def logits(self, features):
        return super().logits(features) + torch.rand(())
"""


@pytest.fixture(scope="module")
def mine(make_run, tmp_path_factory):
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(MINE)
    return lambda name: make_run(f"{file}:{name}")


def test_a_learner_that_branches_on_values_is_named_with_the_line(mine, tmp_path, capfd):
    run = mine("Branches")
    for kind in ("torch.export", "onnx"):
        with pytest.raises(ExportError) as error:
            export(run, tmp_path / "m", kind)
        text = str(error.value)
        assert "learner Branches cannot be traced" in text and "mine.py:7, `if features.mean() > 0:`" in text
        assert "safetensors works" in text and "\n" not in text
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")
    check_same(run, export(run, tmp_path / "m"))


def test_an_operation_without_onnx_is_named(mine, tmp_path):
    run = mine("Untranslatable")
    message = r"cannot be written as ONNX: .*bessel_j0.*--format torch.export and .* work"
    with pytest.raises(ExportError, match=message) as error:
        export(run, tmp_path / "m", "onnx")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    check_same(run, export(run, tmp_path / "m", "torch.export"))


def test_logits_that_differ_leave_nothing(mine, tmp_path):
    with pytest.raises(ExportError, match=r"gives other logits than the learner: .* nothing was written"):
        export(mine("Draws"), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["scale", "shape", "nan", "spread"])
def test_the_check_can_fail(change):
    value = torch.linspace(-1, 1, 10).view(1, 10)
    mine = value + 1e4 if change == "spread" else value
    other = {
        "scale": value * 1.001,
        "shape": value[:, :9],
        "nan": value.clone().fill_(torch.nan),
        "spread": mine + 0.05,  # little of the largest, much of what tells classes apart
    }[change]
    with pytest.raises(ExportError, match="gives"):
        compare([(mine, value)], [(other, value)], "it")
    noted = compare([(value, value)], [(value + 1e-5, value)], "it")["logits"]
    assert all(noted[key] == pytest.approx(1e-5, rel=0.1) for key in noted)
    infinite = value.clone().index_fill_(1, torch.tensor([3]), -torch.inf)
    assert compare([(infinite, value)], [(infinite, value)], "it")["logits"]["max_difference"] == 0


def test_a_target_that_is_there(ncm, tmp_path):
    folder = export(ncm, tmp_path / "m")
    with pytest.raises(ExportError, match=r"exists already; .* --force"):
        export(ncm, folder)
    (folder / "README.md").write_text("old")
    export(ncm, folder, force=True)
    assert (folder / "README.md").read_text() != "old"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(ExportError, match="is not an exported model"):
            export(ncm, other, force=force)
    assert (other / "thesis.txt").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["m", "other"]


def test_a_full_disk_leaves_what_was_there(ncm, tmp_path, monkeypatch):
    folder = export(ncm, tmp_path / "m")
    before = (folder / "model.json").read_text()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "save_file", full)
    with pytest.raises(ExportError, match=r"m: cannot write: the disk is full"):
        export(ncm, folder, force=True)
    assert (folder / "model.json").read_text() == before and [p.name for p in tmp_path.iterdir()] == ["m"]
    load(folder)


def test_what_is_not_what_was_exported_is_refused(ncm, tmp_path):
    folder = export(ncm, tmp_path / "m")
    with pytest.raises(ExportError, match=r"no model.json there"):
        load(tmp_path)
    file, facts = folder / "model.safetensors", json.loads((folder / "model.json").read_text())
    facts.pop("checksum")  # as after a change by hand
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ExportError, match=r"model.safetensors: is damaged: its content does not match"):
        load(folder)
    file.unlink()
    with pytest.raises(ExportError, match=r"model.safetensors: is missing"):
        load(folder)
    # another backbone, with a hash to match: the backbone's own fingerprint tells
    file.write_bytes(whole)
    state = load_file(file)
    save_file({k: v + (k == "backbone.norm.bias") for k, v in state.items()}, file)
    facts["files"][file.name]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "model.json").write_text(json.dumps(facts))
    with pytest.raises(ExportError, match="its backbone is not the one the run used"):
        load(folder)
    (folder / "model.json").write_text(json.dumps({**facts, "schema": 99}))
    with pytest.raises(ExportError, match="has schema 99"):
        load(folder)
    (folder / "model.json").write_text("{")
    with pytest.raises(ExportError, match="damaged"):
        load(folder)


def test_missing_onnx_packages_are_named(ncm, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ExportError, match=r"ONNX needs onnxscript: pip install 'cil\[export\]'"):
        export(ncm, tmp_path / "m", "onnx")


def test_the_command(cil, ncm, tmp_path):  # noqa: F811
    done = cil("export", ncm, "--out", tmp_path / "m")
    assert done.returncode == 0 and "ncm after stage 2 of 3 as safetensors, 5 classes" in done.stdout
    assert cil("export", ncm).returncode == 0 and (ncm / "export-safetensors" / "model.json").is_file()
    for arguments, message in (
        ([tmp_path / "none"], "no metrics.json there"),
        ([ncm, "--format", "onx"], "format 'onx' is unknown (did you mean 'onnx'?)"),
        ([ncm, "--out", tmp_path / "m"], "exists already"),
    ):
        found = cil("export", *arguments)
        assert found.returncode == 2 and message in found.stderr and len(found.stderr.strip().splitlines()) == 1
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "metrics.json").write_text((ncm / "metrics.json").read_text())
    found = cil("export", tmp_path / "fresh")
    assert found.returncode == 2 and "no stage is finished" in found.stderr
