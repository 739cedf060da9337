"""What a strategy trains: a tuner on the frozen backbone, and a head. The backbone is no part of it."""

from __future__ import annotations

from torch import Tensor, nn

from cil.backbone import Backbone
from cil.classifiers.heads import LinearHead
from cil.learner import Context
from cil.vit import Tuner


class Features(nn.Module):
    """Images [B, 3, H, W] → features [B, F] in float32, through the backbone with ``tuner`` riding along."""

    def __init__(self, backbone: Backbone, tuner: Tuner | None, ctx: Context) -> None:
        super().__init__()
        self.tuner = tuner

        def see(images: Tensor, tuner: Tuner | None) -> Tensor:
            with ctx.accelerator.autocast():
                return backbone(images, tuner).float()

        # a function of its own: copies of this module, which strategies make, share it and the backbone behind it
        self._see = see

    def forward(self, images: Tensor) -> Tensor:
        return self._see(images, self.tuner)


class Model(nn.Module):
    """Images [B, 3, H, W] → logits [B, C] of all classes seen."""

    def __init__(self, features: Features, head: LinearHead) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
