"""Loading a backbone by name, file or folder, and refusing those that no learner could use.

Models and weights are timm's: its own loader renames and resizes the weights of a local file as it does its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import parse_model_name
from torch import Tensor, nn

from cil.backbone.backbone import Backbone
from cil.backbone.clip import load_clip, timm_arguments
from cil.backbone.clip_library import PREFIX
from cil.backbone.hub import not_fetched
from cil.backbone.source_head import ADVICE, taken_off
from cil.backbone.weights import NUMPY, Copied, misfit, one_line, read_tensors, require_file, without_classifier
from cil.config import BackboneConfig
from cil.errors import BackboneError, nearest
from cil.utils.paths import expand
from cil.utils.randomness import isolated

EMBEDDED = "vit_tiny_patch8_64.tinyimagenet100"
"""Name of the backbone that ships with the package."""

ENTERED = ("vision_transformer", "vision_transformer_hybrid", "vitamin", "deit", "eva", "beit")
"""timm's modules of the families whose blocks token-level tuners can enter, see :mod:`cil.backbone.views` …"""
NOT_ENTERED = re.compile(r"_rpn_|_18x2_|_xp_|_(d|p|dp)wee_|_dlittle_|^eva02_enormous")
"""… and the names of their architectures with other blocks: post-norm, parallel or differential ones."""

REFUSED: dict[str, tuple[Any, str]] = {
    "in_chans": (3, "images have 3 channels"),
    "num_classes": (0, "the classifier belongs to the learner"),
    "features_only": (False, "a learner needs one row of features per image, not the maps of several layers"),
    "model_name": (None, "set backbone.name"),
    "pretrained": (None, "set backbone.weights"),
    "checkpoint_path": (None, "set backbone.weights"),
}
"""Arguments of ``timm.create_model`` that are no options: the one value that changes nothing, and the reason."""


def load_backbone(
    config: BackboneConfig | str = EMBEDDED,
    device: str | torch.device = "cpu",
    recorded: Mapping[str, Any] | None = None,
) -> Backbone:
    """Load the frozen backbone that a configuration names.

    Args:
        config: A timm name with its tag, ``hf-hub:<org>/<model>``, ``local-dir:<folder>``, the embedded default's name,
            ``open_clip/<architecture>.<tag>``, or the full configuration.
        device: Device of the backbone.
        recorded: What a run recorded about the backbone, see :func:`~cil.backbone.ensemble.backbone_facts`.

    Raises:
        BackboneError: The name is unknown, an option gives no usable model, or the weights are of another architecture,
            are a pickle or cannot be fetched.
    """
    config = BackboneConfig(name=config) if isinstance(config, str) else config
    if config.name.startswith(PREFIX):
        if config.source_head:
            raise BackboneError(f"backbone.source_head: {config.name} has texts in place of a classifier; {ADVICE}")
        with isolated(0):
            clip = load_clip(config, (recorded or {}).get("open_clip"))
        return Backbone(
            _with_attention(clip.model, config), clip.name, clip.data_config, clip.text, {"open_clip": clip.recipe}
        ).to(device)
    if config.features == "joint":
        raise BackboneError(
            f"backbone.features: joint is the space of images and texts, and {config.name} has no text side; use "
            f"pooled, or a backbone {PREFIX}<architecture>.<tag>"
        )
    for key, (neutral, reason) in REFUSED.items():
        if key == "num_classes" and config.source_head:
            continue
        if key in config.options and (neutral is None or config.options[key] != neutral):
            raise BackboneError(f"backbone.options.{key}: got {config.options[key]!r}; {reason}, so leave it out")
    # layer constructors draw global random numbers, even if the drawn weights are replaced by loaded ones
    with isolated(0):
        _require_known(config)
        model = _created(config)
        if fault := _unusable(model, config, config.options):
            raise _blamed(config, fault)
    data_config = _data_config(model, config, config.options)
    head = taken_off(model, config.name, data_config["input_size"]) if config.source_head else None
    name = _recorded_name(config, model)
    return Backbone(_with_attention(model, config), name, data_config, source_head=head).to(device)


def fits(name: str) -> str:
    """What fits a timm model, by its architecture and without building it, for lists.

    >>> fits("vit_base_patch16_dinov3.lvd1689m"), fits("convnext_tiny.in12k")
    ('features, LoRA, token-level tuners', 'features, LoRA')
    """
    architecture = name.split(".")[0]
    module = timm.models.model_entrypoint(architecture).__module__.rsplit(".", 1)[-1]
    entered = module in ENTERED and not NOT_ENTERED.search(architecture)
    return "features, LoRA, token-level tuners" if entered else "features, LoRA"


def embedded_card() -> dict[str, Any]:
    """Read the facts about the shipped backbone: architecture, input, training data, recipe, measured accuracy."""
    return json.loads((files("cil") / "weights" / f"{EMBEDDED}.json").read_text(encoding="utf-8"))


def without_source(section: Mapping[str, Any], backbone: Backbone) -> dict[str, Any]:
    """Name and options that build the backbone's architecture anywhere: without the folder or Hub that it came from.

    Args:
        section: The keys ``name``, ``options`` and ``source_head`` of the section ``backbone`` of a configuration.
        backbone: The backbone that it names.
    """
    name, options = section["name"], dict(section["options"])
    if section.get("source_head"):
        options.pop("num_classes", None)
    if "open_clip" in backbone.facts:
        return timm_arguments(backbone.facts["open_clip"]["model"])
    if ":" not in name:
        return {"name": name, "options": options}
    model: Any = backbone.model
    given = {key: value for key, value in model.pretrained_model_args.items() if key not in REFUSED}
    return {"name": model.pretrained_cfg["architecture"], "options": {**given, **options}}


def _with_attention(model: nn.Module, config: BackboneConfig) -> nn.Module:
    """The model with the implementation of attention that ``backbone.attention`` names.

    Raises:
        BackboneError: The model has no attention that can be computed in this way.
    """
    if config.attention == "explicit":
        switched = [module for module in model.modules() if hasattr(module, "fused_attn")]
        if not switched:
            raise BackboneError(f"backbone.attention: {config.name} has no attention that timm can compute explicitly")
        for module in switched:
            setattr(module, "fused_attn", False)  # noqa: B010  # mypy takes a plain assignment for that of a tensor
    return model


def _require_known(config: BackboneConfig) -> None:
    """Refuse a name that timm does not know.

    Raises:
        BackboneError: Naming the nearest name.
    """
    if config.name == EMBEDDED:
        return
    try:
        source, name = parse_model_name(config.name)
    except ValueError as error:
        raise BackboneError(f"backbone.name: {one_line(error)}") from None
    if source is not None:
        return
    architecture, _, tag = name.partition(".")
    tagged = not tag or name in timm.list_pretrained(f"{architecture}.*")
    if not timm.is_model(architecture) or not tagged:
        known = [EMBEDDED, *timm.list_models(), *timm.list_pretrained()]
        raise BackboneError(
            f"backbone.name: timm knows no {config.name!r}{nearest(config.name, known)}; see `cil list backbones`"
        )


def _data_config(model: nn.Module, config: BackboneConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """timm's data configuration, with the size that the model was built for instead of that of its pre-training."""
    size = {key: options[key] for key in ("img_size", "input_size") if key in options}
    if isinstance(size.get("img_size"), list | tuple):  # timm builds such a model, and its data configuration does not
        size = {"input_size": (3, *size["img_size"])}
    resolved = resolve_data_config(size, model=model)
    if config.name != EMBEDDED:
        return resolved
    shipped = embedded_card()["input"]
    return {
        "input_size": resolved["input_size"] if size else tuple(shipped["size"]),
        "mean": tuple(shipped["mean"]),
        "std": tuple(shipped["std"]),
        "interpolation": shipped["interpolation"],
        "crop_pct": shipped["crop_pct"],
        "crop_mode": "squash",
    }


def _recorded_name(config: BackboneConfig, model: nn.Module) -> str:
    """The name that results record: never one without a tag, or without the file of its weights."""
    source = ":" in config.name
    base = config.name if source or config.name == EMBEDDED else config.name.split(".")[0]
    if config.weights == "random":
        return f"{base}.random"
    if config.weights is not None:
        return f"{base}.{Path(config.weights).stem}"
    pretrained: Any = model.pretrained_cfg
    tag = pretrained.get("tag") if pretrained and not source else None  # a source's tag is that of its architecture
    return f"{base}.{tag}" if tag and "." not in config.name else config.name


def _created(config: BackboneConfig) -> nn.Module:
    """The model with its weights.

    Raises:
        BackboneError: It cannot be built or loaded; the message says whether the name, an option, the file or a
            download is at fault.
    """
    path = expand(config.weights) if config.weights not in (None, "random") else None
    numpy = path is not None and path.suffix.lower() in NUMPY
    state = None
    if path is not None and not numpy:
        state = read_tensors(path)
    elif path is not None:
        require_file(path)
    elif config.name == EMBEDDED and config.weights is None:
        state = load_file(str(files("cil") / "weights" / embedded_card()["weights"]["file"]))
    try:
        with Copied() as copied:
            model = _build(config, config.options, pretrained=config.weights is None, state=state)
            if numpy:
                model.load_pretrained(str(path))  # type: ignore[operator]
    except BackboneError:
        raise
    except Exception as error:  # hub, network, disk, weights and bad options all surface here, each with its own type
        if fetching := not_fetched(config, error):
            raise fetching from None
        if fault := _fault(config, config.options):
            raise _blamed(config, fault) from None
        if state is None and not numpy:
            raise BackboneError(
                f"backbone.name: {config.name} could not be loaded with its own weights "
                f"({type(error).__name__}: {one_line(error)}); set backbone.weights=FILE, or random for an untrained "
                "model"
            ) from None
        raise misfit(str(path or "the embedded file"), error) from None
    # timm loads leniently, because of the classifier; its own models without options are its own concern
    own = config.weights is None and (config.options or ":" in config.name or config.source_head)
    if (own or (numpy and config.source_head)) and (random := copied.still_random(model)):
        raise _blamed(
            config, f"its pre-trained weights lack {len(random)} that would stay random, the first is {random[0]}"
        )
    return model


def _build(
    config: BackboneConfig, options: Mapping[str, Any], *, pretrained: bool, state: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Build the model with timm; with ``state``, timm's loader renames and resizes it, and nothing may be left over."""
    arguments: dict[str, Any] = {"model_name": config.name, "num_classes": 0}
    if config.name == EMBEDDED:
        arguments |= embedded_card()["timm_create_model"]
    if config.source_head:
        arguments.pop("num_classes")  # as many as its weights have
    source, _, folder = config.name.partition(":")
    if source == "local-dir":
        arguments["model_name"] = f"{source}:{expand(folder)}"
    arguments |= options
    name = arguments.pop("model_name")
    if state is not None:
        classifier = getattr(timm.get_pretrained_cfg(name), "classifier", None) or ("head", "fc", "classifier")
        bare = without_classifier(state, classifier)
        if config.source_head and len(bare) == len(state):
            where = config.weights or f"the file of {config.name}"
            raise BackboneError(f"backbone.source_head: {where} holds no classifier; {ADVICE}")
        arguments["pretrained_cfg_overlay"] = {
            **options.get("pretrained_cfg_overlay", {}),
            "state_dict": dict(state) if config.source_head else bare,
            "classifier": None,  # with no classifier to discard, timm loads strictly
            "source": None,
        }
    model = timm.create_model(name, pretrained=pretrained or state is not None, **arguments)
    if state is not None:
        model.pretrained_cfg.pop("state_dict")  # type: ignore[operator, union-attr]
    return model.eval()


def _unusable(model: nn.Module, config: BackboneConfig, options: Mapping[str, Any]) -> str:
    """Why no learner can use a model, found with one blank image; an empty string if all can."""
    timm_model: Any = model
    try:
        channels, height, width = _data_config(model, config, options)["input_size"]
        if channels != 3:
            return f"it takes images of {channels} channels, and images have 3"
        if height != width:
            return f"it takes images of {height} × {width} pixels, and images are square here"
        with torch.inference_mode():
            blank = torch.zeros(1, channels, height, width)
            features = timm_model.forward_head(timm_model.forward_features(blank), pre_logits=True)
        expected = (1, int(timm_model.head_hidden_size))
    except Exception as error:  # whatever the model cannot do
        return f"it computes no features ({type(error).__name__}: {one_line(error)})"
    if not isinstance(features, Tensor) or tuple(features.shape) != expected:
        got = " × ".join(map(str, features.shape)) if isinstance(features, Tensor) else type(features).__name__
        return f"an image's features are {got} instead of one row of {expected[1]}"
    return "" if bool(features.isfinite().all()) else "its features of a blank image are not finite numbers"


def _fault(config: BackboneConfig, options: Mapping[str, Any]) -> str:
    """Why the untrained model with these options cannot be built or used; an empty string if it can."""
    try:
        model = _build(config, options, pretrained=False)
    except Exception as error:  # timm checks few options itself, so anything can surface
        return f"it cannot be built ({type(error).__name__}: {one_line(error)})"
    return _unusable(model, config, options)


def _blamed(config: BackboneConfig, fault: str) -> BackboneError:
    """The error for a model that cannot be used, naming the options that make the difference."""
    given = dict(config.options)
    untrained = bool(given) and bool(_fault(config, given))
    if not given or (untrained and _fault(config, {})):
        return BackboneError(f"backbone.name: {config.name} is no backbone: {fault}")
    alone = [key for key in given if not _fault(config, {k: v for k, v in given.items() if k != key})]
    names = alone if untrained and alone else list(given)
    shown = ", ".join(f"backbone.options.{key}: got {given[key]!r}" for key in names)
    return BackboneError(f"{shown}; with {'it' if len(names) == 1 else 'them'}, {config.name} is no backbone: {fault}")
