"""The module tree that PEFT has changed: its layers, what it added to them, and which of them the model calls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from cil.errors import BackboneError
from cil.utils.randomness import isolated


def layers_of(tree: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in tree.named_modules() if isinstance(module, BaseTunerLayer))


@torch.no_grad()
def uncalled(tree: Any, layers: Mapping[str, nn.Module], input_size: tuple[int, ...]) -> list[str]:
    """Names of those layers that are not called when an image passes through the tree."""
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
    from peft import inject_adapter_in_model

    seed = int(torch.randint(2**62, (1,), generator=generator))
    try:
        with isolated(seed), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Invalid `")  # OFT would silently use another block size
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are intended
            inject_adapter_in_model(config, tree, adapter_name=name)
    except (ValueError, TypeError, KeyError, UserWarning) as error:
        getattr(tree, "peft_config", {}).pop(name, None)
        raise BackboneError(f"PEFT refuses: {str(error).splitlines()[0]}") from None
