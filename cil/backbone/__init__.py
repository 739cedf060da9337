"""The frozen backbone, and the hooks through which a tuner changes its forward pass."""

from cil.backbone.backbone import FROZEN, Backbone, fingerprint
from cil.backbone.loading import EMBEDDED, embedded_card, fits, load_backbone, without_source
from cil.backbone.vit import Tuner
from cil.backbone.weights import read_tensors

__all__ = [
    "EMBEDDED",
    "FROZEN",
    "Backbone",
    "Tuner",
    "embedded_card",
    "fingerprint",
    "fits",
    "load_backbone",
    "read_tensors",
    "without_source",
]
