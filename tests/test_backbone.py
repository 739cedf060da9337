"""The backbone: equal to timm's own features, frozen, fingerprinted; weights that do not fit are refused."""

from __future__ import annotations

import hashlib
import pickle
from importlib.resources import files

import pytest
import timm
import torch
from safetensors.torch import save_file

from cil.backbone import EMBEDDED, Backbone, embedded_card, fingerprint, load_backbone, read_tensors
from cil.config import BackboneConfig
from cil.errors import BackboneError
from cil.tuning import Tuner, WeightTuner
from cil.utils.randomness import isolated

SMALL = {"depth": 2, "num_classes": 0}
VARIANTS = {
    "class token": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8}),
    "average pooling": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "global_pool": "avg"}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28}),
    "DINOv2": ("vit_small_patch14_dinov2", {"img_size": 28}),
    "norm_pre (CLIP)": ("vit_base_patch32_clip_224", {"img_size": 64}),
    "attention pooling (SigLIP)": ("vit_base_patch16_siglip_224", {"img_size": 32}),
    "distilled (DeiT)": ("deit_tiny_distilled_patch16_224", {"img_size": 32, "patch_size": 8}),
    "no class token": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "class_token": False, "global_pool": "avg"},
    ),
    "any size": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "dynamic_img_size": True}),
}


def make(name, options) -> Backbone:
    with isolated(0):
        model = timm.create_model(name, **{**SMALL, **options})
        for p in model.parameters():  # class tokens and scales start at zero or one, and would hide a wrong order
            torch.nn.init.trunc_normal_(p, std=0.05) if p.ndim < 2 or p.shape[0] == 1 else None
    return Backbone(model, name, timm.data.resolve_data_config({"img_size": options["img_size"]}, model=model))


def images_for(backbone) -> torch.Tensor:
    return torch.randn(3, 3, *backbone.data_config["input_size"][1:], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_timm_when_nothing_rides_along(variant):
    backbone = make(*VARIANTS[variant])
    images = images_for(backbone)
    with torch.inference_mode():
        expected = backbone.model(images)  # num_classes=0: timm's own features
        torch.testing.assert_close(backbone(images), expected, atol=0, rtol=0)
        # the loop that consults a tuner must do the same when the tuner does nothing
        torch.testing.assert_close(backbone(images, Tuner()), expected, atol=1e-6, rtol=1e-5)
    assert expected.shape == (3, backbone.feature_dim)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("swin_tiny_patch4_window7_224", {}, marks=pytest.mark.slow),
        ("eva02_tiny_patch14_224", {"depth": 2, "use_post_norm": True}),
        ("resnet18", {}),
        ("vit_tiny_patch16_224", {"block_fn": timm.models.vision_transformer.ResPostBlock, "depth": 2}),
    ],
    ids=["swin", "eva with post-norm blocks", "resnet", "post-norm blocks"],
)
def test_other_families_give_features_and_refuse_token_tuners(name, options):
    with isolated(0):
        model = timm.create_model(name, num_classes=0, **options)
    backbone = Backbone(model, name, timm.data.resolve_data_config({}, model=model))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = backbone(images)
        torch.testing.assert_close(features, model(images))
        torch.testing.assert_close(backbone(images, WeightTuner(backbone)), features)
        with pytest.raises(BackboneError, match="token-level tuners"):
            backbone(images, Tuner())
    assert features.shape == (2, backbone.feature_dim)


def test_embedded_default_is_the_shipped_file():
    card = embedded_card()
    raw = (files("cil") / "weights" / card["weights"]["file"]).read_bytes()
    assert hashlib.sha256(raw).hexdigest() == card["weights"]["sha256"]
    backbone = load_backbone()
    assert backbone.name == EMBEDDED and backbone.feature_dim == 192
    assert sum(p.numel() for p in backbone.parameters()) == card["parameters"]
    assert not any(p.requires_grad for p in backbone.parameters())
    backbone.train()
    assert not any(m.training for m in backbone.modules())


def test_passes_are_counted(backbone):
    start = backbone.passes
    with torch.inference_mode():
        backbone(torch.zeros(5, 3, 32, 32))
        backbone(torch.zeros(2, 3, 32, 32), Tuner())
    assert backbone.passes - start == 7


def test_loading_leaves_global_randomness_alone():
    before = torch.get_rng_state()
    load_backbone(BackboneConfig(name="vit_tiny_patch16_224", weights="random", options={"depth": 1}))
    assert torch.equal(before, torch.get_rng_state())


def test_random_weights_are_the_same_every_time():
    config = BackboneConfig(name="vit_tiny_patch16_224", weights="random", options={"depth": 1, "img_size": 64})
    one, two = load_backbone(config), load_backbone(config)
    assert one.data_config["input_size"] == (3, 64, 64)  # not the pretrained model's 224
    assert one.fingerprint == two.fingerprint and one.name == "vit_tiny_patch16_224.random"


@pytest.fixture
def donor():
    with isolated(3):
        return timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)


def config_for(path):
    return BackboneConfig(name="vit_tiny_patch16_224", weights=path, options={"depth": 1, "img_size": 32})


def test_local_weights_from_safetensors_and_torch_files(donor, tmp_path):
    state = donor.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
    loaded = [load_backbone(config_for(tmp_path / f"w.{kind}")) for kind in ("safetensors", "pth")]
    donor.reset_classifier(0)
    assert {b.fingerprint for b in loaded} == {fingerprint(donor)}
    assert loaded[0].name == "vit_tiny_patch16_224.w"


def test_fingerprint_sees_one_changed_number(donor):
    before = fingerprint(donor)
    with torch.no_grad():
        donor.blocks[0].mlp.fc1.bias[3] += 1e-6
    assert fingerprint(donor) != before


def test_weights_of_another_architecture_are_refused(tmp_path):
    with isolated(0):
        other = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(
        BackboneError, match=r"other\.safetensors fits another architecture: 0 weights missing, 12 unknown.*blocks\.1"
    ):
        load_backbone(config_for(tmp_path / "other.safetensors"))
    with isolated(0):
        wide = timm.create_model("vit_small_patch16_224", depth=1, img_size=32)
    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(BackboneError, match=r"of another shape; first: .* expected"):
        load_backbone(config_for(tmp_path / "wide.safetensors"))


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_pickles_are_refused_and_not_run(tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "evil.pkl"):
        with pytest.raises(BackboneError, match="pickles are never loaded"):
            read_tensors(tmp_path / name)
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "none.safetensors", "no such file"),
        (b"junk", "junk.safetensors", "pickles are never loaded"),
        (b"junk", "junk.pt", "pickles are never loaded"),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path, content, name, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError, match=message):
        load_backbone(config_for(tmp_path / name))


def test_unknown_names_hint_at_the_nearest():
    with pytest.raises(BackboneError, match="did you mean 'vit_base_patch16_224"):
        load_backbone("vit_base_patch16_244.augreg_in21k")


def test_untagged_names_are_recorded_with_their_tag(tmp_path, monkeypatch):
    """timm changed what an untagged name means; results must say which weights it was."""
    original = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **kw: original(name, pretrained=False, **kw)
    )
    assert (
        load_backbone(BackboneConfig(name="vit_tiny_patch16_224", options={"depth": 1})).name
        == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    )


def test_weight_tuner_is_a_second_set_of_weights():
    backbone = load_backbone()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tuner = WeightTuner(backbone)
    frozen = backbone(images)
    torch.testing.assert_close(backbone(images, tuner), frozen)
    backbone(images, tuner).sum().backward()
    names = {n.replace("copies.", "").replace("/", ".") for n, p in tuner.named_parameters() if p.grad is not None}
    assert names == {n for n, _ in backbone.model.named_parameters()}
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(0.01)
    assert not torch.allclose(backbone(images, tuner), frozen)
    torch.testing.assert_close(backbone(images), frozen, atol=0, rtol=0)
    biases = WeightTuner(backbone, lambda name: name.endswith("bias"))
    assert sum(p.numel() for p in biases.parameters()) == sum(
        p.numel() for n, p in backbone.model.named_parameters() if n.endswith("bias")
    )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_explicit_attention_is_the_same_function(precision):
    fused = load_backbone()
    explicit = load_backbone(BackboneConfig(attention="explicit"))
    blocks = [block.attn.fused_attn for block in explicit.model.blocks]
    assert blocks and not any(blocks) and all(block.attn.fused_attn for block in fused.model.blocks)
    assert explicit.fingerprint == fused.fingerprint
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
        a, b = fused(images).float(), explicit(images).float()
    assert (a - b).norm() / a.norm() < (1e-5 if precision == torch.float32 else 0.05)


def test_explicit_attention_where_there_is_none():
    with pytest.raises(BackboneError, match=r"backbone\.attention: resnet18 has no attention"):
        load_backbone(BackboneConfig(name="resnet18", weights="random", attention="explicit"))
