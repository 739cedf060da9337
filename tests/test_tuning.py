"""Tuners: each against an independent reference, on every kind of plain ViT, and without a trace on the backbone."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import timm
import torch
from pydantic import Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

from cil.backbone import Backbone, fingerprint
from cil.config import Section
from cil.config.reading import explain
from cil.errors import BackboneError, ConfigError
from cil.tuning import (
    Adapter,
    ExternalPrefix,
    KeyValueLora,
    Prefix,
    Tuner,
    TunerConfig,
    VisualPrompts,
    WeightTuner,
    build_tuner,
)
from cil.tuning.peft import PeftTuner
from cil.utils.randomness import isolated

D, DEPTH = 48, 2
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": DEPTH, "num_heads": 3, "num_classes": 0}
VARIANTS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "average pooling": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.5}),
    "CLIP": ("vit_base_patch32_clip_224", {}),
    "no qkv bias": ("vit_tiny_patch16_224", {"qkv_bias": False, "qk_norm": True}),
}
TUNERS = {
    "adapter": {"bottleneck": 8},
    "sequential": {"name": "adapter", "form": "sequential", "bottleneck": 8, "scale": 1.0},
    "beside attention": {
        "name": "adapter",
        "form": "attention",
        "bottleneck": 5,
        "activation": "gelu",
        "scale": 1.0,
        "learned_scale": True,
        "dropout": 0,
        "blocks": [0],
    },
    "ssf": {},
    "vpt_shallow": {"length": 3},
    "vpt_deep": {"length": 3},
    "prefix": {"length": 3},
    "compensated": {
        "name": "prefix",
        "length": 3,
        "init": "uniform",
        "learned_scale": True,
        "compensate": True,
        "blocks": [0],
    },
    "vqt": {"length": 2},
    "lora_kv": {"rank": 4},
    "bitfit": {},
    "layernorm": {},
    "partial": {"blocks": 1},
    "full": {},
    "lora": {"rank": 4, "targets": ["qkv", "fc1"]},
    "dora": {"rank": 4},
    "ia3": {},
    "oft": {},
    "osf": {},
}
PEFT = ("lora", "dora", "ia3", "oft", "osf")
STARTS_FROZEN = set(TUNERS) - {"ssf", "vpt_shallow", "vpt_deep", "prefix", "compensated", "vqt"}


def make(variant: str = "class token", **options) -> Backbone:
    name, own = VARIANTS[variant]
    with isolated(0):
        model = timm.create_model(name, **{**TINY, **own, **options})
        for p in model.parameters():  # tokens and scales start at zero or one, and would hide a wrong order
            nn.init.trunc_normal_(p, std=0.3) if p.ndim < 2 or p.shape[0] == 1 else p.data.mul_(4)
    return Backbone(model, variant, {})


def build(kind: str, backbone: Backbone) -> Tuner:
    return build_tuner({"name": kind, **TUNERS[kind]}, backbone).eval()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def perturbed(tuner: Tuner, seed: int = 1, std: float = 0.05) -> Tuner:
    """The tuner as after some training: no parameter at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(std * torch.randn(p.shape, generator=generator))
    return tuner


def loss(features: torch.Tensor) -> torch.Tensor:
    return (features * draw(features.shape[1], seed=5)).sum(1).pow(2).mean()


IMAGES = draw(3, 3, 32, 32)
every_tuner = pytest.mark.parametrize("kind", TUNERS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


# ---- what holds for all of them


@every_variant
@every_tuner
def test_starts_where_it_promises_and_trains_its_own_parameters_only(kind, variant):
    backbone = make(variant)
    before, keys = fingerprint(backbone.model), list(backbone.model.state_dict())
    frozen, tuner = backbone(IMAGES), build(kind, backbone)
    tolerance = 1e-4 if kind in ("osf", "dora") else 0
    if kind in STARTS_FROZEN:
        torch.testing.assert_close(backbone(IMAGES, tuner), frozen, atol=tolerance, rtol=tolerance)
    start = backbone(IMAGES, tuner)
    assert (backbone(IMAGES, perturbed(tuner)) - start).abs().max() > 1e-3
    bystander = perturbed(build(kind, backbone), seed=2)
    beside = backbone(IMAGES, bystander)

    loss(backbone(IMAGES, tuner)).backward()
    silent = [name for name, p in tuner.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent
    torch.optim.SGD(tuner.parameters(), lr=0.1).step()
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    assert fingerprint(backbone.model) == before and list(backbone.model.state_dict()) == keys
    assert torch.equal(backbone(IMAGES), frozen)
    assert torch.equal(backbone(IMAGES, bystander), beside)


@every_variant
@every_tuner
def test_an_image_is_seen_alike_in_any_batch(kind, variant):
    backbone = make(variant)
    tuner = perturbed(build(kind, backbone))
    with torch.inference_mode():
        together = backbone(IMAGES, tuner)
        alone = torch.cat([backbone(image[None], tuner) for image in IMAGES])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)


def count(kind: str) -> int:
    """Trainable numbers on the class-token variant, from the methods' formulas."""
    r, n, low = 8, 3, D - D // 2
    block = 12 * D**2 + 13 * D
    return {
        "adapter": DEPTH * (2 * D * r + r + D),
        "sequential": 2 * DEPTH * (2 * D * r + r + D),
        "beside attention": 2 * D * 5 + 5 + D + 1,
        "ssf": 2 * D * (2 + 11 * DEPTH),
        "vpt_shallow": n * D,
        "vpt_deep": DEPTH * n * D,
        "prefix": 2 * DEPTH * n * D,
        "compensated": 2 * n * D + 2,
        "vqt": DEPTH * 2 * D,
        "lora_kv": DEPTH * 2 * (4 * 2 * D + 1),
        "bitfit": D * (2 + 11 * DEPTH),
        "layernorm": 2 * D * (2 * DEPTH + 1),
        "partial": block + 2 * D,
        "full": DEPTH * block + 2 * D + (3 * 64 + 1) * D + D + 17 * D,
        "lora": DEPTH * 4 * ((D + 3 * D) + (D + 4 * D)),
        "dora": DEPTH * (4 * (D + 3 * D) + 3 * D),
        "ia3": DEPTH * (3 * D + 4 * D),
        "oft": DEPTH * (D // 16) * 16 * 15 // 2,
        "osf": DEPTH * (3 * D * low + low + low * D),
    }[kind]


@every_tuner
def test_parameter_counts(kind):
    assert sum(p.numel() for p in build(kind, make()).parameters()) == count(kind)


@pytest.mark.parametrize(("kind", "published"), [("adapter", 1_189_632), ("ssf", 205_824)])
def test_published_parameter_counts_on_vit_b16(kind, published):
    counts = []
    for depth in (1, 2):
        with isolated(0):
            model = timm.create_model("vit_base_patch16_224", img_size=32, depth=depth, num_classes=0)
        counts.append(sum(p.numel() for p in build_tuner(kind, Backbone(model, "b", {})).parameters()))
    assert counts[0] + 11 * (counts[1] - counts[0]) == published


@every_tuner
def test_state_dict_is_its_own_tensors_and_survives_a_file(kind, tmp_path):
    backbone = make()
    tuner = perturbed(build(kind, backbone))
    state = tuner.state_dict()
    assert sum(v.numel() for v in state.values()) == count(kind)
    save_file(state, tmp_path / "t.safetensors")
    other = build(kind, backbone)
    other.load_state_dict(load_file(tmp_path / "t.safetensors"))
    assert torch.equal(backbone(IMAGES, other), backbone(IMAGES, tuner))


@every_tuner
def test_initial_values_come_from_the_generator_alone(kind):
    backbone = make()
    before = torch.get_rng_state()
    one, two, three = build(kind, backbone), build(kind, backbone), build(kind, backbone)
    for tuner, seed in ((one, 3), (two, 3), (three, 4)):
        perturbed(tuner)
        tuner.reset(torch.Generator().manual_seed(seed))
    backbone(IMAGES, one)
    assert torch.equal(torch.get_rng_state(), before)
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    assert all(same)
    drawn = kind not in ("vpt_shallow", "vpt_deep", "ia3", "oft", "osf") and not isinstance(one, WeightTuner)
    other = [torch.equal(a, b) for a, b in zip(one.parameters(), three.parameters(), strict=True)]
    assert all(other) != drawn
    if kind in STARTS_FROZEN and not isinstance(one, WeightTuner):  # real weights have no initial values to draw
        torch.testing.assert_close(backbone(IMAGES, one), backbone(IMAGES), atol=1e-4, rtol=1e-4)


@every_tuner
def test_a_copy_owns_its_parameters_and_shares_the_frozen_weights(kind):
    backbone = make()
    tuner = perturbed(build(kind, backbone))
    before = backbone(IMAGES, tuner)
    copied = copy.deepcopy(tuner)
    assert torch.equal(backbone(IMAGES, copied), before)
    perturbed(copied, seed=9)
    assert torch.equal(backbone(IMAGES, tuner), before) and not torch.allclose(backbone(IMAGES, copied), before)
    with torch.no_grad():
        backbone.model.patch_embed.proj.weight.mul_(1.5)  # a copy with frozen weights of its own would not notice
    changed = backbone(IMAGES, copied)
    with torch.no_grad():
        backbone.model.patch_embed.proj.weight.div_(1.5)
    assert (kind == "full") == torch.allclose(changed, backbone(IMAGES, copied), atol=1e-5)


@every_tuner
def test_bf16_autocast(kind):
    backbone = make()
    tuner = perturbed(build(kind, backbone), std=0.02)
    expected = backbone(IMAGES, tuner)
    with torch.autocast("cpu", torch.bfloat16):
        features = backbone(IMAGES, tuner)
    loss(features.float()).backward()
    assert nn.functional.cosine_similarity(features.float(), expected, dim=1).min() > 0.98
    assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in tuner.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", TUNERS)
def test_compiled_equals_eager_and_compiles_once(kind):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    backbone = make(depth=1)
    tuner, other = perturbed(build(kind, backbone)), perturbed(build(kind, backbone), seed=2)
    expected = backbone(IMAGES, tuner), backbone(IMAGES, other)
    counter = CompileCounterWithBackend("eager")
    backbone.compile(backend=counter)
    passes = backbone.passes
    torch.testing.assert_close(backbone(IMAGES, tuner), expected[0], atol=1e-6, rtol=1e-5)
    compiled = counter.frame_count
    assert compiled == 1 or kind == "dora"  # PEFT's DoRA breaks the graph
    for _ in range(2):
        backbone(IMAGES, tuner)
    torch.testing.assert_close(backbone(IMAGES, other), expected[1], atol=1e-6, rtol=1e-5)
    assert counter.frame_count == compiled
    assert backbone.passes - passes == 4 * len(IMAGES)


@pytest.mark.parametrize("kind", ["adapter", "lora", "dora"])
def test_dropout_acts_in_training_mode_only(kind):
    backbone = make()
    tuner = perturbed(build_tuner({"name": kind, "dropout": 0.5}, backbone), std=0.3)
    with isolated(0):
        assert not torch.equal(backbone(IMAGES, tuner.train()), backbone(IMAGES, tuner))
    before = torch.get_rng_state()
    assert torch.equal(backbone(IMAGES, tuner.eval()), backbone(IMAGES, tuner))
    if isinstance(tuner, PeftTuner):
        tuner.add("later", torch.Generator())
        tuner.activate("later")
        assert not any(module.training for module in tuner.modules())
        backbone(IMAGES, tuner)
    assert torch.equal(torch.get_rng_state(), before)


# ---- independent references


@contextmanager
def hooks(*pairs):
    """Forward hooks (module, function) for the time of a block."""
    handles = [module.register_forward_hook(function) for module, function in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bottleneck(adapter, x):
    inner = (x @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    return inner @ adapter.up.weight.T + adapter.up.bias


@every_variant
def test_parallel_adapter_is_adaptformers(variant):
    backbone = make(variant)
    tuner = perturbed(Adapter(backbone, 8, scale=0.3).eval())
    read = {}

    def beside(block, adapter):
        def remember(module, args, out):
            read[block] = args[0]  # the input of norm2 is h

        def add(module, args, out):
            return out + 0.3 * bottleneck(adapter, read[block])

        return (block.norm2, remember), (block, add)

    pairs = [p for b, a in zip(backbone.model.blocks, tuner.adapters, strict=True) for p in beside(b, a)]
    with hooks(*pairs):
        expected = backbone.model(IMAGES)
    torch.testing.assert_close(backbone(IMAGES, tuner), expected, atol=1e-5, rtol=1e-5)


@every_variant
def test_sequential_adapter_is_houlsbys(variant):
    backbone = make(variant)
    tuner = perturbed(Adapter(backbone, 8, scale=0.3, form="sequential").eval())
    places = [place for block in backbone.model.blocks for place in (block.ls1, block.ls2)]
    behind = [
        (place, lambda module, args, out, a=adapter: out + 0.3 * bottleneck(a, out))
        for place, adapter in zip(places, tuner.adapters, strict=True)
    ]
    with hooks(*behind):
        expected = backbone.model(IMAGES)
    torch.testing.assert_close(backbone(IMAGES, tuner), expected, atol=1e-5, rtol=1e-5)


@every_variant
def test_ssf_scales_and_shifts_the_outputs(variant):
    backbone = make(variant)
    tuner = perturbed(build("ssf", backbone), std=0.3)
    skipped = ("q_norm", "k_norm", "norm_pre")
    layers = {
        name: module
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d) and not name.endswith(skipped)
    }
    assert set(tuner.gamma) == {name.replace(".", "/") for name in layers}

    def scaled(name):
        gamma, beta = (values[name.replace(".", "/")] for values in (tuner.gamma, tuner.beta))
        shape = (-1, 1, 1) if name.startswith("patch_embed") else (-1,)
        return lambda module, args, out: out * gamma.view(shape) + beta.view(shape)

    with hooks(*((module, scaled(name)) for name, module in layers.items())):
        expected = backbone.model(IMAGES)
    torch.testing.assert_close(backbone(IMAGES, tuner), expected, atol=1e-4, rtol=1e-4)
    biases = [layer.bias for layer in layers.values()]
    assert (None in biases) == (variant in ("CLIP", "no qkv bias"))  # and the slots are empty again


@every_variant
@pytest.mark.parametrize("deep", [True, False])
def test_prompts_are_tokens_at_the_end(variant, deep):
    backbone = make(variant)
    tuner = perturbed(VisualPrompts(backbone, 3, deep=deep), std=1.0)
    vit = backbone.model
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(IMAGES)))
    n = x.shape[1]
    if not deep:
        x = torch.cat([x, torch.stack([tuner.prompts[0]] * len(x))], 1)
    for i, block in enumerate(vit.blocks):
        x = block(torch.cat([x, torch.stack([tuner.prompts[i]] * len(x))], 1))[:, :n] if deep else block(x)
    expected = vit.forward_head(vit.norm(x)[:, :n])
    torch.testing.assert_close(backbone(IMAGES, tuner), expected, atol=1e-5, rtol=1e-5)


def plain_prefix_features(vit, keys, values):
    """A ViT in which attention is written out: per head softmax(q [P_k; k]ᵀ/√d) [P_v; v]; keys [L, P, D]."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(IMAGES.to(keys.dtype))))
    for i, block in enumerate(vit.blocks):
        a, width = block.attn, D // 3
        q, k, v = a.qkv(block.norm1(x)).split(D, dim=2)
        heads = []
        for h in range(3):
            part = slice(h * width, (h + 1) * width)
            qh, kh = a.q_norm(q[..., part]), a.k_norm(k[..., part])
            kh = torch.cat([torch.stack([keys[i][:, part]] * len(x)), kh], 1)
            vh = torch.cat([torch.stack([values[i][:, part]] * len(x)), v[..., part]], 1)
            scores = torch.einsum("bnd,bmd->bnm", qh, kh) / width**0.5
            heads.append(torch.softmax(scores, dim=2) @ vh)
        x = x + block.ls1(a.proj(torch.cat(heads, 2)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return vit.forward_head(vit.norm(x))


@every_variant
@pytest.mark.parametrize("fused", [True, False])
def test_prefix_is_further_keys_and_values(variant, fused):
    backbone = make(variant).double()
    for block in backbone.model.blocks:
        block.attn.fused_attn = fused
    tuner = perturbed(Prefix(backbone, 3).double(), std=1.0)
    expected = plain_prefix_features(backbone.model, tuner.keys, tuner.values)
    torch.testing.assert_close(backbone(IMAGES.double(), tuner), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("compensate", [False, True])
def test_prefixes_of_its_own_for_every_image(compensate):
    backbone = make()
    keys = draw(3, 4, D).requires_grad_()
    given = backbone(IMAGES, ExternalPrefix({1: (keys, 2 * keys)}, compensate=compensate))
    plain = Prefix(backbone, 4, blocks=[1], compensate=compensate)
    for image, own, features in zip(IMAGES, keys, given, strict=True):
        with torch.no_grad():
            plain.keys.copy_(own), plain.values.copy_(2 * own)
        torch.testing.assert_close(backbone(image[None], plain)[0], features, atol=1e-5, rtol=1e-5)
    one_for_all = backbone(IMAGES, ExternalPrefix({1: (keys[0], 2 * keys[0])}, compensate=compensate))
    torch.testing.assert_close(one_for_all[0], given[0], atol=1e-5, rtol=1e-5)
    assert not list(ExternalPrefix({1: (keys, keys)}).parameters())
    loss(given).backward()
    assert (keys.grad.flatten(1).norm(dim=1) > 0).all()
    assert torch.equal(backbone(IMAGES, ExternalPrefix({})), backbone(IMAGES))


@every_variant
@pytest.mark.parametrize(
    "empty",
    [
        lambda b: VisualPrompts(b, 0),
        lambda b: VisualPrompts(b, 0, deep=False),
        lambda b: Prefix(b, 0),
        lambda b: Prefix(b, 0, learned_scale=True, compensate=True),
    ],
)
def test_nothing_added_changes_nothing(variant, empty):
    backbone = make(variant)
    torch.testing.assert_close(backbone(IMAGES, empty(backbone)), backbone(IMAGES), atol=1e-6, rtol=1e-5)


def test_weight_tuners_choose_by_what_a_weight_is():
    backbone = make("CLIP")
    names = {kind: set(build(kind, backbone).weights()) for kind in ("bitfit", "layernorm", "partial", "full")}
    everything = {name for name, _ in backbone.model.named_parameters()}
    assert names["full"] == everything
    assert names["bitfit"] == {name for name in everything if name.endswith(".bias")}
    assert names["layernorm"] == {name for name in everything if "norm" in name}
    assert names["partial"] == {name for name in everything if name.startswith(("blocks.1.", "norm."))}


# ---- PEFT


@every_variant
def test_lora_is_an_update_of_the_weights(variant):
    backbone = make(variant)
    tuner = PeftTuner(backbone, "lora", rank=4, alpha=6, targets=["qkv", "attn.proj", "fc2"])
    tuner.add("second", torch.Generator().manual_seed(5))
    perturbed(tuner, std=0.3)
    named = {n: p.detach() for n, p in backbone.model.named_parameters()}
    own = dict(tuner.named_parameters())
    for active in (["default"], ["second"], ["default", "second"]):
        tuner.activate(active)
        swapped = {}
        for name in tuner.delta("default"):
            swapped[name] = named[name].clone()
            for adapter in active:
                path = f"layers.{name.removesuffix('.weight').replace('.', '/')}"
                a, b = (own[f"{path}.lora_{part}.{adapter}.weight"] for part in "AB")
                torch.testing.assert_close(tuner.delta(adapter)[name], (6 / 4 * b @ a).detach(), atol=1e-6, rtol=1e-5)
                swapped[name] += tuner.delta(adapter)[name]
        assert len(swapped) == 3 * DEPTH
        expected = functional_call(backbone.model, swapped, (IMAGES,))
        torch.testing.assert_close(backbone(IMAGES, tuner), expected, atol=1e-5, rtol=1e-4)
    tuner.activate(())
    assert torch.equal(backbone(IMAGES, tuner), backbone(IMAGES))


@pytest.mark.parametrize("factors", ["up", "shared"])
def test_lora_with_a_fixed_factor_is_its_own_linearisation(factors, tmp_path):
    """L-LoRA, the first-order expansion of every layer in A and B around their initial values, by torch's jvp."""
    backbone = make()
    tuner = PeftTuner(backbone, "lora", rank=3, alpha=6, targets=["fc1"], factors=factors)
    layer = tuner.model(backbone.model).get_submodule("blocks.0.mlp.fc1")
    x, a = draw(5, layer.in_features, seed=3), layer.lora_A["default"].weight
    assert [key.split(".")[2] for key, _ in tuner.named_parameters()] == ["lora_B"] * DEPTH
    before = a.clone()
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        (backbone(IMAGES, tuner) - draw(1, seed=4)).square().sum().backward()
        optimizer.step()
    assert torch.equal(a, before) and bool(layer.lora_B["default"].weight.any())
    b, base = layer.lora_B["default"].weight.detach(), layer.get_base_layer()

    def product(left, right):
        return base(x) + 2 * x @ right.T @ left.T

    _, change = torch.func.jvp(product, (torch.zeros_like(b), a), (b, draw(*a.shape, seed=5)))  # whatever A did
    torch.testing.assert_close(layer(x), base(x) + change)
    tuner.save(tmp_path)
    loaded = PeftTuner(backbone, "lora", rank=3, alpha=6, targets=["fc1"], factors=factors)
    loaded.load(tmp_path)
    torch.testing.assert_close(backbone(IMAGES, loaded), backbone(IMAGES, tuner))
    one, two = (PeftTuner(backbone, "lora", rank=3, targets=["fc1"], factors=factors) for _ in range(2))
    for seed, each in enumerate((one, two)):
        each.reset(torch.Generator().manual_seed(seed))
        perturbed(each, std=0.3)
    key = "layers.blocks/0/mlp/fc1.lora_{}.default.weight"
    (a1, b1), (a2, b2) = ([dict(each.state_dict())[key.format(part)] for part in "AB"] for each in (one, two))
    assert torch.equal(a1, a2) == (factors == "shared")
    mean = (one.delta()["blocks.0.mlp.fc1.weight"] + two.delta()["blocks.0.mlp.fc1.weight"]) / 2
    assert torch.allclose(mean, (b1 + b2) / 2 @ a1, atol=1e-5) == (factors == "shared")


@pytest.mark.parametrize("kind", PEFT)
def test_active_and_trainable_are_set_apart(kind):
    backbone = make()
    tuner = build(kind, backbone)
    tuner.add("new", torch.Generator().manual_seed(1))
    assert (tuner.names, tuner.active, tuner.trainable) == (("default", "new"), ("default",), ("default",))
    perturbed(tuner)
    tuner.activate(["default", "new"] if kind != "osf" else "new")
    tuner.train_only("new")
    assert {n.split(".")[3] for n, p in tuner.named_parameters() if p.requires_grad} == {"new"}
    before = {n: p.detach().clone() for n, p in tuner.named_parameters()}
    loss(backbone(IMAGES, tuner)).backward()
    torch.optim.SGD([p for p in tuner.parameters() if p.requires_grad], lr=0.1).step()
    moved = {n.split(".")[3] for n, p in tuner.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"new"}
    old = {n: p.detach().clone() for n, p in tuner.named_parameters() if ".default" in n}
    tuner.reset(torch.Generator().manual_seed(2))  # trainable ones only
    assert all(torch.equal(p, old[n]) for n, p in tuner.named_parameters() if ".default" in n)
    tuner.activate("new")
    torch.testing.assert_close(backbone(IMAGES, tuner), backbone(IMAGES), atol=1e-4, rtol=1e-4)


def test_updates_of_osf_do_not_add():
    tuner = PeftTuner(make(), "osf")
    tuner.add("new", torch.Generator())
    with pytest.raises(BackboneError, match="one adapter can be active at a time, got default, new"):
        tuner.activate(["default", "new"])
    assert tuner.active == ("default",)


def test_a_peft_that_leaves_the_wrong_adapter_trainable_is_noticed(monkeypatch):
    tuner = PeftTuner(make())
    tuner.add("new", torch.Generator())
    monkeypatch.setattr("peft.functional.set_requires_grad", lambda *args, **kw: None)
    with pytest.raises(RuntimeError, match="PEFT did not set"):
        tuner.train_only("new")


@pytest.mark.parametrize("kind", PEFT)
def test_files_are_pefts_own(kind, tmp_path):
    import peft

    backbone = make()
    tuner = perturbed(build(kind, backbone))
    expected = backbone(IMAGES, tuner)
    tuner.save(tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(backbone.model), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(IMAGES), expected, atol=1e-6, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = build(kind, backbone)
    again.load(tmp_path / "theirs", "loaded")
    again.activate("loaded")
    assert torch.equal(backbone(IMAGES, again), expected)
    again.activate("default")
    again.load(tmp_path / "adapter")
    assert torch.equal(backbone(IMAGES, again), expected)


def test_osf_keeps_the_top_singular_directions():
    backbone = make()
    tuner = copy.deepcopy(PeftTuner(backbone, "osf", rank=20, targets=["qkv", "fc2"]))  # a copy projects as well
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(backbone(IMAGES, tuner)).backward()
        optimizer.step()
    for name, delta in tuner.delta().items():
        u, s, v = torch.linalg.svd(backbone.model.get_parameter(name).detach())
        assert delta.norm() > 1e-4
        assert (u[:, :20].T @ delta).norm() < 1e-4 * s[0] and (delta @ v[:20].T).norm() < 1e-4 * s[0]


def test_peft_fits_other_families_and_follows_to_another_dtype():
    with isolated(0):
        swin = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24, depths=(2, 1), num_classes=0
        )
    backbone = Backbone(swin, "swin", {})
    frozen, tuner = backbone(IMAGES), PeftTuner(backbone, "lora", rank=2)
    torch.testing.assert_close(backbone(IMAGES, tuner), frozen)
    assert (backbone(IMAGES, perturbed(tuner, std=0.3)) - frozen).abs().max() > 1e-3
    expected = backbone(IMAGES, tuner)
    backbone.double(), tuner.double()  # moving to a device takes the same road: buffers are replaced, not refilled
    moved = backbone(IMAGES.double(), tuner)
    torch.testing.assert_close(moved, expected.double(), atol=1e-4, rtol=1e-4)
    buffers = [b for b in tuner.model(swin).buffers() if b.is_floating_point()]
    assert buffers and all(b.dtype == torch.float64 for b in buffers)


@pytest.mark.slow
def test_importing_tuners_does_not_import_peft():
    code = "import sys, cil.tuning; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=200).returncode == 0


# ---- errors


def swin() -> Backbone:
    with isolated(0):
        model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24, depths=(1,))
    return Backbone(model, "swin", {})


@pytest.mark.parametrize("kind", ["adapter", "sequential", "ssf", "vpt_shallow", "vpt_deep", "prefix", "lora_kv"])
def test_token_tuners_refuse_other_families_before_training(kind):
    with pytest.raises(BackboneError, match=r"token-level tuners fit timm's VisionTransformer.*SwinTransformer"):
        build(kind, swin())


def test_token_tuners_refuse_other_blocks_and_gated_attention():
    from timm.models.vision_transformer import ParallelThingsBlock

    with pytest.raises(BackboneError, match="ParallelThingsBlock"):
        Adapter(make(block_fn=ParallelThingsBlock))
    backbone = make()
    backbone.model.blocks[1].attn.gate = nn.Identity()
    with pytest.raises(BackboneError, match="gated attention"):
        Adapter(backbone)
    with pytest.raises(BackboneError, match="gated attention"):
        backbone(IMAGES, Tuner())


def gives(config):
    return lambda: build_tuner(config, make())


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (gives("adaptr"), ConfigError, r"unknown 'adaptr' \(did you mean 'adapter'\?\); known here: adapter, ssf"),
        (gives({"name": "adapter", "botleneck": 3}), ConfigError, r"unknown key tuner\.botleneck .*'bottleneck'"),
        (gives({"name": "prefix", "length": -1}), ConfigError, r"tuner\.length: should be greater than or equal to 0"),
        (gives({"name": "partial", "blocks": 3}), BackboneError, "blocks: got 3, this backbone has 2; give 1 to 2"),
        (gives({"name": "lora", "targets": ["qvk"]}), BackboneError, "'qvk' .*'qkv'.*fc1, fc2, proj, qkv"),
        (gives({"name": "lora", "targets": ["qkv", "nope"]}), BackboneError, "no layer of VisionTransformer.*'nope'"),
        (gives({"name": "lora", "targets": r"blocks\.7\..*"}), BackboneError, "no layer of VisionTransformer"),
        (gives({"name": "lora", "targets": ["norm1"]}), BackboneError, "PEFT refuses: Target module .*not supported"),
        (gives({"name": "lora", "options": {"use_rslra": True}}), BackboneError, "did you mean 'use_rslora'"),
        (gives({"name": "lora", "options": {"bias": "all"}}), BackboneError, "edits the frozen backbone"),
        (gives({"name": "lora", "options": {"init_lora_weights": "pissa"}}), BackboneError, "edits the frozen"),
        (gives({"name": "lora", "options": {"modules_to_save": ["norm"]}}), BackboneError, "edits the frozen"),
        (gives({"name": "oft", "block_size": 7}), BackboneError, "PEFT refuses: Invalid `oft_block_size`"),
        (lambda: PeftTuner(make(), "lorra"), BackboneError, "did you mean 'lora'"),
        (lambda: PeftTuner(make(), "lora", factors="down"), BackboneError, "factors is 'down'; give one of both, up"),
        (lambda: PeftTuner(make(), "oft", factors="up"), BackboneError, "for kinds other than lora and dora both"),
        (lambda: PeftTuner(make(), "ia3", rank=3), BackboneError, "ia3 has no rank, got 3"),
        (lambda: PeftTuner(make(), "oft", dropout=0.1), BackboneError, "oft has no dropout, got 0.1"),
        (lambda: PeftTuner(make(), name="task.0"), BackboneError, "'task.0' is taken, empty or has a dot"),
        (lambda: PeftTuner(make()).add("default", torch.Generator()), BackboneError, "'default' is taken"),
        (lambda: PeftTuner(make()).activate("defaut"), BackboneError, "no adapter 'defaut'.*'default'"),
        (lambda: PeftTuner(make(), "dora").delta(), BackboneError, "only lora and osf add"),
        (lambda: PeftTuner(make()).load("nowhere"), BackboneError, "nowhere: no adapter_config.json"),
        (lambda: make()(IMAGES, PeftTuner(make())), BackboneError, "built on another backbone"),
        (lambda: Adapter(make(), 0), BackboneError, "bottleneck must be at least 1, got 0"),
        (gives({"name": "adapter", "blocks": [0, 2]}), BackboneError, "blocks: got 2, this backbone has 2 blocks"),
        (gives({"name": "prefix", "blocks": [1, 0, 1]}), BackboneError, "blocks: 1 is listed twice"),
        (gives({"name": "lora_kv", "blocks": []}), ConfigError, r"tuner\.blocks: .*at least 1 item"),
        (gives({"name": "lora_kv", "blocks": [-1]}), ConfigError, r"tuner\.blocks.*greater than or equal to 0"),
        (lambda: Prefix(make(), blocks=[]), BackboneError, "blocks: the list is empty; give some of 0 to 1"),
        (lambda: KeyValueLora(make(), 0), BackboneError, "rank must be at least 1, got 0"),
        (lambda: VisualPrompts(make(), -1), BackboneError, "length must be at least 0, got -1"),
    ],
)
def test_errors_are_one_line(action, error, message):
    with pytest.raises(error, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)


def test_files_of_another_kind_or_shape_are_refused(tmp_path):
    backbone = make()
    PeftTuner(backbone, "lora", rank=4).save(tmp_path)
    with pytest.raises(BackboneError, match="kind lora, not ia3"):
        PeftTuner(backbone, "ia3").load(tmp_path)
    with pytest.raises(BackboneError, match="does not fit"):
        PeftTuner(backbone, "lora", rank=2).load(tmp_path)
    with pytest.raises(BackboneError, match="does not fit adapter 'default': 4 tensors missing"):
        PeftTuner(backbone, "lora", rank=4, targets=["qkv", "fc1"]).load(tmp_path)


# ---- the table


class Hyper(Section):
    tuner: TunerConfig = Field("adapter", validate_default=True, description="what rides along")
    many: list[TunerConfig] = Field([], description="several")


@every_tuner
def test_configurations_round_trip_and_document_every_field(kind):
    config = Hyper(tuner={"name": kind, **TUNERS[kind]}, many=[{"name": kind, **TUNERS[kind]}])
    assert Hyper.model_validate_json(config.model_dump_json()) == config
    assert Hyper.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    assert Hyper(tuner=config.tuner.name).tuner.name == config.tuner.name
    fields = type(config.tuner).model_fields
    assert all(field.description for name, field in fields.items() if name != "name")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"tuner": "vpt"}, "tuner: unknown 'vpt' (did you mean 'vqt'?); known here: adapter"),
        ({"tuner": {"name": "lora", "ranc": 1}}, "unknown key tuner.ranc (did you mean 'rank'?)"),
        ({"many": ["lora", {"name": "lora", "ranc": 1}]}, "unknown key many.1.ranc (did you mean 'rank'?)"),
        ({"tuner": {"rank": 1}}, "tuner.name is missing"),
        ({"tunr": "lora"}, "unknown key tunr (did you mean 'tuner'?)"),
    ],
)
def test_errors_in_a_learners_configuration_name_the_key(raw, message):
    with pytest.raises(ValidationError) as caught:
        Hyper.model_validate(raw)
    assert explain(caught.value, Hyper).startswith(message)
