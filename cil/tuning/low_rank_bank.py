"""Low-rank updates of the attention's projections, one pair of factors per task, folded into one update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.views import require_views
from cil.backbone.vit import Tuner, projection_rows
from cil.errors import BackboneError
from cil.tuning.blocks import chosen_blocks
from cil.tuning.frozen import Frozen

Parts = Literal["kv", "qkv"]


class LowRankBank(Tuner):
    """W = W_0 + Δ + B diag(s) A in every chosen block: Δ holds earlier tasks' updates, B diag(s) A is the current one.

    A [r, D] reads the input of the attention, the same for queries, keys and values, and B [R, r] writes to the R rows
    of the chosen projections. B is zero at the start of a task, so that training starts at W_0 + Δ. :meth:`fold` adds
    B diag(s) A to Δ: the cost of a forward pass and the memory do not depend on the number of tasks.

    Args:
        backbone: The frozen backbone whose weights are updated; it is kept by reference and never modified.
        rank: Rank r in 1 … D.
        parts: Projections that are updated: keys and values, or queries, too.
        scales: Factors s on the r directions; None: 1.
        blocks: Indices of the blocks that are updated, counted from 0; None: all blocks.

    Parameters:
        down: A, [L, r, D]; up: B, [L, R, r].

    Buffers:
        folded: Δ, [L, R, D]; scales: s, [r], not saved.

    Attributes:
        ahead: Displacements of A and B in the forward pass, of their shapes, constants to gradients; None: none.

    Raises:
        BackboneError: The backbone's blocks have no views, ``rank`` is out of range, a block does not exist or is
            repeated, or heads share keys and values.
    """

    rides_blocks = False  # it only replaces weights

    folded: Tensor
    scales: Tensor

    def __init__(
        self,
        backbone: Backbone,
        rank: int = 10,
        parts: Parts = "kv",
        scales: Sequence[float] | None = None,
        *,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        require_views(backbone.model)
        self._frozen = Frozen(backbone.model)
        self.rows = [projection_rows(backbone.model, i, parts) for i in chosen_blocks(backbone.model, blocks)]
        width, count = int(backbone.model.embed_dim), len(self.rows)  # type: ignore[arg-type]
        if not 1 <= rank <= width:
            raise BackboneError(f"rank: got {rank}; this backbone's width is {width}, so give 1 to {width}")
        self.sizes = [len(backbone.model.get_parameter(name)) - first for name, first in self.rows[0].items()]
        self.down = nn.Parameter(torch.empty(count, rank, width))
        self.up = nn.Parameter(torch.empty(count, sum(self.sizes), rank))
        self.register_buffer("folded", torch.zeros(count, sum(self.sizes), width))
        self.register_buffer("scales", torch.tensor(scales or [1.0] * rank), persistent=False)
        self.ahead: tuple[Tensor, Tensor] | None = None
        self.reset(torch.Generator().manual_seed(0))
        self.to(backbone.device)

    @property
    def inputs(self) -> list[str]:
        """For each chosen block the name of a weight whose input is what A reads."""
        return [next(iter(rows)) for rows in self.rows]

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Set Δ to zero, and draw A as :meth:`renew` does."""
        self.renew(generator)
        self.folded.zero_()

    @torch.no_grad()
    def renew(self, generator: torch.Generator) -> None:
        """Draw A from U(±1/√D), Kaiming-uniform with a = √5, and set B to zero, for another task."""
        bound = 1 / math.sqrt(self.down.shape[-1])
        self.down.copy_(torch.empty(self.down.shape).uniform_(-bound, bound, generator=generator))
        self.up.zero_()

    @torch.no_grad()
    def give(self, down: Tensor) -> None:
        """Set A to ``down`` [L, r, D], which is not trained, and B to zero."""
        self.down.copy_(down)
        self.down.requires_grad_(False)
        self.up.zero_()

    @torch.no_grad()
    def fold(self) -> None:
        """Δ ← Δ + B diag(s) A and B ← 0: the weights stay, up to rounding."""
        self.folded += (self.up * self.scales) @ self.down
        self.up.zero_()

    def weights(self) -> Mapping[str, Tensor]:
        further = (0, 0) if self.ahead is None else self.ahead
        down, up = self.down + further[0], self.up + further[1]
        updates = self.folded + (up * self.scales) @ down  # [L, R, D]
        weights = {}
        for rows, update in zip(self.rows, updates, strict=True):
            for (name, first), part in zip(rows.items(), update.split(self.sizes), strict=True):
                weight = self._frozen.model.get_parameter(name)
                weights[name] = torch.cat([weight[:first], weight[first:] + part])
        return weights
