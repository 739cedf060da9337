"""The model that a strategy trains: a tuner on the frozen backbone, and a head. The backbone is not part of it."""

from __future__ import annotations

from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.vit import Tuner
from cil.classifiers.heads import LinearHead
from cil.learner import Context


class Features(nn.Module):
    """Maps images [B, 3, H, W] to features [B, F] in float32, by the frozen backbone with ``tuner``."""

    def __init__(self, backbone: Backbone, tuner: Tuner | None, ctx: Context) -> None:
        super().__init__()
        self.tuner = tuner

        def extract(images: Tensor, tuner: Tuner | None) -> Tensor:
            with ctx.accelerator.autocast():
                return backbone(images, tuner).float()

        # a closure, so that copies of this module, which strategies make, share the backbone
        self._extract = extract

    def forward(self, images: Tensor) -> Tensor:
        return self._extract(images, self.tuner)


class Model(nn.Module):
    """Maps images [B, 3, H, W] to logits [B, C] of all classes seen."""

    def __init__(self, features: Features, head: LinearHead) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
