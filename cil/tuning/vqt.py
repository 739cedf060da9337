"""Visual query tuning: learned queries that summarise every block's tokens and change none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.views import require_views
from cil.backbone.vit import Tuner, mlp_half, queried_branches
from cil.errors import BackboneError
from cil.tuning.blocks import chosen_blocks


class VisualQueries(Tuner):
    """VQT: visual query tuning (Tu et al., CVPR 2023, arXiv 2212.03220).

    Block l has T learned queries P_l ∈ [T, D]. They read keys and values of the block's input tokens X, and no token
    reads them:

        P'_l = P_l + Attention(q(P_l), k(X), v(X)),    P''_l = P'_l + MLP(P'_l),

    with the block's own norms, weights and layer scales. So all tokens, and the backbone's own feature f, are those of
    the frozen backbone, bit for bit. The features are [f/‖f‖, P''_l/‖P''_l‖ of every block l], with the T · D numbers
    of a block as one vector: F + L · T · D numbers for L blocks. There are L · T · D parameters. The pass takes T more
    tokens per block, whose keys and values are not used.

    Initial queries are uniform, U(±√(6/(3 p² + D))) for patches of p pixels, as in VPT.

    Args:
        backbone: The frozen backbone; only its sizes are read.
        length: Number T ≥ 1 of queries per block.
        dropout: Dropout probability on the queries, in training.
        blocks: Indices of the blocks with queries, counted from 0; None: all blocks.

    Attributes:
        width: Width of the features.

    Raises:
        BackboneError: The backbone's blocks have no views, ``length`` is below 1, or a block is missing or repeated.
    """

    def __init__(
        self, backbone: Backbone, length: int = 1, dropout: float = 0.1, *, blocks: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        require_views(backbone.model)
        if length < 1:
            raise BackboneError(f"vqt: length must be at least 1, got {length}")
        vit: Any = backbone.model
        self.rows = {i: row for row, i in enumerate(chosen_blocks(vit, blocks))}
        height, width = vit.patch_embed.patch_size
        self.bound = (6 / (3 * height * width + int(vit.embed_dim))) ** 0.5
        self.queries = nn.Parameter(torch.empty(len(self.rows), length, int(vit.embed_dim)))
        self.drop = nn.Dropout(dropout)
        self.width = backbone.feature_dim + self.queries.numel()
        self.reset(torch.Generator().manual_seed(0))
        self.to(backbone.device)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw the queries again."""
        drawn = torch.empty(self.queries.shape).uniform_(-self.bound, self.bound, generator=generator)
        self.queries.copy_(drawn)

    def block(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        """Run block i on its own tokens [B, N, D], and append the outputs of its queries to those of earlier blocks."""
        length = self.queries.shape[1]
        found = sum(j < i for j in self.rows) * length
        own, earlier = tokens.split([tokens.shape[1] - found, found], dim=1)
        if i not in self.rows:
            return torch.cat([super().block(i, block, own), earlier], dim=1)
        queries = self.drop(self.queries[self.rows[i]].expand(tokens.shape[0], -1, -1)).to(tokens.dtype)
        branch, answer = queried_branches(block, own, queries)
        view: Any = block
        own, queries = own + view.drop_path1(branch), queries + view.drop_path1(answer)
        return torch.cat([mlp_half(block, own), earlier, mlp_half(block, queries)], dim=1)

    def finish(self, vit: Any, tokens: Tensor) -> Tensor:
        blocks, length, _ = self.queries.shape
        own, found = tokens.split([tokens.shape[1] - blocks * length, blocks * length], dim=1)
        answers = found.unflatten(1, (blocks, length)).flatten(2)  # [B, L, T · D]
        feature = self.pool(vit, vit.norm(own.contiguous()))  # a mean over a view may round differently
        return torch.cat([F.normalize(feature, dim=1), F.normalize(answers, dim=2).flatten(1)], dim=1)
