"""Vision-language backbones: open_clip's own numbers, names of classes seen, no text tower where none is needed."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from marks import slow_beyond
from PIL import Image
from safetensors.torch import save_file

from cil import results
from cil.backbone import hub, load_backbone
from cil.backbone.clip_library import Tower
from cil.config import BackboneConfig, Config
from cil.data.transforms import Transforms
from cil.errors import BackboneError, CilError, ConfigError
from cil.export import export, load
from cil.learners import registry
from cil.learners.registry import build_learner
from cil.learners.zero_shot import ZeroShot
from cil.prediction import open_run
from cil.prompts import TEMPLATES, Descriptors, described, phrase, sentences
from cil.runner import run
from cil.testing.drawn_text import DrawnTexts
from cil.testing.setting import NAMES, context, probe_images, stream
from cil.testing.setting import backbone as drawn
from cil.tuning import build_tuner
from cil.utils.randomness import isolated

open_clip = pytest.importorskip("open_clip")
saving = importlib.import_module("open_clip.push_to_hf_hub")  # in the package a function has its name

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TINY = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
CLASSES = ("tabby_cat", "dog", "great white shark")
TRUNK = {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"}
SIGLIP = {
    "embed_dim": 96,
    "init_logit_bias": -10.0,
    "custom_text": True,
    "vision_cfg": TRUNK,
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 100,
        "hf_tokenizer_name": "nobody/has-this",
        "width": 32,
        "heads": 2,
        "layers": 1,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
    },
}


def reference(kind=open_clip.CLIP, **changes):
    with isolated(0):
        arguments = {key: value for key, value in {**TINY, **changes}.items() if key != "custom_text"}
        return kind(**arguments).eval()


def tiny(**changes):
    section = {"name": "open_clip/ViT-B-16", "weights": "random", "options": TINY, **changes}
    return load_backbone(BackboneConfig(**section))


def put(model, folder, config):
    """What open_clip saves of a model."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    open_clip.model.set_model_preprocess_cfg(model, vars(open_clip.transform.PreprocessCfg()))
    saving.save_config_for_hf(model, folder / "open_clip_config.json", config)
    return folder


def own_tokenizer(folder):
    """A tokenizer of whole words in the files of Hugging Face."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "</s>", "a", "photo", "of", "cat", "dog", "tabby", "great", "white", "shark", "."]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)


def images(side, count=3):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def zero_shot(backbone, names=CLASSES, **parameters):
    """A learner that knows the names."""
    learner = build_learner({"name": "zero_shot", **parameters}, backbone)
    learner.text.grow(len(names))
    for label, name in enumerate(names):
        learner.text.set(label, learner.prototype(name, context()))
    return learner


# --- open_clip's own numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
def test_towers_and_logits_are_those_of_open_clip(quick, tmp_path):
    model = reference(quick_gelu=quick)
    tokenizer, texts = open_clip.SimpleTokenizer(), [f"a photo of a {name}." for name in CLASSES]
    for section in (
        {"options": {**TINY, "quick_gelu": quick}},
        {"weights": put(model, tmp_path / "saved", {**TINY, "quick_gelu": quick})},
    ):
        backbone = tiny(**section)
        x = images(32)
        with torch.no_grad():
            features = backbone(x)
            assert (features @ backbone.text.projection - model.encode_image(x)).abs().max() < 1e-5
            assert (backbone.text.encode(texts) - model.encode_text(tokenizer(texts))).abs().max() < 1e-5
            learner = zero_shot(backbone, phrases="raw")
            theirs = model.get_logits(x, tokenizer(texts))[0]
            assert (learner.logits(features) - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_the_activation_shows():
    x = images(32)
    with torch.no_grad():
        assert (tiny()(x) - tiny(options={**TINY, "quick_gelu": True})(x)).abs().max() > 1e-4


@pytest.mark.parametrize("templates", slow_beyond(["cifar18"], ["cifar18", "photo7", "imagenet80"]))
def test_prototypes_are_those_of_open_clips_classifier(templates):
    model, learner = reference(), zero_shot(tiny(), templates=templates)
    theirs = open_clip.build_zero_shot_classifier(
        model, open_clip.SimpleTokenizer(), [phrase(name) for name in CLASSES], learner.config.templates, 1
    )
    assert (learner.text.prototypes.T - theirs).abs().max() < 1e-6


def test_the_7_templates_are_those_of_open_clip():
    assert TEMPLATES["photo7"] == tuple(one("{}") for one in open_clip.SIMPLE_IMAGENET_TEMPLATES)
    assert len(set(TEMPLATES["cifar18"])) == 18


def test_siglip_with_its_pooling_bias_and_tokenizer(tmp_path):
    model = reference(open_clip.CustomTextCLIP, **SIGLIP)
    folder = put(model, tmp_path / "siglip", SIGLIP)
    with pytest.raises(BackboneError, match=r"holds no tokenizer.json; copy tokenizer.json and tokenizer_config.json"):
        load_backbone(BackboneConfig(name="open_clip/own", weights=folder)).text.encode(["a cat"])
    own_tokenizer(folder)
    backbone = load_backbone(BackboneConfig(name="open_clip/own", weights=folder))
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    texts = [f"a photo of a {phrase(name)}." for name in CLASSES]
    x = images(160, 2)
    with torch.no_grad():
        features = backbone(x)
        assert torch.equal(features, model.encode_image(x)) and backbone.text.projection is None
        theirs = model.get_logits(x, tokenizer(texts))[0]
        mine = zero_shot(backbone).logits(features)
    assert backbone.text.bias == -10 and (mine - theirs).abs().max() < 1e-4
    assert backbone.name == "open_clip/own.siglip"


def test_a_linear_projection_behind_a_timm_model(tmp_path):
    trunk = {**TRUNK, "timm_proj": "linear", "timm_proj_bias": True}
    parts = {"embed_dim": 16, "vision_cfg": trunk, "text_cfg": TEXT, "custom_text": True}
    model = reference(open_clip.CustomTextCLIP, **parts)
    saved = put(model, tmp_path / "saved", parts)
    backbone = load_backbone(BackboneConfig(name="open_clip/own", weights=saved))
    x = images(160, 2)
    with torch.no_grad():
        joint = zero_shot(backbone).text.project(backbone(x))
        assert (joint - model.encode_image(x)).abs().max() < 1e-5 and bool(backbone.text.offset.any())


def test_tags_decide_activation_and_crop(tmp_path):
    model = reference(quick_gelu=True)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    x = images(32)
    for tag, same in (("openai", True), ("laion400m_e32", False)):
        section = {"name": f"open_clip/ViT-B-16.{tag}", "weights": tmp_path / "w.safetensors"}
        backbone = tiny(**section)
        with torch.no_grad():
            off = (backbone(x) @ backbone.text.projection - model.encode_image(x)).abs().max()
        assert (off < 1e-5) == same and backbone.name == section["name"]
        assert backbone.data_config["crop_pct"] == 1.0 and backbone.data_config["crop_mode"] == "center"


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_images_are_prepared_as_by_open_clip(tmp_path, mode):
    model = reference()
    folder = put(model, tmp_path / "saved", TINY)
    facts = json.loads((folder / "open_clip_config.json").read_text())
    facts["preprocess_cfg"]["resize_mode"] = mode
    (folder / "open_clip_config.json").write_text(json.dumps(facts))
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (50, 71, 3)).astype(np.uint8))
    mine = Transforms(tiny(weights=folder).data_config)
    pixels = torch.from_numpy(np.asarray(mine.evaluate(picture)))[None]
    assert (mine.normalize(pixels)[0] - theirs(picture)).abs().max() < 1e-5


def test_joint_features_are_projected_ones():
    x = images(32)
    pooled, joint = tiny(), tiny(features="joint")
    with torch.no_grad():
        assert (joint(x) - pooled(x) @ pooled.text.projection).abs().max() < 1e-5
        assert (zero_shot(joint).logits(joint(x)) - zero_shot(pooled).logits(pooled(x))).abs().max() < 1e-4
    assert joint.feature_dim == 24 and joint.fingerprint != pooled.fingerprint
    with pytest.raises(BackboneError, match="has no text side"):
        load_backbone(BackboneConfig(features="joint"))


@pytest.mark.parametrize("tuner", slow_beyond(["adapter"], ["adapter", "lora", "vpt_deep", "ssf", "bitfit"]))
def test_tuners_fit_and_their_gradients_reach_them_alone(tuner):
    backbone = tiny(features="joint" if tuner == "ssf" else "pooled")
    built = build_tuner(tuner, backbone)
    built.reset(torch.Generator().manual_seed(0))
    backbone(images(32), built).square().sum().backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in built.parameters())
    assert all(p.grad is None for p in backbone.parameters())


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "open_clip/RN50", "weights": "random"}, r"because of vision_cfg.layers \(a ResNet\)"),
        ({"name": "open_clip/coca_ViT-B-32", "weights": "random"}, r"because of multimodal_cfg \(CoCa\)"),
        ({"name": "open_clip/ViT-L-14-CLIPA", "weights": "random"}, "because of vision_cfg.no_ln_pre: True"),
        ({"name": "open_clip/roberta-ViT-B-32", "weights": "random"}, "because of text_cfg.hf_model_name"),
        ({"name": "open_clip/ViT-B16.openai"}, "knows no architecture 'ViT-B16' .did you mean 'ViT-B-16'"),
        ({"name": "open_clip/ViT-B-16.laion"}, "knows no weights 'laion' of ViT-B-16; known: openai, laion400m_e31"),
        ({"name": "open_clip/ViT-B-16"}, "names no weights; give open_clip/<architecture>.<tag>, or set"),
        (
            {"name": "open_clip/ViT-B-16", "weights": "random", "options": {"img_size": 9}},
            "no such option; allowed: emb",
        ),
    ],
)
def test_other_models_are_refused_in_one_line(section, said):
    with pytest.raises(BackboneError, match=said) as error:
        load_backbone(BackboneConfig(**section))
    assert "\n" not in str(error.value)


def test_weights_of_other_kinds_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(BackboneError, match="holds no logit_scale"):
        tiny(weights=tmp_path / "other.safetensors")
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:  # as torch.jit.save lays it out
        archive.writestr("program/code/__torch__.py", "")
    with pytest.raises(BackboneError, match=r"is a TorchScript program, .* use open_clip_model.safetensors"):
        tiny(weights=tmp_path / "program.pt")
    state = reference().state_dict()
    save_file({k: v for k, v in state.items() if k != "visual.ln_post.bias"}, tmp_path / "part.safetensors")
    with pytest.raises(BackboneError, match="1 weights missing"):
        tiny(weights=tmp_path / "part.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match=r"holds no open_clip_model.safetensors; put the weights there"):
        tiny(weights=tmp_path / "empty")


def test_without_a_network_the_answer_is_quick_and_names_the_file(monkeypatch):
    asked = []

    def unreachable(url, timeout):
        asked.append(timeout)
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_: pytest.fail("asked again, with the client's long waits"))
    with pytest.raises(BackboneError) as error:
        load_backbone("open_clip/ViT-B-16.laion400m_e32")
    assert str(error.value) == (
        "backbone.name: the weights of open_clip/ViT-B-16.laion400m_e32, open_clip_model.safetensors of "
        "https://huggingface.co/timm/vit_base_patch16_clip_224.laion400m_e32, could not be downloaded "
        "(ConnectionError: no route); without a network connection, get that file elsewhere, and set "
        "backbone.weights=FILE"
    )
    assert sum(asked) < 5


def test_without_open_clip_the_answer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(BackboneError, match=r"pip install 'cil\[clip\]'"):
        load_backbone("open_clip/ViT-B-16.openai")


# --- names ------------------------------------------------------------------------------------------------------------


def test_no_name_is_encoded_before_its_class_is_seen(monkeypatch):
    asked = []
    vit = drawn()
    encode = DrawnTexts.__call__
    monkeypatch.setattr(DrawnTexts, "__call__", lambda self, texts, at: asked.extend(texts) or encode(self, texts, at))
    learner, tasks = ZeroShot(ZeroShot.Config(), vit), stream(vit)
    seen = 0
    for task in tasks.tasks:
        ctx = context(task.index)
        learner.begin(task, ctx)
        learner.learn(task, ctx)
        seen += len(task.classes)
        assert asked == [f"a photo of a {name}." for name in NAMES[:seen]]  # each once, none early


def test_a_name_matters_from_its_stage_on():
    vit = drawn()
    right, wrong = (zero_shot(vit, names) for names in (NAMES, (NAMES[1], NAMES[0], *NAMES[2:])))
    with torch.inference_mode():
        one, two = (each.logits(vit(probe_images())) for each in (right, wrong))
    assert torch.equal(one[:, [1, 0, *range(2, 8)]], two) and not torch.equal(one, two)


def test_sentences():
    assert sentences("great_white_shark", TEMPLATES["bad"], "raw") == ["a bad photo of a great_white_shark."]
    assert described("hen", ["two legs", "a comb", "used for eggs", "often brown", "can run"]) == [
        "hen, which has two legs",
        "hen, which is a comb",
        "hen, which is used for eggs",
        "hen, which often brown",
        "hen, which can run",
    ]
    for wrong in ("a photo", ["{} and {}"], ["{x}"], [], "no_such_set"):
        with pytest.raises(ConfigError):
            build_learner({"name": "zero_shot", "templates": wrong}, drawn())


def test_descriptors_are_those_of_classes_asked_for(tmp_path):
    file = tmp_path / "about.yaml"
    file.write_text("ant: [six legs, a thin waist]\nbee: [wings]\nhen: []\n", encoding="utf-8")
    asked = Descriptors(file=file)
    assert asked.of(["bee"]) == [["wings"]]
    for name, said in (
        ("cat", "has no entry for the class 'cat'"),
        ("hen", "has no list of texts for the class 'hen'"),
    ):
        with pytest.raises(ConfigError, match=said):
            asked.of([name])
    vit = drawn()
    learner = zero_shot(vit, ("ant", "bee"), descriptors=str(file))
    e = F.normalize(vit.text.encode(["ant, which has six legs", "ant, which is a thin waist"]), dim=1)
    assert torch.equal(learner.text.prototypes[0], e.mean(0)) and learner.text.prototypes[0].norm() < 0.99999
    unit = zero_shot(vit, ("ant", "bee"), descriptors=str(file), renormalise=True).text.prototypes[0]
    assert torch.equal(unit, F.normalize(e.mean(0), dim=0))
    assert learner.config.descriptors.sha256 == asked.sha256
    file.write_text("ant: [eight legs]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="has changed since the run began"):
        asked.of(["ant"])
    with pytest.raises(ConfigError, match="cannot be read"):
        build_learner({"name": "zero_shot", "descriptors": str(tmp_path / "none.yaml")}, vit)


def test_texts_that_are_too_long_are_cut_with_a_warning(caplog):
    side = tiny().text
    with caplog.at_level(logging.WARNING):
        side.encode(["a cat"])
        assert not caplog.records
        side.encode(["a cat", "cat " * 80])
    assert "1 texts are longer than the 77 tokens" in caplog.text


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(picture_folder, tmp_path):
    """A run of zero_shot and ncm on a folder that open_clip saved."""
    model = put(reference(), tmp_path / "clip", TINY)
    words = tmp_path / "words.yaml"
    words.write_text("ant: tabby_cat\nbee: dog\ncat: great white shark\n", encoding="utf-8")
    return {
        "name": "clip",
        "data": {"dataset": "folder", "root": str(picture_folder()), "class_names": str(words)},
        "stream": {"increment": 2},
        "backbone": {"name": "open_clip/ViT-B-16", "weights": str(model)},
        "learners": [{"name": "zero_shot", "templates": "bad"}, "ncm"],
        "orders": ["natural"],
    }


def test_a_run_records_its_texts_and_needs_no_text_tower_afterwards(settings, tmp_path, monkeypatch):
    folder, other = run(Config(**settings), tmp_path / "results")
    header = results.read_header(folder)
    assert header["class_names"] == list(CLASSES)
    assert header["config"]["learners"][0]["templates"] == ["a bad photo of a {}."]
    assert header["backbone"]["name"] == "open_clip/ViT-B-16.clip" and len(header["text"]["sha256"]) == 64
    assert header["backbone"]["open_clip"]["model"]["vision_cfg"] == VISION
    assert "text" not in results.read_header(other)
    x = images(32)
    expected = open_run(folder)(x)[0]
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setattr(Tower, "__init__", lambda *_: pytest.fail("the text tower was built"))
    assert torch.equal(open_run(folder)(x)[0], expected)
    exported = export(folder, tmp_path / "exported")
    assert (load(exported)(x)[0] - expected).abs().max() < 1e-4
    assert load(export(other, tmp_path / "ncm")).names == CLASSES
    facts = json.loads((exported / "model.json").read_text())
    assert facts["backbone"]["licence"]["id"] == "unknown"  # and not that of timm's weights of this architecture


def test_texts_are_encoded_once_per_machine(settings, tmp_path, monkeypatch):
    asked = []
    encode = Tower.__call__
    monkeypatch.setattr(
        Tower, "__call__", lambda self, texts, device: asked.append(list(texts)) or encode(self, texts, device)
    )
    first, _ = run(Config(**settings), tmp_path / "one")
    assert asked == [[f"a bad photo of a {phrase(name)}."] for name in CLASSES]
    second, _ = run(Config(**settings), tmp_path / "two")
    assert len(asked) == 3  # read from the feature store
    x = images(32)
    assert torch.equal(open_run(first)(x)[0], open_run(second)(x)[0])
    settings["learners"] = [{"name": "zero_shot", "templates": "good"}]
    run(Config(**settings), tmp_path / "three")
    assert len(asked) == 6


def test_joint_features_survive_export(settings, tmp_path):
    settings["backbone"]["features"] = "joint"
    settings["learners"] = ["ncm"]
    [folder] = run(Config(**settings), tmp_path / "results")
    exported = load(export(folder, tmp_path / "exported"))
    assert exported.backbone.feature_dim == 24
    assert (exported(images(32))[0] - open_run(folder)(images(32))[0]).abs().max() < 1e-5


LEARNERS = {
    "zero_shot": {},
    "clip_gda": {"space": "joint", "text_prior": 2.0, "published": True},
    "tip_adapter": {"keys": "images"},
    "rapf": {"epochs": 1, "milestones": [1]},
    "engine": {"epochs": 1},
    "proof": {"epochs": 1},
}
"""Every learner on texts, at a setting that trains little."""
OPTIONS = {
    "slda": {"text": {"space": "joint", "prior": 2.0}},
    "ranpac": {"projection": 40, "text": {"templates": "bad"}},
}
"""Learners to which texts are an option."""


@pytest.mark.parametrize(
    ("name", "form"),
    slow_beyond(
        [(n, "safetensors") for n in ("zero_shot", "clip_gda")],
        [*((n, "safetensors") for n in (*LEARNERS, *OPTIONS)), ("clip_gda", "onnx"), ("rapf", "torch.export")],
    ),
)
def test_learners_on_texts_give_their_logits_in_exported_models(settings, tmp_path, monkeypatch, name, form):
    settings["learners"] = [{"name": name, **(LEARNERS | OPTIONS)[name]}]
    [folder] = run(Config(**settings), tmp_path / "results")
    assert results.read_header(folder)["stores_images"] == (name in ("tip_adapter", "proof"))
    monkeypatch.setattr(Tower, "__init__", lambda *_: pytest.fail("the text tower was built"))
    exported = load(export(folder, tmp_path / "exported", form))
    expected = open_run(folder)(images(32))[0]
    assert (exported(images(32))[0] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_every_learner_on_texts_is_exported():
    assert LEARNERS.keys() == {name for name in registry.BUILTIN if registry.resolve(name).needs_text}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ant: a\n", "has no words for 2 of 3 classes, the first is 'bee'; add a line bee: WORDS for each"),
        ("ant: 3\nbee: b\ncat: c\n", "the words for 'ant' are 3; expected a text"),
        ("ant: a\nbee: a\ncat: c\n", r"class_names: 'a' is the name of the classes \[0, 1\]"),
    ],
)
def test_a_file_of_names_is_checked(settings, tmp_path, text, said):
    (tmp_path / "words.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(CilError, match=said):
        run(Config(**settings), tmp_path / "results")


def test_a_backbone_without_texts_is_refused_before_an_image_is_read(settings, tmp_path):
    settings["backbone"] = {"name": "test_vit", "weights": "random"}
    with pytest.raises(BackboneError, match=r"learner zero_shot: this learner compares .* test_vit.random has no text"):
        run(Config(**settings), tmp_path / "results")
