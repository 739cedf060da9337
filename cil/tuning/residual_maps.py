"""Affine maps of the residual stream after every block: MIN's, one per task, mixed into one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.views import require_views
from cil.backbone.vit import Tuner
from cil.tuning.weights import layernorm

TWINS = math.sqrt(2)
"""Factor on a map. MIN adds two maps, μ and σ, that start equal and have equal gradients. Their sum follows the path of
one map with this factor: twice the gradient, and the weight decay as it is."""


class ResidualMaps(Tuner):
    """After block l: r ← r + P_l(r) + √2 · M_l[r W_d; 1] W_u, with M_l = past_l + share · newest_l.

    W_d [D, k] and W_u [k, D] of every block are fixed and random. All maps and P start at zero, so the features then
    equal the frozen ones bit for bit. However many tasks have been mixed into ``past``, a pass costs the same.

    Args:
        backbone: The frozen backbone; its LayerNorms are copied with ``first``.
        width: k ≥ 1.
        first: Whether there are P and trainable copies of all LayerNorms, to adapt to the first task.

    Parameters:
        newest: [L, k + 1, k]; the last row is a bias. general: P with its bias as the last row, [L, D + 1, D].
        norms: Copies of the norms, see :func:`cil.tuning.layernorm`.

    Buffers:
        down: [L, D, k]; up: [L, k, D]; past: [L, k + 1, k]; share: scalar, 1 at the start.

    Raises:
        BackboneError: The backbone's blocks have no views, or with ``first`` it has no LayerNorm.
    """

    down: Tensor
    up: Tensor
    past: Tensor
    share: Tensor

    def __init__(self, backbone: Backbone, width: int = 192, *, first: bool = True) -> None:
        super().__init__()
        require_views(backbone.model)
        d, depth = int(backbone.model.embed_dim), len(backbone.model.blocks)  # type: ignore[arg-type]
        self.newest = nn.Parameter(torch.zeros(depth, width + 1, width))
        self.general = nn.Parameter(torch.zeros(depth, d + 1, d)) if first else None
        self.norms = layernorm(backbone) if first else None
        self.register_buffer("down", torch.empty(depth, d, width))
        self.register_buffer("up", torch.empty(depth, width, d))
        self.register_buffer("past", torch.zeros(depth, width + 1, width))
        self.register_buffer("share", torch.tensor(1.0))
        self.reset(torch.Generator().manual_seed(0))
        self.to(backbone.device)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw W_d ~ U(±1/√k) and W_u ~ U(±1/√D)."""
        for fixed in (self.down, self.up):
            bound = 1 / math.sqrt(fixed.shape[2])
            fixed.copy_(torch.empty(fixed.shape).uniform_(-bound, bound, generator=generator))

    @torch.no_grad()
    def begin_map(self, past: Tensor, share: float) -> None:
        """Start a new map at zero, with weight ``share`` beside ``past`` [L, k + 1, k], the mixture of the others."""
        self.past.copy_(past)
        self.share.fill_(share)
        self.newest.zero_()

    def weights(self) -> Mapping[str, Tensor]:
        return {} if self.norms is None else self.norms.weights()

    def block(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        r = super().block(i, block, tokens)
        mixed = TWINS * (self.past[i] + self.share * self.newest[i])
        change = affine(r @ self.down[i], mixed) @ self.up[i]
        return r + change if self.general is None else r + (affine(r, self.general[i]) + change)


def affine(x: Tensor, rows: Tensor) -> Tensor:
    """[x; 1] · rows: x [..., n], rows [n + 1, m] → [..., m]."""
    return F.linear(x, rows[:-1].T, rows[-1])
