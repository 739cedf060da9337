"""The tokens after every block of a backbone, kept during one forward pass for a loss that compares them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.views import require_views, started
from cil.backbone.vit import Tuner


class BlockTokens(Tuner):
    """The outputs of all blocks, kept for a loss during training; the features are those without it.

    Args:
        tuner: Tuner that is inserted into the backbone; None: none.
        backbone: The frozen backbone.

    Attributes:
        tokens: Output of every block in the last pass, [B, N, D] each, without tokens that the tuner has added.

    Raises:
        BackboneError: The backbone's blocks have no views.
    """

    rides_blocks = False  # ``model`` returns what runs the blocks and the tuner's hooks

    def __init__(self, tuner: Tuner | None, backbone: Backbone) -> None:
        super().__init__()
        require_views(backbone.model)
        self.inner, self.tokens = Tuner() if tuner is None else tuner, []

    tokens: list[Tensor]

    def weights(self) -> Mapping[str, Tensor]:
        return self.inner.weights()

    def model(self, model: nn.Module) -> Any:
        return _Keeping(self, self.inner.model(model))


class _Keeping:
    """A timm model for one forward pass, which leaves the outputs of its blocks with a :class:`BlockTokens`."""

    def __init__(self, keeper: BlockTokens, vit: Any) -> None:
        self.keeper, self.vit = keeper, vit

    def forward_features(self, images: Tensor) -> Tensor:
        tuner, vit = self.keeper.inner, self.vit
        tokens, blocks = started(vit, images, tuner.prompts_at)
        own, front, kept = tokens.shape[1], vit.num_prefix_tokens if tuner.prompts_at == "front" else 0, []
        tokens = tuner.embed(tokens)
        for i, block in enumerate(blocks):
            tokens = tuner.block(i, block, tokens)
            behind = front + tokens.shape[1] - own  # of foreign tokens at the front
            kept.append(torch.cat([tokens[:, :front], tokens[:, behind:]], dim=1) if front else tokens[:, :own])
        self.keeper.tokens = kept
        return tuner.finish(vit, tokens)

    def forward_head(self, features: Tensor, pre_logits: bool) -> Tensor:
        return features
