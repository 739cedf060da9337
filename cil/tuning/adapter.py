"""Bottleneck adapters: small MLPs parallel to, or after, the attention and the MLP of a ViT's blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from cil.backbone import Backbone
from cil.backbone.views import require_views
from cil.backbone.vit import (
    Tuner,
    attention_branch,
    attention_half,
    attention_input,
    mlp_branch,
    mlp_half,
)
from cil.errors import BackboneError
from cil.tuning.blocks import chosen_blocks

Form = Literal["parallel", "sequential", "attention"]
Activation = Literal["relu", "gelu"]


class Bottleneck(nn.Module):
    """s · Up(Dropout(act(Down(x)))), [..., D] → [..., D]. The output is zero at initialisation because Up is zero."""

    def __init__(
        self, width: int, bottleneck: int, scale: float, dropout: float, activation: Activation, learned_scale: bool
    ) -> None:
        super().__init__()
        # skip_init: the constructor of nn.Linear draws from the global random state
        self.down = skip_init(nn.Linear, width, bottleneck)
        self.up = skip_init(nn.Linear, bottleneck, width)
        self.dropout = nn.Dropout(dropout)
        self.activation = F.relu if activation == "relu" else F.gelu
        self.initial_scale = scale
        self.scale = nn.Parameter(torch.tensor(float(scale))) if learned_scale else scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.dropout(self.activation(self.down(x))))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw Down from U(−1/√D, 1/√D), Kaiming-uniform with a = √5; zero all else and restore the initial scale."""
        weight = self.down.weight
        bound = 1 / math.sqrt(weight.shape[1])
        weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            zero.zero_()
        if isinstance(self.scale, nn.Parameter):
            self.scale.fill_(self.initial_scale)


class Adapter(Tuner):
    """Bottleneck adapters in all blocks, or in some. Before training, the features equal the frozen ones bit for bit.

    ``parallel``: AdaptFormer (Chen et al. 2022, arXiv 2205.13535), as APER uses it (arXiv 2303.07338).
    out = h + MLP(LN(h)) + s · Up(Dropout(ReLU(Down(h)))), one adapter per block. It reads h, not LN(h).
    There are L · (2Dr + r + D) parameters: 1,189,632 on ViT-B with r = 64.

    ``sequential``: Houlsby et al. 2019 (arXiv 1902.00751), in pre-norm blocks. Each of the two branches of a block,
    attention and MLP, has an adapter after it, inside the residual: y + s · Up(Dropout(ReLU(Down(y)))). Houlsby et al.
    use s = 1 and no dropout.

    ``attention``: LAE (Gao et al. 2023, arXiv 2303.10070). h = x + Attn(u) + s · Up(GELU(Down(u))) with u = LN(x), one
    adapter per block. LAE uses r = 5 in blocks 0 to 4, no dropout, and a learned s that starts at 1.

    Args:
        backbone: The frozen backbone; only its sizes are read.
        bottleneck: Width r ≥ 1 of the bottleneck.
        scale: Factor s on the adapter's output.
        dropout: Dropout probability in [0, 1). Dropout is active only in this module's training mode and draws from the
            global random state: isolate the training step.
        form: Position of the adapters, see above.
        activation: Activation function between Down and Up: ``relu`` or ``gelu``.
        learned_scale: Whether every adapter learns its own s, which starts at ``scale``; one parameter per adapter.
        blocks: Indices of the blocks with adapters, counted from 0; None: all blocks.

    Raises:
        BackboneError: The backbone's blocks have no views, ``bottleneck`` is below 1, or a block does not exist or is
            repeated.
    """

    def __init__(
        self,
        backbone: Backbone,
        bottleneck: int = 64,
        scale: float = 0.1,
        dropout: float = 0.1,
        form: Form = "parallel",
        *,
        activation: Activation = "relu",
        learned_scale: bool = False,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        require_views(backbone.model)
        if bottleneck < 1:
            raise BackboneError(f"adapter: bottleneck must be at least 1, got {bottleneck}")
        width = int(backbone.model.embed_dim)  # type: ignore[arg-type]
        chosen = chosen_blocks(backbone.model, blocks)
        self.form = form
        sites = 2 if form == "sequential" else 1
        self.first_block = min(chosen)
        self.first = {i: sites * n for n, i in enumerate(chosen)}  # index of each block's first adapter
        self.adapters = nn.ModuleList(
            Bottleneck(width, bottleneck, scale, dropout, activation, learned_scale) for _ in range(sites * len(chosen))
        )
        self.reset(torch.Generator().manual_seed(0))
        self.to(backbone.device)

    def reset(self, generator: torch.Generator) -> None:
        """Draw the down projections again; zero the up projections and all biases."""
        for adapter in self.adapters:
            adapter.reset(generator)  # type: ignore[operator]

    def attention(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        if i not in self.first or self.form == "parallel":
            return attention_half(block, tokens)
        adapter = self.adapters[self.first[i]]
        if self.form == "attention":
            return attention_half(block, tokens) + adapter(attention_input(block, tokens))
        branch = attention_branch(block, tokens)
        return attention_half(block, tokens, branch + adapter(branch))

    def mlp(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        if i not in self.first or self.form == "attention":
            return mlp_half(block, tokens)
        if self.form == "parallel":
            return mlp_half(block, tokens) + self.adapters[self.first[i]](tokens)
        branch = mlp_branch(block, tokens)
        return mlp_half(block, tokens, branch + self.adapters[self.first[i] + 1](branch))
