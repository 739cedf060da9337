"""A learned vector after every block: a tuner in one file."""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from cil import Tuner


class BlockShift(Tuner):
    """x ← block(x) + s · v_i: one vector v_i ∈ [D] per block is added to all tokens; it starts at zero.

    D trained numbers per block; the forward pass takes one more addition per block.

    Args:
        backbone: The frozen backbone.
        scale: s, positive.
    """

    def __init__(self, backbone, scale: Annotated[float, Field(gt=0)] = 1.0):
        super().__init__()
        vit = backbone.model
        self.scale = scale
        self.shift = nn.Parameter(torch.zeros(len(vit.blocks), vit.embed_dim))

    def reset(self, generator):  # initial values for a new run; nothing random here
        nn.init.zeros_(self.shift)

    def block(self, i, block, tokens):  # [B, N, D] → [B, N, D]
        return super().block(i, block, tokens) + self.scale * self.shift[i]
