"""A pre-trained timm model: loaded by name or file, frozen, fingerprinted, and called with or without a tuner."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.func import functional_call

from cil.backbone.vit import TunedForward, Tuner
from cil.config import BackboneConfig
from cil.errors import BackboneError, nearest
from cil.utils.randomness import isolated

FROZEN = "frozen"
"""Version of the frozen backbone's features, the same for every learner."""
EMBEDDED = "vit_tiny_patch8_64.tinyimagenet100"
"""Name of the backbone that ships with the package."""


class Backbone(nn.Module):
    """A frozen timm model with the facts about it that results record.

    Args:
        model: A timm model; its classifier head is ignored.
        name: Name with the tag of the weights, as results record it.
        data_config: timm's resolved data configuration.

    Attributes:
        fingerprint: sha256 over the names, dtypes, shapes and bytes of all weights; equal weights have equal digests.
        feature_dim: Width F of the features.
        passes: Number of images sent through the model so far.
    """

    def __init__(self, model: nn.Module, name: str, data_config: dict[str, Any]) -> None:
        super().__init__()
        self.tuned_forward = TunedForward(model.requires_grad_(False).eval())
        self.name, self.data_config = name, data_config
        self.feature_dim = int(model.head_hidden_size)  # type: ignore[arg-type]
        self.fingerprint = fingerprint(model)
        self.passes = 0

    @property
    def model(self) -> nn.Module:
        """The timm model itself."""
        return self.tuned_forward.model

    @property
    def device(self) -> torch.device:
        """Device of the frozen weights."""
        return next(self.model.parameters()).device

    def forward(self, images: Tensor, tuner: Tuner | None = None) -> Tensor:
        """Compute features [B, F] of normalised images, float [B, 3, H, W], with ``tuner`` inserted.

        ``torch.compile(backbone)`` and ``backbone.compile()`` work, and tuners of one kind and size share the compiled
        code. ``fullgraph=True`` does not work, because images are counted outside the compiled graph.

        Raises:
            BackboneError: A token-level tuner does not fit this family of models.
        """
        # an exported program does not count images, and the size of its batch is not known yet
        return self._features(images, tuner) if torch.compiler.is_exporting() else self._counted(images, tuner)

    # if this function were compiled, it would be recompiled for every value of ``passes``; what it calls is compiled
    @partial(torch.compiler.disable, recursive=False)
    def _counted(self, images: Tensor, tuner: Tuner | None) -> Tensor:
        self.passes += len(images)
        return self._features(images, tuner)

    def _features(self, images: Tensor, tuner: Tuner | None) -> Tensor:
        weights = tuner.weights() if tuner is not None else {}
        if weights:
            swapped = {f"model.{key}": value for key, value in weights.items()}
            return functional_call(self.tuned_forward, swapped, (images, tuner))
        return self.tuned_forward(images, tuner)

    def views(self) -> dict[Hashable, Callable[[Tensor], Tensor]]:
        """The single view of a frozen model, under the version that learners use for it; see ``Learner.views``."""
        return {FROZEN: self}

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: the model is frozen, so dropout and stochastic depth stay off."""
        return super().train(False)


def fingerprint(model: nn.Module) -> str:
    """Compute a sha256 over name, dtype, shape and bytes of every entry of the state dict, in the order of names."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(
            value.detach().cpu().contiguous().view(torch.uint8).numpy() if value.ndim else repr(value.item()).encode()
        )
    return digest.hexdigest()


def load_backbone(config: BackboneConfig | str = EMBEDDED, device: str | torch.device = "cpu") -> Backbone:
    """Load the frozen backbone that a configuration names.

    Args:
        config: A timm name with its tag, the embedded default's name, or the full configuration.
        device: Device of the backbone.

    Raises:
        BackboneError: The name is unknown, the weights are of another architecture, are a pickle or cannot be fetched.
    """
    config = BackboneConfig(name=config) if isinstance(config, str) else config
    # layer constructors draw global random numbers, even if the drawn weights are replaced by loaded ones
    with isolated(0):
        model, name, data_config = _embedded(config) if config.name == EMBEDDED else _from_timm(config)
    if config.attention == "explicit":
        switched = [module for module in model.modules() if hasattr(module, "fused_attn")]
        if not switched:
            raise BackboneError(f"backbone.attention: {config.name} has no attention that timm can compute explicitly")
        for module in switched:
            setattr(module, "fused_attn", False)  # noqa: B010  # mypy takes a plain assignment for that of a tensor
    return Backbone(model, name, data_config).to(device)


def embedded_card() -> dict[str, Any]:
    """Read the facts about the shipped backbone: architecture, input, training data, recipe, measured accuracy."""
    return json.loads((files("cil") / "weights" / f"{EMBEDDED}.json").read_text(encoding="utf-8"))


def _embedded(config: BackboneConfig) -> tuple[nn.Module, str, dict[str, Any]]:
    card = embedded_card()
    model = timm.create_model(**{**card["timm_create_model"], **config.options})
    if config.weights is None:
        _load(model, load_file(str(files("cil") / "weights" / card["weights"]["file"])), "the embedded weights")
        name = EMBEDDED
    else:
        name = _local(model, config, EMBEDDED)
    size = card["input"]
    data_config = {
        "input_size": tuple(size["size"]),
        "mean": tuple(size["mean"]),
        "std": tuple(size["std"]),
        "interpolation": size["interpolation"],
        "crop_pct": size["crop_pct"],
        "crop_mode": "squash",
    }
    return model, name, data_config


def _from_timm(config: BackboneConfig) -> tuple[nn.Module, str, dict[str, Any]]:
    architecture = config.name.split(".")[0]
    if not timm.is_model(architecture):
        known = [EMBEDDED, *timm.list_models(), *timm.list_pretrained()]
        raise BackboneError(
            f"backbone.name: timm knows no {config.name!r}{nearest(config.name, known)}; see `cil list backbones`"
        )
    try:
        model = timm.create_model(config.name, pretrained=config.weights is None, num_classes=0, **config.options)
    except Exception as error:  # hub, network, disk and bad options all surface here, each with its own type
        what = "created" if config.weights is not None else "created with its pretrained weights"
        raise BackboneError(
            f"backbone.name: {config.name} could not be {what} ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "without a network connection, set backbone.weights=FILE"
        ) from None
    pretrained: Any = model.pretrained_cfg
    tag = pretrained.get("tag") if pretrained else None
    full = f"{architecture}.{tag}" if tag and "." not in config.name else config.name  # never record an untagged name
    name = full if config.weights is None else _local(model, config, architecture)
    # timm's data configuration has the size of pre-training, even if the model was built with another img_size
    size = {key: config.options[key] for key in ("img_size", "input_size") if key in config.options}
    return model, name, resolve_data_config(size, model=model)


def _local(model: nn.Module, config: BackboneConfig, architecture: str) -> str:
    """Load local or random weights, as the configuration says, and return the name to record."""
    if config.weights == "random":
        return f"{architecture}.random"
    path = Path(str(config.weights)).expanduser()
    _load(model, read_tensors(path), str(path))
    return f"{architecture}.{path.stem}"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file, or from a torch file that contains only tensors.

    Raises:
        BackboneError: The file does not exist, is damaged, or is a pickle that would have to run code.
    """
    if not path.is_file():
        raise BackboneError(f"backbone.weights: {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors errors share no base class
        raise BackboneError(
            f"backbone.weights: {path} is not a safetensors file, and torch's weights-only loading refuses it "
            f"({type(error).__name__}); pickles are never loaded: if you trust the file, convert it to safetensors"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise BackboneError(f"backbone.weights: {path} does not contain a dictionary of tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _load(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    expected = model.state_dict()
    state = {k: v for k, v in state.items() if k in expected or not k.startswith(("head.", "head_dist."))}
    shapes = [k for k in state if k in expected and state[k].shape != expected[k].shape]
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if shapes or missing or extra:
        first = (
            f"{shapes[0]} is {tuple(state[shapes[0]].shape)}, expected {tuple(expected[shapes[0]].shape)}"
            if shapes
            else f"{missing[0]} is missing"
            if missing
            else f"{extra[0]} is not in the model"
        )
        raise BackboneError(
            f"backbone.weights: {source} fits another architecture: {len(missing)} weights missing, "
            f"{len(extra)} unknown, {len(shapes)} of another shape; first: {first}"
        )
    model.load_state_dict(state)
