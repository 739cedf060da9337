"""Tuners that would train nothing are refused or take another route, and a tensor without a gradient is an error."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from cil.backbone import Backbone
from cil.errors import BackboneError
from cil.tuning import build_tuner
from cil.tuning.peft import PeftTuner
from cil.utils.randomness import isolated

TINY = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 0}
READ = {
    "BEiT": ("beit_base_patch16_224", TINY),
    "EVA-02 tiny": ("eva02_tiny_patch14_224", TINY | {"patch_size": 8}),
    "EVA giant": ("eva_giant_patch14_224", TINY | {"patch_size": 8}),
    "DINOv3 with biases": ("vit_small_patch16_dinov3_qkvb", TINY | {"patch_size": 8}),
    "Swin V2": (
        "swinv2_tiny_window8_256",
        {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 0},
    ),
}
"""Architectures whose attention reads ``qkv.weight`` and never calls ``qkv``."""
CALLED = {
    "ViT": ("vit_tiny_patch16_224", TINY),
    "DINOv3": ("vit_small_patch16_dinov3", TINY | {"patch_size": 8}),
    "Perception Encoder": ("vit_pe_core_tiny_patch16_384", TINY | {"attn_pool_num_heads": 3}),
    "Swin": ("swin_tiny_patch4_window7_224", READ["Swin V2"][1]),
}


def make(name, options) -> Backbone:
    with isolated(0):
        model = timm.create_model(name, **options)
        for p in model.parameters():  # layer scales and weights start near zero, and would hide every difference
            torch.nn.init.normal_(p, std=0.2)
    size = {key: options[key] for key in ("img_size",) if key in options}
    return Backbone(model, name, timm.data.resolve_data_config(size, model=model))


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [*READ, *CALLED])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "oft", "osf"])
def test_a_peft_tuner_changes_the_features_or_is_refused(name, kind):
    backbone = make(*(READ | CALLED)[name])
    config = {"name": kind, "block_size": 4} if kind == "oft" else kind
    if name in READ and kind != "lora":
        with pytest.raises(BackboneError, match=rf"{kind}: .*qkv.*are read, not called, by \w*Attention"):
            build_tuner(config, backbone)
        return
    passes = backbone.passes
    tuner = build_tuner(config, backbone)
    assert backbone.passes == passes
    with torch.inference_mode():
        frozen = backbone(images())
        torch.testing.assert_close(backbone(images(), tuner), frozen, atol=1e-3, rtol=1e-3)
    optimizer = torch.optim.Adam(tuner.parameters(), 0.1)
    for _ in range(2):  # LoRA's A has a gradient of zero until B has moved
        optimizer.zero_grad()
        backbone(images(), tuner).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuner.parameters() if p.requires_grad)
    with torch.inference_mode():
        assert (backbone(images(), tuner) - frozen).abs().max() > 1e-2


def fill(tuner, std=0.3):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_(std=std, generator=generator)
    return tuner


def test_both_routes_of_lora_are_one_function():
    backbone = make(*CALLED["ViT"])
    tuner = fill(PeftTuner(backbone, rank=4, alpha=8, targets=["qkv", "fc1"]))
    other = copy.deepcopy(tuner)
    other._reads_weights = True
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images(), other), backbone(images(), tuner), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", READ)
def test_lora_on_weights_that_are_read_is_the_model_with_updated_weights(name):
    backbone = make(*READ[name])
    tuner = fill(PeftTuner(backbone, rank=4, alpha=8, targets=["qkv", "fc1"]))
    updated = copy.deepcopy(backbone.model)
    with torch.no_grad():
        for key, change in tuner.delta().items():
            updated.get_parameter(key).add_(change)
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images(), tuner), updated(images()))


def test_updates_of_several_adapters_add_up_where_weights_are_read():
    backbone = make(*READ["BEiT"])
    tuner = PeftTuner(backbone, rank=2)
    tuner.add("more", torch.Generator().manual_seed(2))
    fill(tuner)
    tuner.activate(["default", "more"])
    both = {key: tuner.delta("default")[key] + tuner.delta("more")[key] for key in tuner.delta()}
    with torch.inference_mode():
        assert all(torch.equal(w, backbone.model.get_parameter(k) + both[k]) for k, w in tuner.weights().items())
        tuner.activate([])
        assert torch.equal(backbone(images(), tuner), backbone(images()))


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"options": {"lora_bias": True, "bias": "none"}}])
def test_parts_of_lora_that_weights_cannot_hold_are_refused(settings):
    with pytest.raises(BackboneError, match=r"lora with dropout or a bias: .* are read, not called, by Attention"):
        PeftTuner(make(*READ["BEiT"]), **settings)
    PeftTuner(make(*CALLED["ViT"]), **settings)


def test_separate_projections_are_named_where_there_is_no_qkv():
    backbone = make("eva02_base_patch14_224", TINY | {"patch_size": 8})
    with pytest.raises(BackboneError, match=r"give targets: \[q_proj, k_proj, v_proj\]"):
        PeftTuner(backbone)
    fill(PeftTuner(backbone, targets=["q_proj", "k_proj", "v_proj"]))
