"""Low-rank updates of the attention's keys and values, with learned scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.views import require_views
from cil.backbone.vit import Tuner, attention_width, key_value_rows
from cil.errors import BackboneError
from cil.tuning.blocks import chosen_blocks
from cil.tuning.frozen import Frozen


class KeyValueLora(Tuner):
    """LoRA on keys and values, as in LAE (Gao et al. 2023, arXiv 2303.10070).

    ΔW_k = s_k B_k A_k and ΔW_v = s_v B_v A_v are added to the rows of the fused qkv weight that compute keys and
    values, or to the weights of separate projections; what computes queries does not change. Initially A [r, D] is
    Kaiming-uniform (a = √5), that is U(±1/√D), B [w, r] is zero, and the learned s is one. There are
    2 · L · (r (D + w) + 1) parameters for L chosen blocks and attention width w.

    Args:
        backbone: The frozen backbone whose weights are updated; it is kept by reference and never modified.
        rank: Rank r ≥ 1.
        blocks: Indices of the blocks that are updated, counted from 0; None: all blocks.

    Parameters:
        down: A, [L, 2, r, D], keys first; up: B, [L, 2, w, r]; scales: s, [L, 2].

    Raises:
        BackboneError: The backbone's blocks have no views, ``rank`` is below 1, a block does not exist or is repeated,
            or heads share keys and values.
    """

    # PEFT is not used: its LoRA has one A for the whole fused weight, queries included, and no learned scale
    rides_blocks = False

    def __init__(self, backbone: Backbone, rank: int = 5, *, blocks: Sequence[int] | None = None) -> None:
        super().__init__()
        require_views(backbone.model)
        if rank < 1:
            raise BackboneError(f"lora_kv: rank must be at least 1, got {rank}")
        self._frozen = Frozen(backbone.model)
        self.rows = [key_value_rows(backbone.model, i) for i in chosen_blocks(backbone.model, blocks)]
        width, count = int(backbone.model.embed_dim), len(self.rows)  # type: ignore[arg-type]
        self.down = nn.Parameter(torch.empty(count, 2, rank, width))
        self.up = nn.Parameter(torch.empty(count, 2, attention_width(backbone.model), rank))
        self.scales = nn.Parameter(torch.empty(count, 2))
        self.reset(torch.Generator().manual_seed(0))
        self.to(backbone.device)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw A again; set B to zero and s to one."""
        bound = 1 / math.sqrt(self.down.shape[-1])
        self.down.copy_(torch.empty(self.down.shape).uniform_(-bound, bound, generator=generator))
        self.up.zero_()
        self.scales.fill_(1)

    def weights(self) -> Mapping[str, Tensor]:
        updates = self.scales[..., None, None] * (self.up @ self.down)  # [L, 2, w, D]
        weights = {}
        for rows, update in zip(self.rows, updates, strict=True):
            parts = [update.flatten(0, 1)] if len(rows) == 1 else update.unbind(0)  # keys, then values
            for (name, first), part in zip(rows.items(), parts, strict=True):
                weight = self._frozen.model.get_parameter(name)
                weights[name] = torch.cat([weight[:first], weight[first:] + part])
        return weights
