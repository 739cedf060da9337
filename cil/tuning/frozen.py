"""A tuner's view of frozen weights it reads but does not own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn


class Frozen:
    """A reference to the frozen model that is neither a submodule of the tuner nor copied along with it.

    Attributes:
        model: The timm model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        # the copy of a tuner rides along the same frozen model, unless that is being copied with it
        return Frozen(memo.get(id(self.model), self.model))


def shared_tree(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are the model's own tensors."""
    tree = copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
    tie_buffers(tree, model)
    return tree


def tie_buffers(tree: nn.Module, model: nn.Module) -> None:
    """``model.to(device)`` moves parameters in place but puts new buffers into its dictionaries: share these."""
    modules = dict(model.named_modules())
    for name, module in tree.named_modules():
        original = modules.get(name.replace(".base_layer", ""))
        if original is not None and type(module) is type(original):
            module._buffers = original._buffers


def replaced_tree(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """:func:`shared_tree` with some parameters replaced, without a classifier: images → features, as timm calls it."""
    tree: Any = shared_tree(model)
    tree.reset_classifier(0)
    for name, value in weights.items():
        place, _, own = name.rpartition(".")
        setattr(tree.get_submodule(place), own, nn.Parameter(value.detach(), requires_grad=False))
    return tree
