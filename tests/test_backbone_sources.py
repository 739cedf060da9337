"""Backbones from a folder or from the Hub: loaded by timm's own sources, named as given, and refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from safetensors.torch import save_file

from cil.backbone import fingerprint, load_backbone, without_source
from cil.config import BackboneConfig
from cil.errors import BackboneError
from cil.utils.randomness import isolated

ARGUMENTS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 1}


@pytest.fixture
def folder(tmp_path):
    """A model as timm's Hub format stores it: ``config.json`` and ``model.safetensors``."""
    folder = tmp_path / "my.model"
    folder.mkdir()
    with isolated(1):
        model = timm.create_model("vit_small_patch16_dinov3", num_classes=7, **ARGUMENTS)
    save_file(model.state_dict(), folder / "model.safetensors")
    pretrained = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 32, 32], "num_classes": 7}
    pretrained |= {"fixed_input_size": True, "classifier": "head", "first_conv": "patch_embed.proj", "tag": "wrong"}
    config = {
        "architecture": "vit_small_patch16_dinov3",
        "num_classes": 7,
        "model_args": ARGUMENTS | {"num_classes": 7},
    }
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": pretrained}))
    return folder


def test_a_folder_gives_the_features_that_timm_gives(folder):
    name = f"local-dir:{folder}"
    backbone = load_backbone(name)
    theirs = timm.create_model(name, pretrained=True, num_classes=0).eval()
    assert backbone.name == name  # not the tag of the architecture's own weights
    assert backbone.fingerprint == fingerprint(theirs)
    assert tuple(backbone.data_config["mean"]) == (0.1, 0.2, 0.3) and backbone.data_config["input_size"] == (3, 32, 32)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(backbone(images), theirs(images))


def test_its_architecture_takes_other_weights_and_options(folder, tmp_path):
    weights = tmp_path / "other.safetensors"
    shutil.copy(folder / "model.safetensors", weights)
    name = f"local-dir:{folder}"
    backbone = load_backbone(BackboneConfig(name=name, weights=weights))
    assert backbone.name == f"{name}.other" and backbone.fingerprint == load_backbone(name).fingerprint
    larger = load_backbone(BackboneConfig(name=name, options={"img_size": 48}))
    assert larger.data_config["input_size"] == (3, 48, 48)
    assert load_backbone(BackboneConfig(name=name, weights="random")).name == f"{name}.random"


def test_without_the_folder_the_architecture_is_the_same(folder):
    section = {"name": f"local-dir:{folder}", "options": {"img_size": 48}}
    backbone = load_backbone(BackboneConfig(**section))
    plain = without_source(section, backbone)
    assert json.loads(json.dumps(plain)) == plain and str(folder) not in str(plain)
    shutil.rmtree(folder)
    rebuilt = load_backbone(BackboneConfig(**plain, weights="random"))
    rebuilt.model.load_state_dict(backbone.model.state_dict())
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        assert torch.equal(rebuilt(images), backbone(images))


def test_a_folder_below_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_backbone(f"local-dir:~/{folder.name}").name == f"local-dir:~/{folder.name}"


def damage(folder, what):
    config, weights = folder / "config.json", folder / "model.safetensors"
    if what == "no folder":
        shutil.rmtree(folder)
    elif what == "no config":
        config.unlink()
    elif what == "no JSON":
        config.write_text("{")
    elif what == "no architecture":
        config.write_text("{}")
    elif what == "unknown architecture":
        config.write_text('{"architecture": "no_such_model"}')
    elif what == "no weights":
        weights.unlink()
    elif what == "torn weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif what == "too few weights":
        changed = json.loads(config.read_text())
        changed["model_args"]["depth"] = 2
        config.write_text(json.dumps(changed))
    elif what == "other shapes":
        changed = json.loads(config.read_text())
        changed["model_args"]["embed_dim"] = 48
        config.write_text(json.dumps(changed))


@pytest.mark.parametrize(
    "what",
    [
        "no folder",
        "no config",
        "no JSON",
        "no architecture",
        "unknown architecture",
        "no weights",
        "torn weights",
        "too few weights",
        "other shapes",
    ],
)
def test_damaged_folders_are_refused_in_one_line(folder, what):
    damage(folder, what)
    with pytest.raises(BackboneError, match=r"backbone\.name: .*my\.model") as caught:
        load_backbone(f"local-dir:{folder}")
    assert "\n" not in str(caught.value) and "network" not in str(caught.value)


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def http(cls, text):
    """An error of the Hub, whose constructor differs between versions."""
    error = cls.__new__(cls)
    Exception.__init__(error, text)
    return error


@pytest.mark.parametrize(
    ("name", "where", "error", "message"),
    [
        (
            "hf-hub:facebook/gated-model",
            "timm.models._hub.hf_hub_download",
            http(GatedRepoError, "403 Client Error"),
            r"accept the licence at https://huggingface\.co/facebook/gated-model, then log in",
        ),
        (
            "vit_small_patch16_dinov3.lvd1689m",
            "timm.models._builder.load_state_dict_from_hf",
            http(GatedRepoError, "403 Client Error"),
            r"accept the licence at https://huggingface\.co/timm/vit_small_patch16_dinov3\.lvd1689m",
        ),
        (
            "hf-hub:nobody/nothing",
            "timm.models._hub.hf_hub_download",
            http(RepositoryNotFoundError, "404 Client Error"),
            "the Hub has no nobody/nothing, or it is private",
        ),
        (
            "hf-hub:some/dataset",
            "timm.models._hub.hf_hub_download",
            http(EntryNotFoundError, "no config.json"),
            r"hf-hub:some/dataset is no backbone: it cannot be built \(EntryNotFoundError: no config\.json\)$",
        ),
        (
            "hf-hub:some/model",
            "timm.models._hub.hf_hub_download",
            ConnectionError("no route"),
            r"without a network connection, set backbone\.name=local-dir:FOLDER",
        ),
    ],
)
def test_what_the_hub_refuses_is_said(name, where, error, message, monkeypatch):
    monkeypatch.setattr(where, failing(error))
    with pytest.raises(BackboneError, match=message) as caught:
        load_backbone(name)
    assert "\n" not in str(caught.value)
