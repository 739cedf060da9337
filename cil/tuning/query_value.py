"""Low-rank updates of queries and of values in some blocks, with a length each (CL-LoRA), and how they are added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.views import require_views
from cil.backbone.vit import Tuner, attention_width, query_value_rows
from cil.errors import BackboneError
from cil.tuning.blocks import chosen_blocks
from cil.tuning.frozen import Frozen


class QueryValueLora(Tuner):
    """ΔW = μ B A for queries and for values of every chosen block, with A [r, D], B [w, r] and a number μ each.

    Args:
        backbone: The frozen backbone whose weights are updated; it is kept by reference and never modified.
        rank: Rank r in 1 … D.
        blocks: Indices of the blocks that are updated, counted from 0; None: all blocks.
        lengths: Whether μ is drawn from U(0.5, 1.5) and trained; otherwise it is 1.

    Parameters:
        down: A, [L, 2, r, D], queries first, with orthonormal rows at first; up: B, [L, 2, w, r], zero at first;
        lengths: μ, [L, 2].

    Attributes:
        gradient_factors: Factors on the gradient of each row of B, [L, 2, w]; None: 1.

    Raises:
        BackboneError: The backbone's blocks have no views, ``rank`` is out of range, a block does not exist or is
            repeated, or heads share keys and values.
    """

    rides_blocks = False  # it only replaces weights

    def __init__(
        self, backbone: Backbone, rank: int = 10, blocks: Sequence[int] | None = None, *, lengths: bool = False
    ) -> None:
        super().__init__()
        require_views(backbone.model)
        self._frozen, self.draws_lengths = Frozen(backbone.model), lengths
        self.rows = [query_value_rows(backbone.model, i) for i in chosen_blocks(backbone.model, blocks)]
        width = int(backbone.model.embed_dim)  # type: ignore[arg-type]
        if not 1 <= rank <= width:
            raise BackboneError(f"rank: got {rank}; this backbone's width is {width}, so give 1 to {width}")
        self.down = nn.Parameter(torch.empty(len(self.rows), 2, rank, width))
        self.up = nn.Parameter(torch.empty(len(self.rows), 2, attention_width(backbone.model), rank))
        self.lengths = nn.Parameter(torch.ones(len(self.rows), 2))
        self.gradient_factors: Tensor | None = None
        self.reset(torch.Generator().manual_seed(0))
        self.to(backbone.device)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw A, the orthonormal factor of a matrix from U(0, 1), and μ if it is trained; set B to zero."""
        drawn = torch.rand(self.down.mT.shape, generator=generator)
        self.down.copy_(torch.linalg.qr(drawn)[0].mT)
        self.up.zero_()
        if self.draws_lengths:
            self.lengths.copy_(torch.empty(self.lengths.shape).uniform_(0.5, 1.5, generator=generator))

    def weights(self) -> Mapping[str, Tensor]:
        up: Tensor = self.up
        if self.gradient_factors is not None:
            up = up.detach() + self.gradient_factors[..., None] * (up - up.detach())
        return added(self._frozen.model, self.rows, self.lengths[..., None, None] * (up @ self.down))


def added(model: nn.Module, rows: Sequence[Sequence[tuple[str, int]]], updates: Tensor) -> dict[str, Tensor]:
    """The model's weights by name with updates [L, 2, w, D] added, each from a row on.

    Args:
        model: A timm model.
        rows: For each of L blocks what :func:`~cil.backbone.vit.query_value_rows` returns.
        updates: Updates of queries and of values of each block.
    """
    weights: dict[str, Tensor] = {}
    for places, parts in zip(rows, updates, strict=True):
        for (name, first), part in zip(places, parts, strict=True):
            weight = weights[name] if name in weights else model.get_parameter(name)
            end = first + len(part)
            weights[name] = torch.cat([weight[:first], weight[first:end] + part, weight[end:]])
    return weights
