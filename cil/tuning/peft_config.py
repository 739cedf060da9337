"""PEFT's configuration for a tuner's hyper-parameters; options that would modify frozen weights are refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Literal, get_args

from torch import nn

from cil.errors import BackboneError, nearest

Kind = Literal["lora", "dora", "ia3", "oft", "osf"]
Factors = Literal["both", "up", "shared"]
"""Factors of ΔW = (α/r) B A that LoRA trains: both, or B alone, with A as drawn, or as drawn once for every tuner."""


def require_targets(model: nn.Module, targets: Iterable[str] | str) -> None:
    """Refuse targets that match no layer of ``model``.

    Raises:
        BackboneError: A target matches no layer; the message names it, the nearest layer and all linear layers.
    """
    names = [name for name, _ in model.named_modules() if name]
    linear = sorted({n.rsplit(".", 1)[-1] for n, module in model.named_modules() if isinstance(module, nn.Linear)})

    def matches(target: str) -> bool:
        if isinstance(targets, str):
            return target == "all-linear" or any(re.fullmatch(target, name) for name in names)
        return any(name == target or name.endswith(f".{target}") for name in names)

    for target in [targets] if isinstance(targets, str) else sorted(targets):
        if not matches(target):
            separate = ("q_proj", "k_proj", "v_proj")  # what other models have instead of one qkv
            hint = nearest(target, linear)
            if target == "qkv" and set(separate) <= set(linear):
                hint = f", give targets: [{', '.join(separate)}]"
            raise BackboneError(
                f"targets: no layer of {type(model).__name__} matches {target!r}{hint}; {_layers_to_name(model)}"
            )


def _layers_to_name(model: nn.Module) -> str:
    """The last parts of the names of linear layers, else of the convolutions that LoRA takes with any rank."""
    linear = {n.rsplit(".", 1)[-1] for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    if linear:
        return f"its linear layers: {', '.join(sorted(linear))}"
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.groups == 1]
    names = {n.rsplit(".", 1)[-1] for n, module in model.named_modules() if module in convolutions}
    return f"it has no linear layers; its convolutions: {', '.join(sorted(names))}"


def make_config(
    kind: Kind, rank: Any, alpha: float | None, dropout: float, targets: Any, options: dict[str, Any]
) -> Any:
    """Build PEFT's configuration for one kind; see :class:`cil.tuning.PeftTuner` for the arguments.

    Raises:
        BackboneError: The kind does not have an argument or option, or an option would modify the frozen weights.
    """
    import peft

    if kind not in get_args(Kind):
        raise BackboneError(f"kind: no {kind!r}{nearest(kind, get_args(Kind))}; there are {', '.join(get_args(Kind))}")
    arguments: dict[str, Any] = {"target_modules": targets}
    if kind in ("lora", "dora"):
        rank = 8 if rank is None else rank
        arguments |= {"r": rank, "lora_alpha": rank if alpha is None else alpha, "lora_dropout": dropout}
        arguments |= {"use_dora": True} if kind == "dora" else {}
    elif kind == "oft":
        if "oft_block_size" not in options:
            arguments |= {"oft_block_size": 16} if rank is None else {"r": rank, "oft_block_size": 0}
    elif kind == "osf":
        arguments |= {"effective_rank": 0.5 if rank is None else rank}
    elif kind == "ia3" and "feedforward_modules" not in options:
        inputs = ".*fc2" if isinstance(targets, str) else [t for t in targets if t.rsplit(".", 1)[-1] == "fc2"]
        arguments |= {"feedforward_modules": inputs}
    unsupported = {"rank": rank if kind == "ia3" else None, "alpha": None if kind in ("lora", "dora") else alpha}
    # OFT has a dropout in its configuration that PEFT 0.21 never applies
    unsupported["dropout"] = None if kind in ("lora", "dora") else dropout or None
    for name, value in unsupported.items():
        if value is not None:
            raise BackboneError(f"{kind} has no {name}, got {value}")
    classes = {"ia3": peft.IA3Config, "oft": peft.OFTConfig, "osf": peft.OSFConfig}
    cls: Any = classes.get(kind, peft.LoraConfig)
    fields = {f.name for f in dataclasses.fields(cls)} - arguments.keys()
    for option, value in options.items():
        if option not in fields:
            raise BackboneError(f"options: {cls.__name__} takes no {option!r} here{nearest(option, fields)}")
        # these options train the frozen weights, replace them, or change their initial values
        edits = option in ("modules_to_save", "trainable_token_indices", "layer_replication") and value
        edits = edits or (option == "bias" and value != "none")
        if edits or (option == "init_lora_weights" and value not in (True, False, "gaussian", "orthogonal")):
            raise BackboneError(f"options: {option}={value!r} edits the frozen backbone, which is shared")
    try:
        return cls(**arguments, **options)
    except (ValueError, TypeError) as error:
        raise BackboneError(f"{kind}: {str(error).splitlines()[0]}") from None
