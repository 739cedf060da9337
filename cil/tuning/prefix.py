"""Prefix tuning: additional keys and values in the attention of some or all blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.views import require_views
from cil.backbone.vit import Tuner, attention_half, attention_width, prefixed_branch
from cil.errors import BackboneError
from cil.tuning.blocks import chosen_blocks

STD, TOP = 0.02, 0.01
Init = Literal["normal", "uniform"]


class ExternalPrefix(Tuner):
    """Attention(q, [P_k; k], [P_v; v]) with keys and values P_k, P_v from the caller; the tuner has no parameters.

    It is cheap enough to be built for every forward pass, for prefixes that depend on the images (DualPrompt, arXiv
    2204.04799; CODA-Prompt, arXiv 2211.13218). Gradients flow to whatever the prefixes were computed from. The sequence
    keeps its length, and a prefix is neither projected nor normalised.

    Args:
        prefixes: (keys, values) by block, [P, A] each, or [B, P, A] with one prefix per image, where A is the width of
            the attention, heads × head width. Blocks without an entry do not change.
        compensate: Whether to use LAE's attention (arXiv 2303.10070), see :class:`Prefix`.
    """

    def __init__(self, prefixes: Mapping[int, tuple[Tensor, Tensor]], compensate: bool = False) -> None:
        super().__init__()
        self.prefixes, self.compensate = dict(prefixes), compensate

    def prefix(self, i: int) -> tuple[Tensor, Tensor] | None:
        """Return keys and values of block i, [P, A] or [B, P, A] each; None if it has none."""
        return self.prefixes.get(i)

    def attention(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        prefix = self.prefix(i)
        if prefix is None:
            return attention_half(block, tokens)
        return attention_half(block, tokens, prefixed_branch(block, tokens, *prefix, compensate=self.compensate))


class Prefix(ExternalPrefix):
    """Prefix tuning (Li & Liang 2021, arXiv 2101.00190) in a ViT: a learned prefix for every chosen block.

    There are 2 · L · P · A parameters for L chosen blocks and attention width A; 2 L more with ``learned_scale``.

    Args:
        backbone: The frozen backbone; only its sizes are read.
        length: Number P ≥ 0 of keys and of values per block; with 0 the features are the frozen ones.
        blocks: Indices of the blocks with a prefix, counted from 0; None: all blocks.
        init: Distribution of initial keys and values: ``normal``, N(0, 0.02²), or ``uniform``, U(0, 0.01).
        learned_scale: Whether a block's keys and values are multiplied by learned scalars s_key and s_val, which start
            at 1.
        compensate: Whether to apply LAE's compensation (arXiv 2303.10070): after the softmax over prefix and tokens, a
            query's weights on the prefix are divided by their sum, and those on the tokens do not change. All weights
            then sum to more than 1.

    Raises:
        BackboneError: The backbone's blocks have no views, ``length`` is negative, or a block is missing or repeated.
    """

    def __init__(
        self,
        backbone: Backbone,
        length: int = 10,
        *,
        blocks: Sequence[int] | None = None,
        init: Init = "normal",
        learned_scale: bool = False,
        compensate: bool = False,
    ) -> None:
        super().__init__({}, compensate)
        require_views(backbone.model)
        if length < 0:
            raise BackboneError(f"prefix: length must be at least 0, got {length}")
        self.init = init
        self.rows = {i: row for row, i in enumerate(chosen_blocks(backbone.model, blocks))}
        self.keys = nn.Parameter(torch.empty(len(self.rows), length, attention_width(backbone.model)))
        self.values = nn.Parameter(torch.empty_like(self.keys))
        # [blocks, 2]: s_key, s_val
        self.scales = nn.Parameter(torch.empty(len(self.rows), 2)) if learned_scale else None
        self.reset(torch.Generator().manual_seed(0))
        self.to(backbone.device)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw keys and values again; set the scales to 1."""
        for parameter in (self.keys, self.values):
            initial = torch.empty(parameter.shape)
            if self.init == "normal":
                initial.normal_(0, STD, generator=generator)
            else:
                initial.uniform_(0, TOP, generator=generator)
            parameter.copy_(initial)
        if self.scales is not None:
            self.scales.fill_(1)

    def prefix(self, i: int) -> tuple[Tensor, Tensor] | None:
        row = self.rows.get(i)
        if row is None:
            return None
        if self.scales is None:
            return self.keys[row], self.values[row]
        return self.keys[row] * self.scales[row, 0], self.values[row] * self.scales[row, 1]
