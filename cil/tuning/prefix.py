"""Prefix tuning: learned keys and values in every block's attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.errors import BackboneError
from cil.vit import Tuner, attention_half, attention_width, prefixed_branch, require_plain_vit

STD = 0.02


class Prefix(Tuner):
    """Prefix tuning (Li & Liang 2021, arXiv 2101.00190) in a ViT, as DualPrompt (arXiv 2204.04799) has it.

    Attention(q, [P_k; k], [P_v; v]) in every block: the sequence keeps its length, the prefix is neither projected nor
    normalised, and nothing is trained but P_k and P_v, 2 · L · P · D parameters, drawn from N(0, 0.02²).

    Args:
        backbone: The frozen backbone it will ride along; only its sizes are read.
        length: Keys and values P ≥ 0 a block; with none the features are the frozen ones.

    Raises:
        BackboneError: The backbone is no plain ViT, or ``length`` is negative.
    """

    def __init__(self, backbone: Backbone, length: int = 10) -> None:
        super().__init__()
        require_plain_vit(backbone.model)
        if length < 0:
            raise BackboneError(f"prefix: length must be at least 0, got {length}")
        depth = len(backbone.model.blocks)  # type: ignore[arg-type]
        self.keys = nn.Parameter(torch.empty(depth, length, attention_width(backbone.model)))
        self.values = nn.Parameter(torch.empty_like(self.keys))
        self.reset(torch.Generator().manual_seed(0))
        self.to(backbone.device)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw keys and values from N(0, 0.02²)."""
        for value in (self.keys, self.values):
            value.copy_(torch.empty(value.shape).normal_(0, STD, generator=generator))

    def attention(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        prefix = self._prefix(i)
        if prefix is None:
            return attention_half(block, tokens)
        return attention_half(block, tokens, prefixed_branch(block, tokens, *prefix))

    def _prefix(self, i: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of block i, [P, A] each, or [B, P, A] in a subclass with a prefix an image; None for none."""
        return self.keys[i], self.values[i]
