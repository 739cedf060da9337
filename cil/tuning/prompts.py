"""Prompts: tokens beside those of the image, learned or given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.errors import BackboneError
from cil.vit import Tuner, class_position, require_plain_vit


class VisualPrompts(Tuner):
    """VPT (Jia et al. 2022, arXiv 2203.12119), with the inits and places of APER (arXiv 2303.07338).

    P tokens without position embedding are appended at the end of the sequence. ``deep``: fresh ones
    before every block, dropped behind it, L · P · D parameters. Shallow: once before the first block, carried
    through all of them and dropped before the pooling, P · D parameters. Prompts start at zero.

    Args:
        backbone: The frozen backbone it will ride along; only its sizes are read.
        length: Tokens P ≥ 0; with none the features are the frozen ones.
        deep: A set of prompts for every block, or one for all.

    Raises:
        BackboneError: The backbone is no plain ViT, or ``length`` is negative.
    """

    def __init__(self, backbone: Backbone, length: int = 5, deep: bool = True) -> None:
        super().__init__()
        require_plain_vit(backbone.model)
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
        # average and attention pooling would see prompts that are still there
        return super().pool(vit, tokens if self.deep else tokens[:, : tokens.shape[1] - self.length])

    def _append(self, i: int, tokens: Tensor) -> Tensor:
        prompts = self.prompts[i].to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat([tokens, prompts], dim=1)


class PooledPrompts(Tuner):
    """Given tokens behind the class token, and features read from them, as L2P does (arXiv 2112.08654).

    Sequence: class and register tokens, prompts, patches; prompts carry the class token's position embedding. Feature:
    the mean of the prompts' outputs behind the final norm. A light object, made anew for every forward pass.

    Args:
        backbone: The frozen backbone it will ride along.
        prompts: [B, P, D], one set an image; with P = 0 the features are the frozen ones.
    """

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
