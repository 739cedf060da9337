"""LoRA adapters in PEFT's folders as tasks: their updates ΔW by name of the base's weights, one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cil.errors import BackboneError, nearest
from cil.merging.files import Checkpoint
from cil.merging.layout import Layout

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(r"^(?:base_model\.model\.)?(.*)\.lora_([AB])(?:\.[^.]+)?\.weight$")


def is_adapter(path: Path) -> bool:
    """Whether a path is a folder with a PEFT adapter."""
    return path.is_dir() and ((path / CONFIG).is_file() or (path / WEIGHTS).is_file())


class AdapterUpdates(Mapping[str, Tensor]):
    """The updates ΔW = s B A of a LoRA adapter, each computed when it is read.

    s = α / r, or α / √r for rank-stabilised LoRA, with the ranks and α of single layers where the configuration has
    them. Names are those of the base checkpoint: that of the adapted layer, or the one name that differs from it only
    in leading parts, which Transformers adds to a model inside another one. Updates of excluded weights and saved
    modules of excluded names (heads) are left out.

    Args:
        path: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        plan: The tensors that are merged.

    Attributes:
        path: The folder.
        checkpoint: The adapter's own tensors.

    Raises:
        BackboneError: A file is missing or damaged, the adapter is not LoRA or changes more than weights of layers, or
            a layer is not in the base or of another shape.
    """

    def __init__(self, path: Path, plan: Layout) -> None:
        self.path = path
        self.checkpoint, config = Checkpoint(path / WEIGHTS), _config(path)
        self._transposed = bool(config.get("fan_in_fan_out"))
        excluded = [re.compile(pattern) for pattern in plan.excluded]
        entries = {entry.name: entry for entry in plan.entries}
        factors: dict[str, dict[str, str]] = {}
        for key in self.checkpoint:
            found = _FACTOR.match(key)
            if found is None:
                name = key.removeprefix("base_model.model.")
                if any(pattern.search(name) for pattern in excluded):
                    continue
                raise BackboneError(
                    f"{path}: {key} is no factor of a linear layer's update; only such LoRA adapters can be merged as "
                    "they are: merge this one into its model first (merge_and_unload() in PEFT) and save that"
                )
            factors.setdefault(found[1], {})[found[2]] = key
        self._parts: dict[str, tuple[str, str, float]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for layer, keys in factors.items():
            if any(pattern.search(f"{layer}.weight") for pattern in excluded):
                continue
            if len(keys) != 2:
                raise BackboneError(f"{path}: {layer} has one of its two factors; save the adapter again")
            name = _in_base(layer, entries, path)
            a, b = (self.checkpoint.shape_and_dtype(keys[part])[0] for part in "AB")
            shape = (*a[1:], *b[:1]) if self._transposed else (*b[:1], *a[1:])
            if len(b) != 2 or a[:1] != b[1:] or shape != entries[name].shape:
                raise BackboneError(
                    f"{path}: the factors of {layer}'s update are A {list(a)} and B {list(b)}; the base has {name} "
                    f"{list(entries[name].shape)}; only linear layers of the base itself can have updates"
                )
            self._parts[name], self._shapes[name] = (keys["A"], keys["B"], _scale(config, layer, a[0])), shape

    def __getitem__(self, name: str) -> Tensor:
        a, b, scale = self._parts[name]
        update = scale * (self.checkpoint[b].float() @ self.checkpoint[a].float())
        return update.T.contiguous() if self._transposed else update

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return an update's shape and dtype without computing it."""
        return self._shapes[name], torch.float32

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"]
        alpha, _ = float(config["lora_alpha"]) if kind == "LORA" else 0.0, dict(config.get("alpha_pattern") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackboneError(f"{path / CONFIG}: cannot be read ({type(error).__name__}: {error})") from None
    if kind != "LORA":
        raise BackboneError(f"{path}: is an adapter of kind {kind}; only LORA adds an update to weights")
    for key, why in (("use_dora", "rescales weights (DoRA)"), ("lora_bias", "has biases"), ("use_qalora", "is QALoRA")):
        if config.get(key):
            raise BackboneError(f"{path}: {why}; merge it into its model first (merge_and_unload() in PEFT)")
    if config.get("bias", "none") != "none":
        raise BackboneError(f"{path}: trained biases (bias: {config['bias']}); merge it into its model first")
    return {**config, "lora_alpha": alpha}


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    own = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", layer)), None)
    alpha = config["lora_alpha"] if own is None else float(patterns[own])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _in_base(layer: str, entries: Mapping[str, Any], path: Path) -> str:
    """The name of an adapted layer's weight in the base."""
    wanted = f"{layer}.weight"
    if wanted in entries:
        return wanted
    alike = [name for name in entries if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
    if len(alike) == 1:
        return alike[0]
    hint = f"; it could be {alike[0]} or {alike[1]}" if alike else nearest(wanted, entries)
    raise BackboneError(f"{path}: adapts {layer}, which is not among the merged weights of the base{hint}")
