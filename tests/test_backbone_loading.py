"""Loading backbones: local files are read as timm reads them, and what gives no usable model is named."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import timm
import torch
from marks import slow_beyond
from safetensors.torch import save_file

from cil.backbone import EMBEDDED, fingerprint, load_backbone
from cil.config import BackboneConfig
from cil.errors import BackboneError
from cil.utils.randomness import isolated

SMALL = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 3}
FAMILIES = {
    "vit_tiny_patch16_224": SMALL | {"patch_size": 8},
    "deit_tiny_distilled_patch16_224": SMALL | {"patch_size": 8},
    "beit_base_patch16_224": SMALL | {"patch_size": 8},
    "eva02_tiny_patch14_224": SMALL | {"patch_size": 8},
    "vit_small_patch16_dinov3": SMALL | {"patch_size": 8},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (1, 2),
    },
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 8)},
    "resnet10t": {},
    "mobilenetv3_small_050": {},
}
"""One architecture of every name of the classifier, and every kind of position."""


def donor(name, seed=3, **options):
    """A model with a classifier of 7 classes whose weights are all drawn."""
    with isolated(seed):
        model = timm.create_model(name, num_classes=7, **FAMILIES[name] | options).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return model


def config_for(name, weights, **options):
    return BackboneConfig(name=name, weights=weights, options=FAMILIES[name] | options)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_classifier_of_every_family_is_left_out(name, tmp_path):
    model = donor(name)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone(config_for(name, tmp_path / "w.safetensors"))
    model.reset_classifier(0)
    assert backbone.fingerprint == fingerprint(model)
    assert backbone.name == f"{name}.w"


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


WRAPPED = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {}, "lr": 0.1}},
    "timm's checkpoint": lambda s: {"state_dict": {}, "state_dict_ema": s, "args": argparse.Namespace(lr=0.1)},
    "parallel": lambda s: {"state_dict": prefixed("module.", s)},
    "compiled and parallel": lambda s: prefixed("_orig_mod.module.", s),
    "Lightning": lambda s: {"state_dict": prefixed("model.", s), "pytorch-lightning_version": "2.5"},
    "DINO": lambda s: {"student": {}, "teacher": prefixed("backbone.", s) | {"head.mlp.0.weight": torch.ones(2, 2)}},
    "plain values beside the tensors": lambda s: {**s, "epoch": 3, "note": "mine"},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_weights_are_found(kind, tmp_path):
    model = donor("vit_tiny_patch16_224")
    torch.save(WRAPPED[kind](model.state_dict()), tmp_path / "w.pth")
    backbone = load_backbone(config_for("vit_tiny_patch16_224", tmp_path / "w.pth"))
    model.reset_classifier(0)
    assert backbone.fingerprint == fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_of_every_precision_are_read_in_float32(dtype, suffix, tmp_path):
    state = {key: value.to(dtype) for key, value in donor("vit_tiny_patch16_224").state_dict().items()}
    (save_file if suffix == "safetensors" else torch.save)(state, tmp_path / f"w.{suffix}")
    model = load_backbone(config_for("vit_tiny_patch16_224", tmp_path / f"w.{suffix}")).model
    assert all(torch.equal(value, state[key].float()) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", list(FAMILIES)[:6])
def test_weights_of_another_image_size_are_resized_as_timm_does_it(name, tmp_path):
    save_file(donor(name, img_size=64).state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone(config_for(name, tmp_path / "w.safetensors"))
    overlay = {"file": str(tmp_path / "w.safetensors"), "num_classes": 7}
    theirs = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **FAMILIES[name])
    assert backbone.fingerprint == fingerprint(theirs)
    assert backbone.data_config["input_size"] == (3, 32, 32)


def test_the_shipped_weights_are_resized(tmp_path):
    backbone = load_backbone(BackboneConfig(options={"img_size": 96}))
    assert backbone.name == EMBEDDED and backbone.data_config["input_size"] == (3, 96, 96)
    assert backbone(torch.zeros(1, 3, 96, 96)).shape == (1, 192)


def lacking(state):
    return {key: value for key, value in state.items() if key != "blocks.0.mlp.fc1.bias"}


def infinite(state):
    return state | {"norm.weight": torch.full_like(state["norm.weight"], torch.nan)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lacking, r"1 weights missing, 0 unknown, 0 of another shape; first: blocks\.0\.mlp\.fc1\.bias is missing"),
        (lambda s: s | {"extra": torch.ones(1)}, r"0 weights missing, 1 unknown.*first: extra is not in the model"),
        (
            lambda s: s | {"norm.bias": torch.ones(5)},
            r"1 of another shape; first: norm\.bias is \(5\), expected \(24\)",
        ),
        (lambda s: s | {"patch_embed.proj.weight": torch.ones(24, 1, 8, 8)}, "fits another architecture"),
        (infinite, "not finite"),
        (lambda s: {"only": {"text": "no tensor"}}, "does not contain a dictionary of tensors"),
        (lambda s: list(s.values()), "does not contain a dictionary of tensors"),
        (lambda s: torch.ones(3), "does not contain a dictionary of tensors"),
        (lambda s: s | {"odd": np.ones(2).dtype}, "would have to run code|another architecture|is damaged"),
    ],
)
def test_files_that_do_not_fit_say_why_and_not_that_the_network_is_missing(change, reason, tmp_path):
    torch.save(change(donor("vit_tiny_patch16_224").state_dict()), tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=reason) as caught:
        load_backbone(config_for("vit_tiny_patch16_224", tmp_path / "w.pth"))
    assert "network" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "npz", "bin"])
@pytest.mark.parametrize("part", [0, 0.02, 0.5, 0.98])
def test_torn_files_are_named(suffix, part, tmp_path):
    path, state = tmp_path / f"w.{suffix}", donor("vit_tiny_patch16_224").state_dict()
    if suffix == "safetensors":
        save_file(state, path)
    elif suffix == "npz":
        np.savez(path, **{key: value.numpy() for key, value in state.items()})
    else:
        torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(BackboneError, match=rf"backbone\.weights: .*w\.{suffix}"):
        load_backbone(config_for("vit_tiny_patch16_224", path))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(BackboneError, match="a folder; give a file in it"):
        load_backbone(config_for("vit_tiny_patch16_224", tmp_path))


USELESS = {
    "in_chans": 1,
    "global_pool": "",
    "features_only": True,
    "img_size": [32, 64],
    "init_values": "small",
    "num_classes": 10,
    "no_such_option": 3,
    "depth": "two",
    "patch_size": 0,
    "num_heads": 5,
    "norm_layer": "none of them",
    "pretrained": True,
    "checkpoint_path": "w.pth",
    "model_name": "resnet18",
}


@pytest.mark.parametrize("option", USELESS)
@pytest.mark.parametrize("name", slow_beyond(["vit_tiny_patch16_224"], ["vit_tiny_patch16_224", EMBEDDED]))
def test_options_without_a_usable_model_are_named(option, name):
    options = {"img_size": 64, "depth": 1, option: USELESS[option]}
    with pytest.raises(BackboneError, match=rf"backbone\.options\.{option}: got ") as caught:
        load_backbone(BackboneConfig(name=name, weights="random", options=options))
    message = str(caught.value)
    assert "network" not in message and "\n" not in message
    assert all(f"options.{other}" not in message for other in options if other != option)


@pytest.mark.parametrize("size", [48, [48, 48], (48, 48)])
def test_sizes_are_numbers_or_pairs(size):
    backbone = load_backbone(
        BackboneConfig(name="vit_tiny_patch16_224", weights="random", options={"img_size": size, "depth": 1})
    )
    assert backbone.data_config["input_size"] == (3, 48, 48)


def test_oblong_sizes_are_named_as_such():
    config = BackboneConfig(name="vit_tiny_patch16_224", weights="random", options={"img_size": [32, 64]})
    with pytest.raises(BackboneError, match=r"img_size: got \[32, 64\].*32 × 64 pixels, and images are square"):
        load_backbone(config)


def test_options_that_only_fail_together_are_all_named():
    options = {"embed_dim": 180, "num_heads": 8, "img_size": 32}  # 180 / 3 and 192 / 8 are whole numbers
    with pytest.raises(BackboneError, match=r"backbone\.options\.embed_dim: got 180.*num_heads: got 8; with them"):
        load_backbone(BackboneConfig(name="vit_tiny_patch16_224", weights="random", options=options))


def test_pretrained_weights_for_fewer_layers_than_asked_for_are_refused(tmp_path):
    save_file(donor("vit_tiny_patch16_224").state_dict(), tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors"), "num_classes": 7}
    for depth, fits in ((1, True), (3, False)):
        options = FAMILIES["vit_tiny_patch16_224"] | {"depth": depth, "pretrained_cfg_overlay": overlay}
        config = BackboneConfig(name="vit_tiny_patch16_224", options=options)
        if fits:
            load_backbone(config)
        else:
            with pytest.raises(BackboneError, match=r"options\.depth: got 3.* would stay random.*blocks\.1\."):
                load_backbone(config)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_tiny_patch16_224.no_such_tag", "timm knows no"),
        ("org/model", "hf-hub:org/model"),
        ("nowhere:model", "Unknown model source"),
        ("", "timm knows no ''"),
    ],
)
def test_names_that_timm_does_not_know(name, reason):
    with pytest.raises(BackboneError, match=reason):
        load_backbone(BackboneConfig(name=name, weights="random"))


def test_the_hint_about_the_network_comes_with_a_failed_download_only(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot find the requested files")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    with pytest.raises(BackboneError, match=r"could not be downloaded.*without a network.*backbone\.weights=FILE"):
        load_backbone(BackboneConfig(name="vit_tiny_patch16_224", options={"depth": 1}))
