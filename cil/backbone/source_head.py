"""The classifier that a backbone was pre-trained with, kept beside it: features → scores of its own classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cil.backbone.backbone import Backbone
from cil.errors import BackboneError

ADVICE = "use weights that come with one, e.g. vit_base_patch16_224.augreg_in21k, or leave source_head out"


def taken_off(model: nn.Module, name: str, size: tuple[int, int, int]) -> nn.Linear:
    """Take the classifier off a timm model, which then ends in its features, as one that was built without it does.

    Args:
        model: A timm model with its classifier.
        name: Name for messages.
        size: Channels, height and width of its images.

    Raises:
        BackboneError: It has no classifier, or one that is not a linear layer on its features.
    """
    timm_model: Any = model
    head = timm_model.get_classifier() if hasattr(model, "get_classifier") else None
    if head is None or isinstance(head, nn.Identity):
        raise BackboneError(f"backbone.source_head: {name} has no classifier of its own; {ADVICE}")
    if not isinstance(head, nn.Linear):
        raise BackboneError(
            f"backbone.source_head: the classifier of {name} is no linear layer but {type(head).__name__}; {ADVICE}"
        )
    with torch.inference_mode():
        found = timm_model.forward_features(torch.zeros(1, *size))
        features, scores = (timm_model.forward_head(found, pre_logits=before) for before in (True, False))
        alike = features.shape[-1] == head.in_features and torch.allclose(head(features), scores, atol=1e-5)
    if not alike:
        raise BackboneError(f"backbone.source_head: the classifier of {name} is not applied to its features; {ADVICE}")
    timm_model.reset_classifier(0)
    return head.requires_grad_(False)


def source_head(backbone: Backbone) -> nn.Linear:
    """The classifier of a backbone's own classes: features [B, F] → scores [B, C_s], on the CPU and frozen.

    Raises:
        BackboneError: It was not kept.
    """
    if backbone.source_head is None:
        raise BackboneError(
            f"{backbone.name} is used without the classifier that it was pre-trained with; set backbone.source_head: "
            "true, if its weights come with one"
        )
    return backbone.source_head
