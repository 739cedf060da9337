"""Prompts: tokens in addition to those of the image, learned by the tuner or supplied by the caller."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.views import require_views
from cil.backbone.vit import Tuner, class_position
from cil.errors import BackboneError


class VisualPrompts(Tuner):
    """VPT (Jia et al. 2022, arXiv 2203.12119), with the initialisation and the positions of APER (arXiv 2303.07338).

    P tokens without position embedding are appended to the sequence. With ``deep`` every block has its own: they are
    appended before the block and removed after it, L · P · D parameters. Without it one set is appended before the
    first block, passes through all of them and is removed before pooling, P · D parameters. Prompts start at zero.

    Args:
        backbone: The frozen backbone; only its sizes are read.
        length: Number P ≥ 0 of prompt tokens; with 0 the features are the frozen ones.
        deep: Whether every block has its own prompts.

    Raises:
        BackboneError: The backbone's blocks have no views, or ``length`` is negative.
    """

    def __init__(self, backbone: Backbone, length: int = 5, deep: bool = True) -> None:
        super().__init__()
        require_views(backbone.model)
        if length < 0:
            raise BackboneError(f"prompts: length must be at least 0, got {length}")
        vit = backbone.model
        self.deep, self.length = deep, length
        sets = len(vit.blocks) if deep else 1  # type: ignore[arg-type]
        self.prompts = nn.Parameter(torch.zeros(sets, length, int(vit.embed_dim)))  # type: ignore[arg-type]
        self.to(backbone.device)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Zero the prompts; nothing is drawn."""
        self.prompts.zero_()

    def embed(self, tokens: Tensor) -> Tensor:
        return tokens if self.deep else self._append(0, tokens)

    def block(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        if not self.deep:
            return super().block(i, block, tokens)
        return super().block(i, block, self._append(i, tokens))[:, : tokens.shape[1]]

    def pool(self, vit: nn.Module, tokens: Tensor) -> Tensor:
        # average and attention pooling must not include the prompts
        return super().pool(vit, tokens if self.deep else tokens[:, : tokens.shape[1] - self.length])

    def _append(self, i: int, tokens: Tensor) -> Tensor:
        prompts = self.prompts[i].to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat([tokens, prompts], dim=1)


class PooledPrompts(Tuner):
    """Prompts that the caller supplies, and features computed from their outputs, as in L2P (arXiv 2112.08654).

    The sequence is: class and register tokens, prompts, patches. Prompts get the class token's position embedding. The
    feature is the mean of the prompts' outputs after the final norm. An instance is cheap enough to be built for every
    forward pass.

    Args:
        backbone: The frozen backbone.
        prompts: Prompts [B, P, D], one set per image; with P = 0 the features are the frozen ones.
    """

    prompts_at = "front"

    def __init__(self, backbone: Backbone, prompts: Tensor) -> None:
        super().__init__()
        vit: Any = backbone.model
        self.prompts = prompts + class_position(vit)
        self.first = int(vit.num_prefix_tokens)

    def embed(self, tokens: Tensor) -> Tensor:
        prompts = self.prompts.to(tokens.dtype)
        return torch.cat([tokens[:, : self.first], prompts, tokens[:, self.first :]], dim=1)

    def pool(self, vit: Any, tokens: Tensor) -> Tensor:
        length = self.prompts.shape[1]
        if length == 0:
            return super().pool(vit, tokens)
        return vit.fc_norm(tokens[:, self.first : self.first + length].mean(1))
