"""A learned vector behind every block: a tuner in one file."""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from cil import Tuner


class BlockShift(Tuner):
    """x ← block(x) + s · v_i: one vector v_i ∈ [D] a block, added to all tokens; zero at first, as the frozen network.

    D numbers a block; the forward pass costs one addition a block.

    Args:
        backbone: The frozen backbone it rides along.
        scale: s, positive.
    """

    def __init__(self, backbone, scale: Annotated[float, Field(gt=0)] = 1.0):
        super().__init__()
        vit = backbone.model
        self.scale = scale
        self.shift = nn.Parameter(torch.zeros(len(vit.blocks), vit.embed_dim))

    def reset(self, generator):  # a fresh start for a new run; nothing random here
        nn.init.zeros_(self.shift)

    def block(self, i, block, tokens):  # [B, N, D] → [B, N, D]
        return super().block(i, block, tokens) + self.scale * self.shift[i]
