"""The table of what works with each family of timm is that of its file, and some families are tried again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from marks import slow_beyond
from torch import nn

from cil.backbone import fits, load_backbone
from cil.config import BackboneConfig
from cil.errors import BackboneError
from cil.tuning import ExternalWeights, build_tuner
from scripts.publish import families as published
from scripts.studies import families
from scripts.studies.small_models import SMALL, VIT, options_of

ROOT = Path(__file__).parent.parent
FILE = json.loads((ROOT / "results" / "bench" / "families.json").read_text(encoding="utf-8"))
ROWS = {row["architecture"]: row for row in FILE["families"]}
FAST = ["swin_tiny_patch4_window7_224", "hiera_tiny_224", "convnext_tiny", "naflexvit_base_patch16_gap"]
OTHERS = [
    "vit_tiny_patch16_224",
    "vit_small_patch16_18x2_224",
    "eva02_enormous_patch14_clip_224",
    "samvit_base_patch16_224",
    "qwen3_vit_88m",
    "swinv2_tiny_window8_256",
    "sam2_hiera_tiny",
    "twins_svt_small",
    "davit_tiny",
    "test_byobnet",
    "test_resnet",
    "test_mambaout",
]


def test_every_module_of_timm_is_in_the_table():
    assert list(ROWS) == sorted(SMALL, key=lambda name: (ROWS[name]["module"], name))
    if timm.__version__ == FILE["versions"]["timm"]:
        assert FILE["untried"] == list(families.untried())
    assert all(row["module"] not in FILE["untried"] for row in ROWS.values())


@pytest.mark.parametrize("name", ROWS)
def test_a_family_works_or_is_refused_in_one_line(name):
    cells = ROWS[name]["cells"]
    for key, cell in cells.items():
        assert cell["outcome"] in ("works", "refused"), (key, cell)
        assert ("why" in cell) == (cell["outcome"] == "refused") and "\n" not in cell.get("why", "")
    if "untried" in ROWS[name]:
        assert cells.keys() == {"features"}
    elif cells["features"]["outcome"] == "works":
        assert cells.keys() >= {*families.TUNERS, families.NAMED, "run"}
        assert ("token-level" in fits(name)) == (cells["adapter"]["outcome"] == "works")


def outcomes(row):
    return {key: cell["outcome"] for key, cell in row["cells"].items()}


@pytest.mark.parametrize("name", FAST)
def test_tuners_do_what_the_table_says(name):
    found = families.measure(name, options_of(name), exports=False)
    stored = outcomes(ROWS[name])
    assert outcomes(found) == {key: stored[key] for key in found["cells"]}
    assert found["feature_dim"] == ROWS[name]["feature_dim"] and set(found["cells"]) >= set(families.TUNERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAST[:1], *OTHERS])
def test_tuners_and_exports_do_what_the_table_says(name):
    assert outcomes(families.measure(name, options_of(name))) == outcomes(ROWS[name])


def test_families_with_the_same_outcomes_share_a_row(tmp_path):
    def row(name, adapter, **cells):
        keys = {key for keys in published.COLUMNS.values() for key in keys}
        found = {key: {"outcome": "works"} for key in keys} | {"adapter": {"outcome": adapter, "why": "w"}} | cells
        return {"module": "m", "class": "C", "architecture": name, "cells": found}

    nothing = {"module": "n", "architecture": "d", "cells": {"features": {"outcome": "refused", "why": "none"}}}
    rows = [row("a", "refused"), row("b", "works"), row("c", "refused"), nothing]
    (tmp_path / "f.json").write_text(json.dumps({"families": rows, "untried": ["new"]}))
    lines = [line.split(" | ") for line in published.table(tmp_path / "f.json").splitlines()]
    at = list(published.COLUMNS).index("tokens") + 1
    assert [(line[0].strip("| "), line[at]) for line in lines[2:5]] == [
        ("C (`b`)", "✓"),
        ("C (`a`), C (`c`)", "–"),
        ("n (`d`)", "–"),
    ]
    assert lines[5][0].startswith("| new: not tried")


def test_convolutions_are_named_where_there_is_no_linear_layer():
    backbone = load_backbone(BackboneConfig(name="test_byobnet", weights="random"))
    with pytest.raises(BackboneError, match=r"no layer of ByobNet matches 'qkv'; it has no linear layers; its conv"):
        build_tuner("lora", backbone)
    with pytest.raises(BackboneError, match=r"^PEFT refuses: Target module \w+ is not supported\.") as caught:
        build_tuner({"name": "lora", "targets": r"stages\.0\.0"}, backbone)
    assert "\n" not in str(caught.value)


def test_targets_that_peft_would_leave_out_are_refused():
    """OSF has no form for convolutions: PEFT says nothing, and a tuner of these alone would train nothing."""
    backbone = load_backbone(BackboneConfig(name="test_byobnet", weights="random"))
    name = next(n for n, m in backbone.model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1)
    with pytest.raises(BackboneError, match=r"PEFT has no osf for 1 of the 1 target layers, the first is .*Conv2d"):
        build_tuner({"name": "osf", "targets": [name]}, backbone)
    build_tuner({"name": "lora", "targets": [name]}, backbone)


def test_a_model_without_biases_has_nothing_for_bitfit():
    backbone = load_backbone(BackboneConfig(name="vit_tiny_patch16_224", weights="random", options=VIT))
    for module in backbone.model.modules():
        if "bias" in module._parameters:
            module._parameters["bias"] = None
    with pytest.raises(BackboneError, match="bitfit: VisionTransformer has no bias to train"):
        build_tuner("bitfit", backbone)


def test_tokens_that_peft_cannot_process_are_refused():
    """PEFT's OFT takes every input of four dimensions for that of a convolution."""
    backbone = load_backbone(BackboneConfig(name="nest_tiny", weights="random", options=options_of("nest_tiny")))
    with pytest.raises(BackboneError, match=r"PEFT's layers of oft cannot process the tokens of Nest \(RuntimeError: "):
        build_tuner("oft", backbone)
    build_tuner("lora", backbone)


CACHING = ["efficientvit_m0", "levit_128s", "tiny_vit_5m_224", "efficientformerv2_s0"]


@pytest.mark.parametrize("name", slow_beyond(CACHING[:1], CACHING))
def test_position_biases_that_are_replaced_act(name):
    """timm keeps those of the first call in evaluation mode."""
    backbone = load_backbone(BackboneConfig(name=name, weights="random", options=options_of(name)))
    images = families.batch(backbone)
    keys = [key for key, _ in backbone.model.named_parameters() if key.endswith("attention_biases")]
    drawn = torch.Generator().manual_seed(1)
    replaced = {key: torch.randn(backbone.model.get_parameter(key).shape, generator=drawn) * 9 for key in keys}
    with torch.no_grad():
        for p in backbone.model.parameters():  # norms that start at 0 would hide the attention
            p.normal_(std=0.2, generator=drawn)
    before = backbone(images)
    found = backbone(images, ExternalWeights(replaced))
    with torch.no_grad():
        for key, value in replaced.items():
            backbone.model.get_parameter(key).copy_(value)
        backbone.model.train()  # timm drops what it kept
        backbone.model.eval()
    assert not torch.equal(found, before) and torch.equal(found, backbone.model(images))
