"""LAE's three tuners, each against its formula written out."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch

from cil.backbone import Backbone
from cil.config.reading import load_config
from cil.learners.lae import LAE
from cil.runner.plan import plans
from cil.tuning import Adapter, KeyValueLora, Prefix, build_tuner
from cil.utils.randomness import isolated

PUBLISHED = {plan.parameters.tuner.name: plan.parameters.tuner for plan in plans(load_config("cifar100/lae_b0_inc10"))}


TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}


def tiny(**options) -> Backbone:
    with isolated(0):
        model = timm.create_model(
            "vit_tiny_patch16_224",
            **{**TINY, **options},
        )
        for p in model.parameters():
            torch.nn.init.trunc_normal_(p, std=0.3) if p.ndim < 2 or p.shape[0] == 1 else p.data.mul_(4)
    return Backbone(model.double(), "tiny", {})


def trained(tuner):
    """No parameter at its initial value."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return tuner.double().eval()


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_hand(vit, attention_half):
    """A ViT whose attention half is ``attention_half(i, block, x)``."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(IMAGES)))
    for i, block in enumerate(vit.blocks):
        x = attention_half(i, block, x)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return vit.forward_head(vit.norm(x))


def test_the_adapter_stands_beside_the_attention_and_reads_its_input():
    vit = tiny(init_values=0.5)
    tuner = trained(Adapter(vit, 5, 1.0, 0.0, form="attention", activation="gelu", learned_scale=True, blocks=[2, 0]))
    places = {2: tuner.adapters[0], 0: tuner.adapters[1]}

    def half(i, block, x):
        u = block.norm1(x)
        h = x + block.ls1(block.attn(u))
        if i in places:
            a = places[i]
            inner = u @ a.down.weight.T + a.down.bias
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            h = h + a.scale * (inner @ a.up.weight.T) + a.scale * a.up.bias
        return h

    torch.testing.assert_close(vit(IMAGES, tuner), by_hand(vit.model, half), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "init_values": 0.5}], ids=["plain", "normed"])
def test_the_compensated_prefix_is_a_softmax_divided_by_its_own_sum(fused, options):
    vit = tiny(**options)
    for block in vit.model.blocks:
        block.attn.fused_attn = fused
    tuner = trained(Prefix(vit, 4, blocks=[1, 2], init="uniform", learned_scale=True, compensate=True))

    def half(i, block, x):
        a = block.attn
        q, k, v = (
            part.unflatten(2, (3, 16)).transpose(1, 2) for part in a.qkv(block.norm1(x)).split(48, dim=2)
        )  # [B, 3, N, 16]
        q, k = a.q_norm(q), a.k_norm(k)
        row, length = i - 1, 0
        if row >= 0:
            p_k = (tuner.keys[row] * tuner.scales[row, 0]).unflatten(1, (3, 16)).transpose(0, 1).expand(3, 3, 4, 16)
            p_v = (tuner.values[row] * tuner.scales[row, 1]).unflatten(1, (3, 16)).transpose(0, 1).expand(3, 3, 4, 16)
            k, v = (torch.cat([own[:, :, :1], p, own[:, :, 1:]], 2) for own, p in ((k, p_k), (v, p_v)))  # after CLS
            length = 4
        weights = (q @ k.transpose(2, 3) / 4).softmax(-1)
        prefix = slice(1, 1 + length)
        if length:
            weights = torch.cat(
                [
                    weights[..., :1],
                    weights[..., prefix] / weights[..., prefix].sum(-1, keepdim=True).clamp(min=1e-12),
                    weights[..., 1 + length :],
                ],
                -1,
            )
            assert (weights.sum(-1) > 1).all()
        return x + block.ls1(a.proj((weights @ v).transpose(1, 2).flatten(2)))

    torch.testing.assert_close(vit(IMAGES, tuner), by_hand(vit.model, half), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}], ids=["bias", "no bias"])
def test_lora_on_keys_and_values_leaves_the_query_rows(options):
    vit = tiny(**options)
    tuner = trained(KeyValueLora(vit, 4, blocks=[0, 2]))
    edited = copy.deepcopy(vit.model)
    with torch.no_grad():
        for row, i in enumerate((0, 2)):
            weight = edited.blocks[i].attn.qkv.weight
            before = weight[:48].clone()
            weight[48:96] += tuner.scales[row, 0] * tuner.up[row, 0] @ tuner.down[row, 0]
            weight[96:] += tuner.scales[row, 1] * tuner.up[row, 1] @ tuner.down[row, 1]
            assert torch.equal(tuner.weights()[f"blocks.{i}.attn.qkv.weight"][:48], before)
    assert tuner.weights().keys() == {"blocks.0.attn.qkv.weight", "blocks.2.attn.qkv.weight"}
    torch.testing.assert_close(vit(IMAGES, tuner), edited(IMAGES), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "a_block"),
    [("adapter", 8_454), ("lora_kv", 2 * (5 * (768 + 768) + 1)), ("prefix", 2 * (10 * 768 + 1))],
)
def test_published_parameter_counts_on_vit_b16(name, a_block):
    with isolated(0):
        model = timm.create_model("vit_base_patch16_224", img_size=32, depth=6, num_classes=0)
    vit = Backbone(model, "b", {})
    assert sum(p.numel() for p in build_tuner(PUBLISHED[name], vit).parameters()) == 5 * a_block
    assert LAE.Config().tuner == PUBLISHED["adapter"]


def test_initial_values_are_the_papers():
    vit = tiny(depth=5)
    adapter, lora, prefix = (build_tuner(PUBLISHED[name], vit) for name in ("adapter", "lora_kv", "prefix"))
    bound = 1 / math.sqrt(48)
    for down in (adapter.adapters[0].down.weight, lora.down):
        assert 0.9 * bound < down.abs().max() <= bound and down.min() < 0 < down.max()
    assert not lora.up.any() and not adapter.adapters[0].up.weight.any()
    scales = torch.stack([a.scale for a in adapter.adapters])
    assert all((s == 1).all() for s in (scales, lora.scales, prefix.scales))
    assert prefix.keys.min() >= 0 and 0.009 < prefix.values.max() <= 0.01
    loud = Adapter(vit, 5, scale=0.3, learned_scale=True)
    with torch.no_grad():
        loud.adapters[0].scale.fill_(7.0)
    loud.reset(torch.Generator())
    assert loud.adapters[0].scale.item() == pytest.approx(0.3)


def test_old_adapters_still_load():
    keys = set(Adapter(tiny(), 8).state_dict())
    assert keys == {f"adapters.{i}.{p}.{w}" for i in range(3) for p in ("down", "up") for w in ("weight", "bias")}


@pytest.mark.parametrize("form", ["parallel", "sequential", "attention"])
def test_blocks_without_an_adapter_stay_as_they_are(form):
    vit = tiny()
    some = trained(Adapter(vit, 8, 1.0, 0.0, form=form, blocks=[1]))
    every = Adapter(vit, 8, 1.0, 0.0, form=form).double().eval()
    sites = len(some.adapters)
    for ours, theirs in zip(some.adapters, every.adapters[sites : 2 * sites], strict=True):
        theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(vit(IMAGES, some), vit(IMAGES, every), atol=1e-12, rtol=1e-12)
    assert not torch.allclose(vit(IMAGES, some), vit(IMAGES))
