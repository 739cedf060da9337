"""The frozen backbone, and the hooks through which a tuner changes its forward pass."""

from cil.backbone.backbone import FROZEN, Backbone, fingerprint, text_side
from cil.backbone.clip import end_in_projection
from cil.backbone.ensemble import Backbones, Member, backbone_facts, load_backbones
from cil.backbone.loading import EMBEDDED, embedded_card, fits, load_backbone, without_source
from cil.backbone.source_head import source_head
from cil.backbone.text import TextSide
from cil.backbone.vit import Tuner, feature_width
from cil.backbone.weights import read_tensors

__all__ = [
    "EMBEDDED",
    "FROZEN",
    "Backbone",
    "Backbones",
    "Member",
    "TextSide",
    "Tuner",
    "backbone_facts",
    "embedded_card",
    "end_in_projection",
    "feature_width",
    "fingerprint",
    "fits",
    "load_backbone",
    "load_backbones",
    "read_tensors",
    "source_head",
    "text_side",
    "without_source",
]
