"""The recipe of the shipped weights: its optimiser beside torch's, its start beside the formulas, a short run."""

from __future__ import annotations

import importlib
import json
import math
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from fresh import Started
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

ROOT = Path(__file__).parents[1]


@pytest.fixture
def part():
    """Modules of scripts/pretraining by name."""
    return lambda name: importlib.import_module(f"scripts.pretraining.{name}")


def images(n: int, side: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(12, 6), (6, 12), (18, 6)])
def test_muon_is_torchs_and_takes_a_fused_qkv_as_three(part, shape):
    gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    parts = 3 if shape[0] == 3 * shape[1] else 1
    own, theirs = torch.nn.Parameter(start.clone()), [torch.nn.Parameter(p.clone()) for p in start.chunk(parts)]
    optimisers = (
        part("optimisers").Muon([own], lr=0.1, momentum=0.9, weight_decay=0.05),
        torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=0.05),
    )
    for gradient in gradients:
        own.grad = gradient
        for parameter, piece in zip(theirs, gradient.chunk(parts), strict=True):
            parameter.grad = piece.contiguous()
        for optimiser in optimisers:
            optimiser.step()
    moved = (own - start).norm()
    assert moved > 0.05 * start.norm()
    assert (own - torch.cat(list(theirs))).norm() < 0.05 * moved  # each rounds to bfloat16 in its own order


def test_every_parameter_is_in_one_group(part):
    args = Namespace(img_size=64, patch_size=8, dim=64, depth=2, muon_lr=0.02, muon_wd=0.1, lr=0.001, wd=0.3)
    net = part("network").Net(args, 5)
    groups = [group for optimiser in part("optimisers").make_optimisers(net, args) for group in optimiser.param_groups]
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    muon, decayed, plain = ({names[id(p)] for p in group["params"]} for group in groups)
    assert sum(len(group["params"]) for group in groups) == len(names) == len(muon | decayed | plain)
    assert len(muon) == 2 * 4 and all(".blocks." in name for name in muon)
    assert decayed == {"backbone.patch_embed.proj.weight", "head.weight", "aux.weight"}
    assert {"backbone.pos_embed", "backbone.cls_token", "head.bias"} <= plain
    assert [(g["base_lr"], g["weight_decay"]) for g in groups] == [(0.02, 0.1), (0.001, 0.3), (0.001, 0.0)]


def test_initial_attention_and_patches_are_what_their_formulas_say(part):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=192, depth=2, num_heads=3)
    pictures = images(300)
    part("network").initialise(model, pictures)
    attention = model.blocks[1].attn
    q, k, v = attention.qkv.weight.detach().chunk(3)
    for head in range(3):  # rank 64 of a Z + b I: its diagonal is positive on average, everything else is noise
        product = q[64 * head : 64 * head + 64].T @ k[64 * head : 64 * head + 64]
        assert product.diagonal().mean() > 0.2 > 5 * (product - product.diagonal().diag()).mean().abs()
    carried = (attention.proj.weight @ v).detach()  # a Z − b I as a whole, Z / √d with entries of deviation 0.4 / √192
    assert carried.diagonal().mean().item() == pytest.approx(-0.4, abs=0.01)
    assert (carried + 0.4 * torch.eye(192)).std().item() == pytest.approx(0.4 / math.sqrt(192), rel=0.02)
    small = torch.nn.functional.interpolate(part("images").normalise(pictures), size=48, mode="bilinear")
    embedded = model.patch_embed.proj(small).detach().flatten(2).transpose(1, 2).reshape(-1, 192)
    assert embedded.mean(0).abs().max() < 1e-3
    values = torch.linalg.eigvalsh(embedded.T.cov())  # 0.7² λ / (λ + 0.05)
    assert values.min() > 0 and values.max() < 0.49
    assert torch.equal(model.pos_embed[0, 0], torch.zeros(192))
    rows, columns = model.pos_embed[0, 1:].view(8, 8, 2, 96).unbind(2)
    assert torch.equal(rows[3, 0], rows[3, 7]) and torch.equal(columns[0, 3], rows[3, 0])


def test_schedule_by_hand(part):
    training = part("training")
    assert [training.lr_factor(p, 0.1) for p in (0, 0.05, 0.1, 0.55)] == pytest.approx([0, 0.5, 1, 0.5])
    assert training.lr_factor(1, 0.1) == pytest.approx(0) and training.lr_factor(1.2, 0.1) >= 0
    plan = [(0.35, 32), (0.85, 48), (1.0, 64)]
    assert [training.resolution(p, plan) for p in (0, 0.35, 0.84, 0.99, 1.5)] == [32, 48, 48, 64, 64]


def test_augmented_and_mixed_images(part):
    pictures = part("images")
    x, y = images(6), torch.arange(6)
    plain = pictures.augment(x, 64, Namespace(min_scale=1.0, jitter=0), torch.Generator().manual_seed(1))
    whole = pictures.normalise(x)
    assert plain.shape == whole.shape and plain.mean((0, 2, 3)) == pytest.approx(whole.mean((0, 2, 3)), abs=0.1)
    small = pictures.augment(x, 32, Namespace(min_scale=0.3, jitter=0.3), torch.Generator().manual_seed(1))
    assert small.shape == (6, 3, 32, 32)
    mixed, partners, weight = pictures.cutmix(whole, y, torch.Generator().manual_seed(2))
    kept = (mixed == whole).all(1).float().mean((1, 2))
    assert kept[partners != y] == pytest.approx(weight) and 0 < weight < 1
    assert kept[partners == y] == pytest.approx(1)


@pytest.fixture
def script(tmp_path):
    """Runs pretrain_backbone.py on dark and bright images with a network of one block, and returns what it says."""
    labels = torch.arange(120) % 2
    split = images(120) // 2 + (labels * 127).to(torch.uint8).view(-1, 1, 1, 1), labels
    torch.save({key: split for key in ("pre_train", "pre_val", "str_train", "str_val")}, tmp_path / "data.pt")

    def run(*arguments: str) -> str:
        given = ["pretrain_backbone", *arguments, "--data", "data.pt", "--depth", "1", "--dim", "64"]
        code = f"import sys\nfrom scripts.pretraining.pretrain_backbone import main\nsys.argv = {given!r}\nmain()\n"
        status, out, err = Started(code, tmp_path, {**os.environ, "PYTHONPATH": str(ROOT)}).finish(300)
        assert status == 0, err
        return out

    return run


TRAIN = ["train", "--batch", "32", "--micro", "16", "--jitter", "0", "--cutmix", "0", "--plan", "1:32"]


@pytest.mark.slow
def test_a_short_run_learns_is_exported_and_goes_on(tmp_path, script):
    assert "done: 20 steps, 640 images" in script(*TRAIN, "--images", "640", "--workers", "1", "--out", "run")
    evaluated = ("eval", "--checkpoint", "run/last.pt", "--which", "ema")
    script(*evaluated, "--export", "run.safetensors", "--report", "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ema"]["pretrain_val_top1"] > 80 and report["ema"]["stream100_logistic"] > 80
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=64, depth=1, num_heads=1,
                              num_classes=0).eval()  # fmt: skip
    model.load_state_dict(load_file(tmp_path / "run.safetensors"))
    again = script(*TRAIN, "--images", "960", "--workers", "1", "--out", "run", "--resume")
    assert "done: 30 steps, 960 images" in again


@pytest.mark.slow
def test_two_processes_make_the_same_weights_again(tmp_path, script):
    for out in ("one", "two"):
        assert "done: 4 steps, 128 images" in script(*TRAIN, "--images", "128", "--workers", "2", "--out", out)
    one, two = (torch.load(tmp_path / out / "last.pt", weights_only=True)["net"] for out in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_probes_beside_numpy(part):
    probes = part("probes")
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.randn(90, 5, generator=generator) + 1.5 * torch.nn.functional.one_hot(y, 5)
    scores = probes.ridge(x, y, 0.01)(x)
    z = np.c_[(x - x.mean(0)) / (x.std(0) + 1e-6), np.ones(90)].astype(float)
    weights = np.linalg.solve(z.T @ z + 0.01 * 90 * np.eye(6), z.T @ np.eye(3)[y])
    assert scores.numpy() == pytest.approx(z @ weights, abs=1e-5)
    penalty = 0.001
    own = probes.logistic(x, y, penalty)(x).softmax(1).detach()
    # cross-entropy + w ‖W‖² is sklearn's Σ cross-entropy · C + ‖W‖² / 2 at C = 1 / (2 w N)
    theirs = LogisticRegression(C=1 / (2 * penalty * 90), max_iter=1000, tol=1e-8).fit(z[:, :5], y)
    assert own.numpy() == pytest.approx(theirs.predict_proba(z[:, :5]), abs=0.01)
