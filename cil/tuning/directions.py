"""Low-rank updates of queries and values, one per task, of which old ones keep their direction and change in length."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.views import require_views
from cil.backbone.vit import Tuner, attention_width, query_value_rows
from cil.errors import BackboneError
from cil.tuning.frozen import Frozen
from cil.tuning.query_value import added


class Directions(Tuner):
    """ΔW = Σ_{k<t} α_k B_k A_k / (‖B_k‖ ‖A_k‖) + α_t B_t A_t for queries and for values of every block (SD-LoRA).

    A [r, D] is Kaiming-uniform with a = √5 at first, B [w, r] zero. The norms are Frobenius norms. All α are trained,
    and of the factors those of the newest task.

    Args:
        backbone: The frozen backbone whose weights are updated; it is kept by reference and never modified.
        rank: Rank r ≥ 1 of a task's update.
        start: Value of a new α.
        keep: Whether old directions keep their lengths when a task begins, with one α per task, block and projection.
            Otherwise there is one per task, and all begin each task at ``start``, so that the weights jump.

    Parameters:
        down: A of the newest task, [L, 2, r, D], queries first; up: B, [L, 2, w, r]; lengths: α, oldest first,
        [T, L, 2] with ``keep``, else [T, 1, 1].

    Buffers:
        downs, ups: A_k / ‖A_k‖ and B_k / ‖B_k‖ of older tasks beside one another, [L, 2, (T − 1) r, D] and
        [L, 2, w, (T − 1) r].

    Raises:
        BackboneError: The backbone's blocks have no views, ``rank`` is below 1, or heads share keys and values.
    """

    rides_blocks = False  # it only replaces weights

    downs: Tensor
    ups: Tensor

    def __init__(self, backbone: Backbone, rank: int = 10, start: float = 0.8, *, keep: bool = False) -> None:
        super().__init__()
        require_views(backbone.model)
        if rank < 1:
            raise BackboneError(f"directions: rank must be at least 1, got {rank}")
        self._frozen, self.rank, self.start, self.keep = Frozen(backbone.model), rank, start, keep
        depth, width = len(backbone.model.blocks), int(backbone.model.embed_dim)  # type: ignore[arg-type]
        self.rows = [query_value_rows(backbone.model, i) for i in range(depth)]
        self.down = nn.Parameter(torch.empty(depth, 2, rank, width))
        self.up = nn.Parameter(torch.empty(depth, 2, attention_width(backbone.model), rank))
        self.lengths = nn.Parameter(torch.empty(0))
        self.register_buffer("downs", self.down.detach()[:, :, :0].clone())
        self.register_buffer("ups", self.up.detach()[..., :0].clone())
        self.reset(torch.Generator().manual_seed(0))
        self.to(backbone.device)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Forget all tasks, and draw A of a first one."""
        self.downs, self.ups = self.downs[:, :, :0], self.ups[..., :0]
        self.lengths = nn.Parameter(self._new())
        self._draw(generator)

    @torch.no_grad()
    def next(self, generator: torch.Generator) -> None:
        """Keep the newest task's direction, and begin another task with a drawn A and B zero."""
        lengths = [matrix.flatten(2).norm(dim=2) for matrix in (self.down, self.up)]  # [L, 2] each
        directions = [
            m / n.clamp(min=1e-12)[..., None, None] for m, n in zip((self.down, self.up), lengths, strict=True)
        ]
        self.downs = torch.cat([self.downs, directions[0]], 2)
        self.ups = torch.cat([self.ups, directions[1]], 3)
        old = self.lengths.detach().clone()
        if self.keep:
            old[-1] *= lengths[0] * lengths[1]
        else:
            old.fill_(self.start)
        self.lengths = nn.Parameter(torch.cat([old, self._new()]))
        self._draw(generator)

    def weights(self) -> Mapping[str, Tensor]:
        *old, newest = self.lengths
        update = newest[..., None, None] * (self.up @ self.down)  # [L, 2, w, D]
        if old:
            factors = torch.stack(old).repeat_interleave(self.rank, 0).movedim(0, -1)  # [L or 1, 2 or 1, (T − 1) r]
            update = update + (self.ups * factors[:, :, None]) @ self.downs
        return added(self._frozen.model, self.rows, update)

    def _new(self) -> Tensor:
        shape = (1, len(self.rows), 2) if self.keep else (1, 1, 1)
        return torch.full(shape, self.start, device=self.down.device)

    def _draw(self, generator: torch.Generator) -> None:
        bound = 1 / math.sqrt(self.down.shape[-1])
        self.down.copy_(torch.empty(self.down.shape).uniform_(-bound, bound, generator=generator))
        self.up.zero_()
