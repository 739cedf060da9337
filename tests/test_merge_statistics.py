"""Fisher information against per-sample gradients by torch.func, Gram matrices against numpy; merging small ViTs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import one_hot

from cil.backbone import Backbone
from cil.errors import BackboneError, ConfigError, DataError
from cil.merging import OPCM, Fisher, RegMean
from cil.merging.statistics import Statistics, diagonal_fisher, input_grams
from cil.tuning.peft import PeftTuner
from cil.utils.randomness import isolated

TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}


def vit(classes=3, seed=0, **options):
    with isolated(seed):
        return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **{**TINY, **options}).double()


def images(count=5, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).double()


def per_sample_gradients(model, x, label):
    """Squared gradients of log p(label | x) of every image by vmap, [N, …] a parameter."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def log_p(weights, image, y):
        return functional_call(model, weights, (image[None],)).log_softmax(1)[0] @ y

    found = vmap(grad(log_p), (None, 0, 0))(parameters, x, one_hot(label, 3).double())
    return {name: g.square() for name, g in found.items()}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("classes", [3, 2])
def test_fisher_is_the_expected_square_of_every_images_gradient(classes):
    model, x = vit().eval(), images()
    with torch.no_grad():
        p, order = model(x).softmax(1).sort(descending=True)
    expected = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for rank in range(classes):
        for name, squares in per_sample_gradients(model, x, order[:, rank]).items():
            expected[name] += torch.einsum("n,n...->...", p[:, rank], squares) / len(x)
    got = diagonal_fisher(model, x.split(2), classes=classes)
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(got[name].double(), value, rtol=1e-4, atol=1e-6 * float(value.max())), name
    assert torch.equal(
        got["blocks.0.attn.qkv.weight"], diagonal_fisher(model, [x], classes=classes)["blocks.0.attn.qkv.weight"]
    )


def test_drawn_labels_are_seeded_and_unbiased():
    model, x = vit(seed=3).eval(), images(1)
    exact = diagonal_fisher(model, [x], ["norm.bias"], classes=3)["norm.bias"]
    draws = torch.stack(
        [
            diagonal_fisher(model, [x], ["norm.bias"], generator=torch.Generator().manual_seed(s))["norm.bias"]
            for s in range(300)
        ]
    )
    spread = draws.std(0) / math.sqrt(300)
    assert bool(((draws.mean(0) - exact).abs() < 5 * spread + 1e-9).all()) and float(spread.max()) > 0
    before = torch.get_rng_state()
    again = diagonal_fisher(model, [x], ["norm.bias"])["norm.bias"]
    assert torch.equal(again, diagonal_fisher(model, [x], ["norm.bias"])["norm.bias"])
    assert torch.equal(torch.get_rng_state(), before)


def test_fisher_of_the_backbone_under_a_head_of_its_own():
    whole, x = vit().eval(), images(3)
    body = vit(classes=0).eval()
    body.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("head.")})
    expected = diagonal_fisher(whole, [x], classes=3)
    got = diagonal_fisher(body, [x], head=whole.head, classes=3)
    assert set(got) == {name for name in expected if not name.startswith("head.")}
    assert all(torch.allclose(value, expected[name]) for name, value in got.items())


def test_grams_are_means_of_outer_products():
    model, x = vit().eval(), images(4)
    seen = {}
    for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2", "head"):
        model.get_submodule(name).register_forward_hook(
            lambda layer, inputs, output, name=name: seen.setdefault(name, []).append(inputs[0].detach().numpy())
        )
    with torch.no_grad():
        model(x)
    got = input_grams(model, x.split(3))
    assert set(got) == {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, (rows, *_) in seen.items():
        rows = rows.reshape(-1, rows.shape[-1])
        expected = rows.T @ rows / len(rows)
        gram = got[f"{name}.weight"]
        assert gram.shape == (1, *expected.shape) and torch.equal(gram, gram.mT)
        assert np.abs(gram[0].numpy() - expected).max() < 1e-5 * np.abs(expected).max()
        covariance = input_grams(model, x.split(3), layers=[f"{name}.weight"], centred=True)[f"{name}.weight"][0]
        assert np.abs(covariance.numpy() - np.cov(rows.T, bias=True)).max() < 1e-5 * np.abs(expected).max()
    blocks = input_grams(model, [x], block=40)["blocks.1.mlp.fc2.weight"]  # 96 inputs: 3 blocks of 32
    assert blocks.shape == (3, 32, 32)
    whole = got["blocks.1.mlp.fc2.weight"][0]
    assert torch.allclose(
        blocks, torch.stack([whole[i : i + 32, i : i + 32] for i in (0, 32, 64)]), rtol=1e-4, atol=1e-6
    )


def test_measuring_leaves_no_trace():
    model = vit(drop_rate=0.5, proj_drop_rate=0.5).train()
    model.blocks[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    a = input_grams(model, [images()])
    assert all(torch.equal(a[k], v) for k, v in input_grams(model, [images()]).items())  # dropout is off
    diagonal_fisher(model, [images(2)])
    with pytest.raises(DataError, match="NaN or infinite"):
        input_grams(model, [images() * math.nan])
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_mistakes():
    model = vit()
    with pytest.raises(ConfigError, match=r"no parameter 'norm.bia' .did you mean 'norm.bias'"):
        diagonal_fisher(model, [images()], ["norm.bia"])
    with pytest.raises(ConfigError, match="classes is 0"):
        diagonal_fisher(model, [images()], classes=0)
    with pytest.raises(DataError, match="there are no images"):
        diagonal_fisher(model, [])
    with pytest.raises(DataError, match="no linear layer was called"):
        input_grams(model, [])


def test_statistics_go_through_a_file(tmp_path):
    stats = Statistics({"a.b": torch.rand(3)}, {"c": torch.eye(2)[None].double()})
    stats.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert list(loaded.fisher) == ["a.b"] and list(loaded.grams) == ["c"] and len(loaded.grams) == 1
    assert torch.equal(loaded.fisher["a.b"], stats.fisher["a.b"]) and torch.equal(loaded.grams["c"], stats.grams["c"])
    assert loaded.grams.get("a.b") is None
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="has no statistics"):
        Statistics.load(tmp_path / "model.safetensors")
    with pytest.raises(BackboneError, match="no such file"):
        Statistics.load(tmp_path / "none.safetensors")


def fine_tuned(base, seed, std=0.05):
    model = vit(seed=1)
    model.load_state_dict(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn(p.shape, generator=generator))
    return model.eval()


def test_statistics_of_models_make_the_merges_they_are_for():
    base = vit(seed=1).state_dict()
    models = [fine_tuned(base, seed) for seed in (1, 2)]
    stats = [
        Statistics(diagonal_fisher(m, [images(3, s)]), input_grams(m, [images(3, s)])) for s, m in enumerate(models)
    ]
    for rule in (Fisher(), RegMean(rho=1.0, ridge=1e-8)):
        rule.start(base)
        for m, s in zip(models, stats, strict=True):
            rule.add(m.state_dict(), s)
        merged = vit()
        merged.load_state_dict(rule.merged())
        assert torch.equal(merged.head.weight, base["head.weight"])
    # RegMean's own promise: on each task's inputs a layer answers more like that task's model than the mean does
    name = "blocks.0.attn.qkv.weight"
    error = {
        title: sum(
            float(((w - m.state_dict()[name]) @ s.grams[name][0] * (w - m.state_dict()[name])).sum())
            for m, s in zip(models, stats, strict=True)
        )
        for title, w in (
            ("regmean", merged.state_dict()[name]),
            ("mean", sum(m.state_dict()[name] for m in models) / 2),
        )
    }
    assert error["regmean"] < 0.9 * error["mean"]


def test_a_weight_used_without_its_layer_has_no_gram_and_is_refused_by_name():
    with isolated(0):
        beit = timm.create_model(
            "beit_base_patch16_224", img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2, num_classes=3
        ).eval()
    base = {k: v.clone() for k, v in beit.state_dict().items()}
    task = {k: v + 0.1 if v.is_floating_point() else v for k, v in base.items()}
    stats = Statistics(grams=input_grams(beit, [images(2).float()]))
    assert "blocks.0.attn.qkv.weight" not in stats.grams and "blocks.0.mlp.fc1.weight" in stats.grams
    with pytest.raises(DataError, match=r"no Gram matrix of blocks.0.attn.qkv.weight"):
        RegMean().start(base).add(task, stats)
    rule = RegMean().start(base, linear=stats.grams).add(task, stats)
    assert torch.allclose(rule.merged()["blocks.0.attn.qkv.weight"], task["blocks.0.attn.qkv.weight"])


def test_lora_updates_of_a_tuner_are_merged_as_the_weights_they_make():
    backbone = Backbone(vit(classes=0).float(), "tiny", {})
    tuner = PeftTuner(backbone, rank=2, targets=["qkv", "fc1"])
    for name in ("a", "b"):
        tuner.add(name, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    base = backbone.model.state_dict()
    by_delta, by_weights = OPCM().start(base), OPCM().start(base)
    for name in ("a", "b"):
        delta = tuner.delta(name)
        by_delta.add_update(delta)
        by_weights.add({k: v + delta[k] if k in delta else v for k, v in base.items()})
    expected = by_weights.merged()
    merged = by_delta.merged()
    assert max(float((merged[k] - v).abs().max()) for k, v in expected.items()) < 1e-5
    features = functional_call(backbone.model, merged, (images(2).float(),))
    assert features.shape == (2, 24) and not torch.equal(features, backbone(images(2).float()))
