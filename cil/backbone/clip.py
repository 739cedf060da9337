"""CLIP and its kin: open_clip's models as a timm image tower and a text side.

The image side is always a timm model, so tuners, layers, the feature store and all learners work on it as on any other
backbone. open_clip's own vision transformers are converted with timm's own filter; image towers that are timm models
already are taken out of their wrapper. An image's features are the pooled ones (width F); the joint space of images and
texts (width d) is one matrix further, which belongs to the text side.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from cil.backbone.clip_library import ARGUMENTS, CONFIG, PREFIX, Tower, architecture, random_state, tagged
from cil.backbone.hub import fetched
from cil.backbone.text import TextSide
from cil.backbone.weights import misfit, one_line, read_tensors
from cil.config import BackboneConfig
from cil.errors import BackboneError
from cil.utils.paths import expand

OWN_VIT = "vit_base_patch16_clip_224"
"""timm's architecture with the blocks of open_clip's own vision transformers; sizes are arguments."""
OWN_KEYS = ("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio")
"""Keys of ``vision_cfg`` of open_clip's own vision transformers that timm's architecture has."""
TIMM_KEYS = ("image_size", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias")
"""Keys of ``vision_cfg`` of image towers that are timm models; dropout has no effect here."""
PREPROCESS = {
    "mean": list(OPENAI_CLIP_MEAN),
    "std": list(OPENAI_CLIP_STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
"""open_clip's preprocessing of models that do not state their own."""
CROPS = {"shortest": "center", "squash": "squash", "longest": "border"}
"""Ways of resizing, as open_clip and as timm call them."""
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of the weights in a folder, in order of preference, as open_clip writes them."""


@dataclass(frozen=True)
class Recipe:
    """All that building a model needs beside its weights, as plain values that results record.

    Attributes:
        model: open_clip's model configuration, with the activation that the weights were trained with.
        preprocess: Mean, std, interpolation and resize_mode of the images.
        hub: Repository of the Hub and names of the weights in it, in order of preference; empty for local weights.
    """

    model: dict[str, Any]
    preprocess: dict[str, Any]
    hub: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Loaded:
    """A vision-language model in its two parts.

    Attributes:
        model: The image tower, a timm model without a classifier.
        name: Name with the tag of the weights.
        data_config: As :class:`~cil.backbone.Backbone` takes it.
        text: The text side.
        recipe: What results record, so that the image tower can be built again without open_clip.
    """

    model: nn.Module
    name: str
    data_config: dict[str, Any]
    text: TextSide
    recipe: dict[str, Any]


def load_clip(config: BackboneConfig, recorded: Mapping[str, Any] | None = None) -> Loaded:
    """Load the model that a name with the prefix ``open_clip/`` and the keys beside it describe.

    Args:
        config: ``name`` is ``open_clip/<architecture>.<tag>``. ``weights`` may be a file, a folder that open_clip
            wrote, or ``random``; then a tag is not needed, and if there is one, it decides activation and crop.
        recorded: The recipe that a run recorded; with it, open_clip itself is not needed.

    Raises:
        BackboneError: open_clip is not installed, the architecture or tag is unknown or of a kind that has no image
            tower in timm, or the weights do not fit or cannot be read or fetched.
    """
    source = expand(config.weights) if isinstance(config.weights, Path) else None
    kind, _, tag = config.name.removeprefix(PREFIX).partition(".")
    if config.weights is None and not tag:
        raise BackboneError(
            f"backbone.name: {config.name} names no weights; give {PREFIX}<architecture>.<tag>, or set "
            "backbone.weights=FILE, FOLDER or random"
        )
    recipe = Recipe(**recorded) if recorded is not None else _recipe(config, kind, tag, source)
    _require_supported(config.name, recipe.model)
    state = partial(_state, config, source, recipe)
    tensors = state()
    model, projection, offset = _image_tower(recipe.model, tensors, str(source or config.name))
    if config.features == "joint" and projection is not None:
        end_in_projection(model, projection.T, offset)
        projection = offset = None
    text = TextSide(
        int(recipe.model["embed_dim"]),
        float(tensors["logit_scale"].exp()),
        float(tensors.get("logit_bias", torch.zeros(()))),
        projection,
        offset,
        lambda: Tower(recipe.model, state(), source if source is not None and source.is_dir() else None),
    )
    place = "random" if source is None else source.name if source.is_dir() else source.stem
    ending = "random" if config.weights == "random" else tag or place
    return Loaded(model.eval(), f"{PREFIX}{kind}.{ending}", _data_config(recipe), text, asdict(recipe))


def end_in_projection(model: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    """Make a timm model's pooled features those of the joint space, by a linear layer after pooling.

    Args:
        model: The model; timm applies its ``fc_norm`` last.
        weight: float32 [d, F].
        bias: float32 [d], or None.

    Raises:
        BackboneError: The model has another layer there, so its features cannot be replaced.
    """
    if not isinstance(getattr(model, "fc_norm", None), nn.Identity):
        raise BackboneError("backbone.features: joint does not fit this image tower; use pooled")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    model.fc_norm = layer
    model.head_hidden_size = weight.shape[0]  # type: ignore[assignment]  # timm's, and no tensor


def _recipe(config: BackboneConfig, kind: str, tag: str, source: Path | None) -> Recipe:
    """What a configuration describes."""
    hub: list[str] = []
    preprocess = dict(PREPROCESS)
    file = source / CONFIG if source is not None and source.is_dir() else None
    if file is not None and file.is_file():
        try:
            described = json.loads(file.read_text(encoding="utf-8"))
            model, preprocess = dict(described["model_cfg"]), preprocess | described.get("preprocess_cfg", {})
        except (ValueError, KeyError, TypeError) as error:
            raise BackboneError(
                f"backbone.weights: {file} is not the description of a model ({type(error).__name__}: "
                f"{one_line(error)}); save the model with open_clip again"
            ) from None
    else:
        model = architecture(kind)
        if tag:
            facts = tagged(kind, tag)
            preprocess |= facts
            model["quick_gelu"] = bool(facts.get("quick_gelu", model.get("quick_gelu", False)))
            hub = _addresses(config.name, facts) if config.weights is None else []
    if unknown := [key for key in config.options if key not in ARGUMENTS]:
        raise BackboneError(
            f"backbone.options.{unknown[0]}: {config.name} has no such option; allowed: {', '.join(ARGUMENTS)}"
        )
    for key, value in config.options.items():
        model[key] = {**model[key], **value} if isinstance(value, Mapping) and key in model else value
    return Recipe(model, {key: preprocess[key] for key in PREPROCESS}, hub)


def _addresses(name: str, facts: Mapping[str, Any]) -> list[str]:
    """Repository of the Hub, and names of the weights in it: safetensors before others."""
    repository, _, file = str(facts.get("hf_hub") or "").rpartition("/")
    if not repository:
        raise BackboneError(
            f"backbone.name: the weights of {name} are not on the Hub; download {facts.get('url')}, and set "
            "backbone.weights=FILE"
        )
    names = [f"{file.rsplit('.', 1)[0]}.safetensors", file] if file and file != WEIGHTS[-1] else []
    return [repository, *dict.fromkeys([*names, *([] if names else (WEIGHTS[0], WEIGHTS[-1]))])]


def _require_supported(name: str, model: Mapping[str, Any]) -> None:
    """Refuse models whose image tower is no timm model with one pooled row of features, or that have no own text tower.

    Raises:
        BackboneError: Naming the key that is at fault.
    """
    try:
        vision, text = model["vision_cfg"], model["text_cfg"]
    except KeyError as error:
        raise BackboneError(f"backbone.name: {name} has no {error.args[0]}; it is no vision-language model") from None
    allowed = TIMM_KEYS if "timm_model_name" in vision else OWN_KEYS
    dropout = ("timm_drop", "timm_drop_path", "patch_dropout")
    other = [key for key, value in vision.items() if key not in (*allowed, *dropout) and value not in (None, False, 0)]
    faults = {
        "multimodal_cfg (CoCa)": "multimodal_cfg" in model,
        f"text_cfg.hf_model_name: {text.get('hf_model_name')}": bool(text.get("hf_model_name")),
        "vision_cfg.layers (a ResNet)": isinstance(vision.get("layers"), list | tuple),
        f"vision_cfg.timm_pool: {vision.get('timm_pool')}": str(vision.get("timm_pool")).endswith("_attn"),
        "vision_cfg.timm_proj: mlp": vision.get("timm_proj") == "mlp",
        **{f"vision_cfg.{key}: {vision[key]}": True for key in other},
    }
    if found := [fault for fault, there in faults.items() if there]:
        raise BackboneError(
            f"backbone.name: {name} is of a kind that cannot be used here, because of {found[0]}; use a vision "
            "transformer, such as ViT-B-16 or ViT-B-16-SigLIP"
        )


def _side(model: Mapping[str, Any]) -> int:
    size = model["vision_cfg"].get("image_size", 224)
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) > 1:
        raise BackboneError(f"backbone.name: the images are {size} pixels, and images are square here")
    return int(sides.pop())


def _data_config(recipe: Recipe) -> dict[str, Any]:
    """timm's data configuration; CLIP models were used without a border around the crop."""
    side, steps = _side(recipe.model), recipe.preprocess
    return {
        "input_size": (3, side, side),
        "mean": tuple(steps["mean"]),
        "std": tuple(steps["std"]),
        "interpolation": steps["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": CROPS[steps["resize_mode"]],
    }


def timm_arguments(model: Mapping[str, Any]) -> dict[str, Any]:
    """Name and arguments of the image tower for ``timm.create_model``, as plain values."""
    vision = model["vision_cfg"]
    if "timm_model_name" in vision:
        pool = vision.get("timm_pool", "avg")
        return {"name": vision["timm_model_name"], "options": {"global_pool": pool} if pool else {}}
    width = vision.get("width", 768)
    return {
        "name": OWN_VIT,
        "options": {
            "img_size": _side(model),
            "patch_size": vision.get("patch_size", 16),
            "embed_dim": width,
            "depth": vision.get("layers", 12),
            "num_heads": width // vision.get("head_width", 64),
            "mlp_ratio": vision.get("mlp_ratio", 4.0),
            "act_layer": "quick_gelu" if model.get("quick_gelu") else "gelu",
        },
    }


def _image_tower(
    model: Mapping[str, Any], state: Mapping[str, Tensor], source: str
) -> tuple[nn.Module, Tensor | None, Tensor | None]:
    """The timm model with its weights, and the projection [F, d] and offset [d] behind it."""
    arguments = timm_arguments(model)
    tower: Any = timm.create_model(arguments["name"], num_classes=0, **arguments["options"])
    if "timm_model_name" not in model["vision_cfg"]:
        own = checkpoint_filter_fn(dict(state), tower)
        weight, bias = own.pop("head.weight", None), None
        own.pop("head.bias", None)  # zeros, which timm's filter adds
    else:
        own = {k.removeprefix("visual.trunk."): v for k, v in state.items() if k.startswith("visual.trunk.")}
        classifier = tower.pretrained_cfg.get("classifier") or "head"
        weight, bias = (own.pop(f"{classifier}.{part}", None) for part in ("weight", "bias"))
        weight = state.get("visual.head.proj.weight", weight)
        bias = state.get("visual.head.proj.bias", bias)
    try:
        tower.load_state_dict(own)
    except RuntimeError as error:
        raise misfit(source, error) from None
    return tower, None if weight is None else weight.T.contiguous().float(), None if bias is None else bias.float()


def _state(config: BackboneConfig, source: Path | None, recipe: Recipe) -> dict[str, Tensor]:
    """All tensors of the model, float32."""
    if config.weights == "random":
        return random_state(recipe.model)
    if source is None:
        repository, *names = recipe.hub
        advice = "get that file elsewhere, and set backbone.weights=FILE"
        source = fetched(repository, names, f"the weights of {config.name}", advice)
    elif source.is_dir():
        there = [source / name for name in WEIGHTS if (source / name).is_file()] or sorted(source.glob("*.safetensors"))
        if not there:
            raise BackboneError(f"backbone.weights: {source} holds no {WEIGHTS[0]}; put the weights there")
        source = there[0]
    if _is_program(source):
        raise BackboneError(
            f"backbone.weights: {source} is a TorchScript program, as OpenAI published CLIP, and programs are not run; "
            f"use {WEIGHTS[0]} of the same model from the Hub, e.g. timm/vit_base_patch16_clip_224.openai"
        )
    state = {key: value.float() if value.is_floating_point() else value for key, value in read_tensors(source).items()}
    if "logit_scale" not in state:
        raise BackboneError(
            f"backbone.weights: {source} holds no logit_scale, so it is no vision-language model that open_clip saved"
        )
    return state


def _is_program(file: Path) -> bool:
    """Whether a file is a TorchScript archive, which is code."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())
