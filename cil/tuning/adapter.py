"""Bottleneck adapters: a small MLP beside, or behind, the halves of every block."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from cil.backbone import Backbone
from cil.errors import BackboneError
from cil.vit import Tuner, attention_branch, attention_half, mlp_branch, mlp_half, require_plain_vit

Form = Literal["parallel", "sequential"]


class Bottleneck(nn.Module):
    """s · Up(Dropout(ReLU(Down(x)))), [..., D] → [..., D]; zero at initialisation because Up is."""

    def __init__(self, width: int, bottleneck: int, scale: float, dropout: float) -> None:
        super().__init__()
        # skip_init: the constructor of nn.Linear draws from the global random state
        self.down = skip_init(nn.Linear, width, bottleneck)
        self.up = skip_init(nn.Linear, bottleneck, width)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.dropout(self.down(x).relu()))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Down Kaiming-uniform (a = √5), that is U(±1/√D); everything else zero."""
        weight = self.down.weight
        bound = 1 / math.sqrt(weight.shape[1])
        weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            zero.zero_()


class Adapter(Tuner):
    """Bottleneck adapters in every block. At step 0 the tuned forward equals the frozen one, bit for bit.

    ``parallel``, AdaptFormer (Chen et al. 2022, arXiv 2205.13535), as APER uses it (arXiv 2303.07338):
    out = h + MLP(LN(h)) + s · Up(Dropout(ReLU(Down(h)))), one adapter a block. It reads h, not LN(h).
    L · (2Dr + r + D) parameters: 1,189,632 on ViT-B with r = 64.

    ``sequential``, Houlsby et al. 2019 (arXiv 1902.00751), in pre-norm blocks: behind the attention branch
    and behind the MLP branch, inside the residual, y + s · Up(Dropout(ReLU(Down(y)))), two adapters a block. Houlsby
    et al. have s = 1 and no dropout.

    Args:
        backbone: The frozen backbone it will ride along; only its sizes are read.
        bottleneck: Width r ≥ 1 of the bottleneck.
        scale: Factor s of the adapter's output.
        dropout: Probability in [0, 1); active in this module's training mode only, drawing from the global random
            state: isolate it around the training step.
        form: Where the adapters sit.

    Raises:
        BackboneError: The backbone is no plain ViT, or ``bottleneck`` is below 1.
    """

    def __init__(
        self,
        backbone: Backbone,
        bottleneck: int = 64,
        scale: float = 0.1,
        dropout: float = 0.1,
        form: Form = "parallel",
    ) -> None:
        super().__init__()
        require_plain_vit(backbone.model)
        if bottleneck < 1:
            raise BackboneError(f"adapter: bottleneck must be at least 1, got {bottleneck}")
        vit = backbone.model
        depth, width = len(vit.blocks), int(vit.embed_dim)  # type: ignore[arg-type]
        self.form = form
        count = depth if form == "parallel" else 2 * depth
        self.adapters = nn.ModuleList(Bottleneck(width, bottleneck, scale, dropout) for _ in range(count))
        self.reset(torch.Generator().manual_seed(0))
        self.to(backbone.device)

    def reset(self, generator: torch.Generator) -> None:
        """Zero the upward projections and biases, draw the downward projections afresh."""
        for adapter in self.adapters:
            adapter.reset(generator)  # type: ignore[operator]

    def attention(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        if self.form == "parallel":
            return attention_half(block, tokens)
        branch = attention_branch(block, tokens)
        return attention_half(block, tokens, branch + self.adapters[2 * i](branch))

    def mlp(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        if self.form == "parallel":
            return mlp_half(block, tokens) + self.adapters[i](tokens)
        branch = mlp_branch(block, tokens)
        return mlp_half(block, tokens, branch + self.adapters[2 * i + 1](branch))
