"""References to the frozen weights that a tuner reads but does not own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn


class Frozen:
    """A reference to the frozen model that is neither a submodule of the tuner nor copied with it.

    Attributes:
        model: The timm model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        # a copied tuner keeps referring to the same frozen model, unless that is copied too
        return Frozen(memo.get(id(self.model), self.model))


def shared_tree(model: nn.Module) -> nn.Module:
    """Copy the module tree; parameters and buffers of the copy are the model's own tensors."""
    tree = copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
    tie_buffers(tree, model)
    return tree


def tie_buffers(tree: nn.Module, model: nn.Module) -> None:
    """Share the buffer dictionaries: ``model.to(device)`` moves parameters in place, but replaces buffers in them."""
    modules = dict(model.named_modules())
    for name, module in tree.named_modules():
        original = modules.get(name.replace(".base_layer", ""))
        if original is not None and type(module) is type(original):
            module._buffers = original._buffers


def replaced_tree(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Copy the module tree as :func:`shared_tree` does, replace some parameters and remove the classifier.

    Args:
        model: A timm model.
        weights: Replacements by name, of the parameters' shapes.

    Returns:
        A timm model, images [B, 3, H, W] → features [B, F].
    """
    tree: Any = shared_tree(model)
    tree.reset_classifier(0)
    for name, value in weights.items():
        path, _, parameter = name.rpartition(".")
        module = tree.get_submodule(path)
        if parameter in module._buffers:  # the dictionary is the model's own, see tie_buffers
            module._buffers = {**module._buffers, parameter: value.detach()}
        else:
            setattr(module, parameter, nn.Parameter(value.detach(), requires_grad=False))
    return tree
