"""The frozen backbone, and the hooks through which a tuner changes its forward pass."""

from cil.backbone.backbone import EMBEDDED, FROZEN, Backbone, embedded_card, fingerprint, load_backbone, read_tensors
from cil.backbone.vit import Tuner

__all__ = [
    "EMBEDDED",
    "FROZEN",
    "Backbone",
    "Tuner",
    "embedded_card",
    "fingerprint",
    "load_backbone",
    "read_tensors",
]
