"""Features of several blocks: equal to what timm returns, from one pass, kept like any view, and used by learners.

Small models with drawn weights, as in ``test_views``, because layer scales and tables that start near zero hide errors.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from marks import slow_beyond
from safetensors.torch import load_file
from test_runner import TINY, settings, stable
from test_store import DIGITS
from test_views import ALL, D, Inserted, drawn, fill, images, make

from cil import results
from cil.backbone import FROZEN, Backbone, load_backbone
from cil.config import BackboneConfig, HardwareConfig
from cil.data.images import ImageSet
from cil.data.sources import from_arrays
from cil.data.transforms import Transforms
from cil.errors import BackboneError, ConfigError
from cil.export import export, load
from cil.features import FeatureCache
from cil.learners.registry import build_learner
from cil.prediction import open_run
from cil.runner import benchmark, run, run_stages
from cil.runner.checkpoint import RunFolder
from cil.store import open_store
from cil.stream import Stream
from cil.stream.protocol import ClassIncremental
from cil.testing import parametrize_learner
from cil.testing.setting import NAMES, accelerator, draw_images
from cil.tuning import Adapter, PooledPrompts, Prefix, VisualPrompts, build_tuner
from cil.tuning.layers import Collector
from cil.utils.randomness import isolated
from scripts.studies.small_models import options_of

EVERY = ("class", "mean", "std")
FAST = ["ViT", "DINOv3 with biases", "BEiT, token", "registers, average"]
OTHERS = {"vit_relpos_small_patch16_224": ("mean", "std"), "eva02_enormous_patch14_clip_224": ("class", "mean", "std")}
MAPS = ["swin_tiny_patch4_window7_224", "hiera_tiny_224", "convnext_tiny", "cait_xxs24_224", "test_resnet"]


def tokens_of(model):
    return EVERY if getattr(model, "cls_token", None) is not None else EVERY[1:]


def returned(model, x, tokens, *, norm=False):
    """The parts of all blocks from what timm's ``forward_intermediates`` returns, computed by numpy."""
    prefixed = model.num_prefix_tokens > 0  # timm's ViTs with relative positions fail without any
    kept = model.forward_intermediates(
        x, return_prefix_tokens=prefixed, norm=norm, output_fmt="NLC", intermediates_only=True, indices=None
    )
    parts = []
    for block in kept:
        patches, prefix = block if isinstance(block, tuple) else (block, None)
        taken = {"mean": patches.numpy().mean(1), "std": patches.numpy().std(1, ddof=1)}
        taken |= {} if prefix is None else {"class": prefix[:, 0].numpy()}
        parts += [torch.from_numpy(taken[token]) for token in tokens]
    return torch.cat([model.fc_norm(part) for part in parts] if norm else parts, dim=1)


@pytest.mark.parametrize("name", slow_beyond(FAST, ALL))
def test_collected_features_are_what_timm_returns(name):
    b = make(name, torch.float64)
    x, tokens = images(torch.float64), tokens_of(b.model)
    with torch.inference_mode():
        for norm in (False, True):
            collector = Collector(b, "all", tokens[::-1], norm=norm)
            found = b(x, collector)
            assert collector.walks and found.shape[1] == collector.width == sum(collector.widths)
            torch.testing.assert_close(found[:, : -b.feature_dim], returned(b.model, x, tokens, norm=norm))
            assert torch.equal(found[:, -b.feature_dim :], b(x))
        alone = b(x, Collector(b, [1], ["mean"], final=False))
        assert torch.equal(alone, b(x, Collector(b, "all", ["mean"]))[:, D : 2 * D])


@pytest.mark.parametrize(("name", "token"), [("ViT", "class"), ("BEiT, token", "class"), ("BEiT", "mean")])
def test_the_last_block_with_its_norm_is_the_frozen_feature_to_the_bit(name, token):
    """Also where timm pools the patches and applies its norm afterwards."""
    b = make(name)
    with torch.inference_mode():
        last = b(images(), Collector(b, "last", [token], norm=True, final=False))
        assert torch.equal(last, b(images()))


TUNERS = {
    "adapter": lambda b: fill(Adapter(b, 4)),
    "deep prompts": lambda b: fill(VisualPrompts(b, 3)),
    "shallow prompts": lambda b: fill(VisualPrompts(b, 3, deep=False)),
    "prompts in front": lambda b: PooledPrompts(b, drawn(3, 4, D, dtype=torch.float32)),
    "prefix": lambda b: fill(Prefix(b, 4)),
    "layernorm": lambda b: fill(build_tuner("layernorm", b)),
    "lora": lambda b: fill(build_tuner("lora", b)),
}


@pytest.mark.parametrize("kind", slow_beyond([kind for kind in TUNERS if kind != "lora"], TUNERS))
@pytest.mark.parametrize("name", ["ViT", "DINOv3 with biases", "BEiT"])
def test_collecting_changes_no_bit_of_the_feature(name, kind):
    b = make(name)
    tuner = TUNERS[kind](b).eval()  # no dropout
    collector = Collector(b, "all", EVERY, tuner=tuner)
    with torch.inference_mode():
        assert torch.equal(b(images(), collector)[:, -b.feature_dim :], b(images(), tuner))
        assert not torch.equal(b(images(), tuner), b(images()))
        frozen = b(images(), Collector(b, "all", EVERY))
        pairs = zip(b(images(), collector).split(D, 1), frozen.split(D, 1), strict=True)
        assert not any(torch.equal(part, before) for part, before in pairs)


def test_replaced_weights_are_those_of_the_blocks():
    b = make("ViT", torch.float64)
    tuner = fill(build_tuner("full", b)).double()
    replaced = copy.deepcopy(b.model)
    replaced.load_state_dict({**replaced.state_dict(), **tuner.weights()})
    with torch.inference_mode():
        found = b(images(torch.float64), Collector(b, "all", EVERY, final=False, tuner=tuner))
        torch.testing.assert_close(found, returned(replaced, images(torch.float64), EVERY))


class Recorded(VisualPrompts):
    """Prompts that keep what their blocks return."""

    def block(self, i, block, tokens):
        out = super().block(i, block, tokens)
        self.kept = [*getattr(self, "kept", []), out]
        return out


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_are_no_patches(deep):
    b = make("DINOv3", torch.float64)
    tuner, first = fill(Recorded(b, 5, deep=deep)).double(), b.model.num_prefix_tokens
    with torch.inference_mode():
        parts = b(images(torch.float64), Collector(b, "all", EVERY, final=False, tuner=tuner)).split(D, dim=1)
        for i, out in enumerate(tuner.kept):
            assert out.shape[1] == first + 16 + (0 if deep else 5)
            patches = out[:, first : first + 16]
            for part, expected in zip(parts[3 * i :], (out[:, 0], patches.mean(1), patches.std(1)), strict=False):
                assert torch.equal(part, expected)


@pytest.mark.parametrize("name", ["ViT", "DINOv3", "BEiT"])
def test_the_place_of_prompts_does_not_matter(name):
    b = make(name, torch.float64)
    foreign, first = drawn(1, 5, D), b.model.num_prefix_tokens
    with torch.inference_mode():
        front, end = (
            b(images(torch.float64), Collector(b, "all", EVERY, tuner=Inserted(foreign, place, first)))
            for place in ("front", "end")
        )
    torch.testing.assert_close(front, end, atol=1e-12, rtol=1e-10)


def family(name):
    config = BackboneConfig(name=name, weights="random", options=options_of(name))
    return load_backbone(config).to(torch.float64)


@pytest.mark.parametrize("name", slow_beyond(["eva02_enormous_patch14_clip_224"], OTHERS))
def test_other_families_with_tokens(name):
    b, tokens = family(name), OTHERS[name]
    x = torch.randn(2, *b.input_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    collector = Collector(b, "all", tokens, tuner=build_tuner("layernorm", b))
    with torch.inference_mode():
        found = b(x, collector)
        assert not collector.walks and torch.equal(found[:, -b.feature_dim :], b(x))
        torch.testing.assert_close(found[:, : -b.feature_dim], returned(b.model, x, tokens))


@pytest.mark.parametrize("name", slow_beyond(MAPS[:1], MAPS))
def test_families_with_feature_maps(name):
    b = family(name)
    x = torch.randn(2, *b.input_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    collector = Collector(b, "all", ["mean"])
    with torch.inference_mode():
        maps = b.model.forward_intermediates(x, intermediates_only=True)
        expected = torch.cat([*(each.mean((2, 3)) for each in maps), b(x)], dim=1)
        torch.testing.assert_close(b(x, collector), expected)
        assert collector.widths == (*(each.shape[1] for each in maps), b.feature_dim)
        assert torch.equal(b(x, collector)[:, -b.feature_dim :], b(x))
    with pytest.raises(BackboneError, match=r"has feature maps of different widths.*set tokens: \[mean\]"):
        Collector(b, "all", ["class"])


def test_half_of_the_blocks_is_the_last_half():
    with isolated(0):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=5, embed_dim=24, num_heads=2)
    b = Backbone(model, "five", {"input_size": (3, 32, 32)})
    chosen = {"half": (3, 4), "last": (4,), "all": (0, 1, 2, 3, 4)}
    assert {blocks: Collector(b, blocks).blocks for blocks in chosen} == chosen
    assert Collector(b, [3, 1]).blocks == (1, 3) and Collector(b, [3, 1]).widths == (24, 24, 24, 24, 24)


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("registers, average", "half", r"layers: this Eva has no class token; set tokens: \[mean\]"),
        ("ViT", [1, 5], r"layers.blocks: got 5, this backbone has 2 blocks; give some of 0 to 1"),
        ("ViT", [1, 1], r"blocks: \[1, 1\] has an entry twice"),
        ("ViT", {"tokens": ["std", "std"]}, r"tokens: \['std', 'std'\] has an entry twice"),
        ("ViT", {"tokens": []}, r"layers.tokens: .*at least 1"),
        ("ViT", {"block": "half"}, r"unknown key layers.block.*blocks"),
        ("ViT", "quarter", r"layers.blocks: .*'half', 'all' or 'last'.*got 'quarter'"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(name, layers, message):
    with pytest.raises((BackboneError, ConfigError), match=message) as caught:
        build_learner({"name": "ncm", "layers": layers}, make(name))
    assert "\n" not in str(caught.value)


def test_without_layers_a_view_is_what_it_was(backbone):
    plain = build_learner("ncm", backbone)
    assert plain.views() == {FROZEN: backbone} and plain.width == backbone.feature_dim
    tuned = build_learner({"name": "aper", "tuner": "adapter"}, backbone)
    assert list(tuned.views()) == [FROZEN, "not adapted yet"] and tuned.width == backbone.feature_dim
    assert tuned.views()["not adapted yet"].keywords == {"tuner": tuned.tuner}
    for learner in (plain, tuned):
        assert learner.scales is None and not [key for key in learner.state_dict() if "scales" in key]
    layered = build_learner({"name": "aper", "tuner": "adapter", "layers": "all"}, backbone)
    assert layered.state_dict().keys() - tuned.state_dict().keys() == {"scales.factors"}
    assert layered.blocks == (48,) * 14 == layered.scales.widths and layered.width == 7 * 48


def test_layers_are_computed_once_in_the_datas_own_batches_and_stored(image_set, backbone):
    data = image_set(np.repeat(np.arange(3), 5))
    store, before = open_store(HardwareConfig()), backbone.passes
    order = np.random.RandomState(0).permutation(15)
    found = []
    ways = [("half", [np.arange(15)]), ([2], np.split(order, 3)), ({"blocks": "last", "scale": "unit"}, [order])]
    for layers, parts in ways:
        learner = build_learner({"name": "ncm", "layers": layers}, backbone)
        cache = FeatureCache(accelerator(), 4, store=store)
        features = torch.cat([cache.get(learner, data, part) for part in parts])
        found.append(features if layers == "half" else features[order.argsort()])
    assert backbone.passes - before == 15
    assert all(torch.equal(features, found[0]) for features in found)
    [entry] = store.entries()
    assert entry.about["feature_dim"] == 144 and entry.about["tuner_name"] == "layers 2"
    fresh = FeatureCache(accelerator(), 4).get(build_learner({"name": "ncm", "layers": "half"}, backbone), data, order)
    assert torch.equal(fresh, found[0][order])  # computed in another order of requests
    frozen = FeatureCache(accelerator(), 4).get(backbone, data, np.arange(15))
    assert torch.equal(found[0][:, 96:], frozen)


@parametrize_learner([("slda", {"layers": "half"})])
def test_common_checks(case, check):
    check(case)


@pytest.mark.slow
@parametrize_learner(
    [
        ("aper", {"tuner": "adapter", "epochs": 3, "lr": 0.1, "layers": {"blocks": "all", "tokens": list(EVERY)}}),
        ("ncm", {"layers": {"blocks": [0, 2], "scale": "unit"}}),
        ("linear_probe", {"layers": {"blocks": "all", "final": False}}),
        ("ranpac", {"projection": 100, "tuner": "ssf", "epochs": 3, "lr": 0.1, "layers": "half"}),
        ("loranpac", {"projection": 100, "rank": 5, "layers": "all"}),
        ("fecam", {"layers": {"blocks": "last", "norm": True, "scale": "none"}}),
    ]
)
def test_common_checks_of_variants(case, check):
    check(case)


def through(order, entry, backbone):
    """The learner after a stream of 4, 2 and 2 classes in this order."""
    transforms, learner = Transforms(backbone.data_config), build_learner(entry, backbone)
    sets = [ImageSet(from_arrays(*draw_images(split), NAMES), transforms) for split in ("train", "test")]
    tasks = Stream(*sets, ClassIncremental(order, sizes=(4, 2, 2)))
    run_stages(learner, tasks, accelerator=accelerator(), batch_size=16)
    return learner


@pytest.mark.parametrize("entry", [{"name": "slda"}, {"name": "ranpac", "projection": None, "strength": "gcv"}])
def test_the_order_of_later_tasks_changes_nothing(entry, backbone):
    entry = {**entry, "layers": "half"}
    one, two = (through([0, 1, 2, 3, *later], entry, backbone) for later in ((4, 5, 6, 7), (6, 7, 5, 4)))
    assert torch.equal(one.scales.factors, two.scales.factors)
    x = torch.randn(20, one.width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one.logits(x)[:, [0, 1, 2, 3, 6, 7, 5, 4]], two.logits(x), rtol=1e-4, atol=1e-5)


LAYERED = {"name": "slda", "shrinkage": 0.1, "layers": {"blocks": "all", "tokens": ["class", "mean"]}}


def test_a_run_its_resume_predictions_and_exports_agree(tmp_path, monkeypatch):
    vit = {**TINY, "options": {**TINY["options"], "depth": 3}}
    config = settings(data=DIGITS, backbone=vit, learners=[LAYERED])
    [whole] = run(config, tmp_path / "whole")
    original = benchmark.run_stages
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "run_stages", lambda *a, **k: original(*a, **{**k, "stop_after": 2}))
        [half] = run(config, tmp_path / "half")
    assert RunFolder(half).finished() == 2
    run(config, tmp_path / "half")
    assert stable(results.read_run(half)) == stable(results.read_run(whole))
    one, two = (load_file(folder / "stage-02" / "learner.safetensors") for folder in (whole, half))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert one["scales.factors"].shape == (7,)

    model = open_run(whole)
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, features = model(x)
        assert features.shape == (5, 7 * 24)
        for kind in ("torch.export", "safetensors"):
            exported = load(export(whole, tmp_path / kind, kind))
            for count in (1, 5):
                found = exported(x[:count])
                torch.testing.assert_close(found[0], logits[:count], rtol=1e-4, atol=1e-3)
                torch.testing.assert_close(found[1], features[:count], rtol=1e-4, atol=1e-4)
