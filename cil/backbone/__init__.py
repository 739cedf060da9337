"""The frozen backbone, and the hooks through which a tuner changes its forward pass."""

from cil.backbone.backbone import FROZEN, Backbone, fingerprint
from cil.backbone.ensemble import Backbones, Member, backbone_facts, load_backbones
from cil.backbone.loading import EMBEDDED, embedded_card, fits, load_backbone, without_source
from cil.backbone.vit import Tuner
from cil.backbone.weights import read_tensors

__all__ = [
    "EMBEDDED",
    "FROZEN",
    "Backbone",
    "Backbones",
    "Member",
    "Tuner",
    "backbone_facts",
    "embedded_card",
    "fingerprint",
    "fits",
    "load_backbone",
    "load_backbones",
    "read_tensors",
    "without_source",
]
