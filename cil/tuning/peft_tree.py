"""The module tree that PEFT has changed: its layers, what it added to them, and which of them the model calls."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from cil.backbone.weights import one_line
from cil.errors import BackboneError
from cil.utils.randomness import isolated


def layers_of(tree: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in tree.named_modules() if isinstance(module, BaseTunerLayer))


@torch.no_grad()
def uncalled(tree: Any, layers: Mapping[str, nn.Module], input_size: tuple[int, ...]) -> list[str]:
    """Names of those layers that are not called when an image passes through the tree.

    Raises:
        BackboneError: PEFT's layers cannot process what the tree sends them, e.g. OFT maps of channels last.
    """
    called: set[str] = set()
    handles = [
        layer.register_forward_pre_hook(lambda module, inputs, name=name: called.add(name))
        for name, layer in layers.items()
    ]
    first = next(tree.parameters())
    try:
        with isolated(0):  # dropout of adapters draws
            blank = torch.zeros(1, *input_size, device=first.device, dtype=first.dtype)
            tree.forward_head(tree.forward_features(blank), pre_logits=True)
    except (RuntimeError, ValueError, TypeError) as error:
        kind = type(next(iter(layers.values()))).__module__.split(".")[-2]
        raise BackboneError(
            f"PEFT's layers of {kind} cannot process the tokens of {type(tree).__name__} "
            f"({type(error).__name__}: {one_line(error)}); use lora, or give other targets"
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in layers if name not in called]


def adapter_modules(tree: nn.Module) -> nn.ModuleDict:
    """The modules that PEFT added to the tree: the same objects, so that moving and loading them changes the tree."""
    return nn.ModuleDict(
        {
            name.replace(".", "/"): nn.ModuleDict(
                {part: child for part, child in layer.named_children() if part != "base_layer"}
            )
            for name, layer in layers_of(tree)
        }
    )


def inject(tree: nn.Module, config: Any, name: str, generator: torch.Generator) -> None:
    """Let PEFT add an adapter to the tree, with initial values from ``generator``.

    Raises:
        BackboneError: PEFT refuses a target or an argument, or would leave a target as it is.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import check_target_module_exists

    before = [] if hasattr(tree, "peft_config") else [(n, type(m).__name__) for n, m in tree.named_modules() if n]
    seed = int(torch.randint(2**62, (1,), generator=generator))
    try:
        with isolated(seed), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Invalid `")  # OFT would silently use another block size
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are intended
            inject_adapter_in_model(config, tree, adapter_name=name)
    except (ValueError, TypeError, KeyError, UserWarning) as error:
        getattr(tree, "peft_config", {}).pop(name, None)
        # PEFT prints the whole of a module that it does not know
        said = re.sub(r"^(Target module \w+)\(.*\)( is not supported)", r"\1\2", str(error), flags=re.DOTALL)
        raise BackboneError(f"PEFT refuses: {said.splitlines()[0]}") from None
    changed = {key for key, _ in layers_of(tree)}
    found = tree.peft_config[name]  # type: ignore[index]  # with the names that stand for "all-linear"
    targets = [(key, kind) for key, kind in before if check_target_module_exists(found, key)]
    if left := [f"{key} ({kind})" for key, kind in targets if key not in changed]:
        raise BackboneError(
            f"PEFT has no {config.peft_type.lower()} for {len(left)} of the {len(targets)} target layers, the first is "
            f"{left[0]}, and would leave them out; give other targets, or use lora"
        )
