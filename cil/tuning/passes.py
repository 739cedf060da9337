"""Forward passes that return tokens, end early, or branch: for tuners that only replace weights.

Shapes: B images, N tokens (class and register tokens first), D the embedding width, F the feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cil.backbone.views import started
from cil.backbone.vit import Tuner


class Tokens(Tuner):
    """All tokens after the final norm, [B, N, D], in place of the features; timm's ``forward_head`` pools them.

    Args:
        inner: Tuner under which they are computed; it only replaces weights.
    """

    def __init__(self, inner: Tuner) -> None:
        super().__init__()
        self.inner = inner

    def weights(self) -> Mapping[str, Tensor]:
        return self.inner.weights()

    def pool(self, vit: Any, tokens: Tensor) -> Tensor:
        return tokens


class FirstBlocks(Tuner):
    """The features [B, F] of the first blocks alone: final norm and pooling right after block ``count`` − 1.

    Args:
        inner: Tuner under which they are computed; it only replaces weights.
        count: Number of blocks that are run.
    """

    def __init__(self, inner: Tuner, count: int) -> None:
        super().__init__()
        self.inner, self.count = inner, count

    def weights(self) -> Mapping[str, Tensor]:
        return self.inner.weights()

    def block(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        return super().block(i, block, tokens) if i < self.count else tokens


class Branches(Tuner):
    """Features under several tuners of the last blocks, side by side [B, S · F]; the first blocks run once.

    Args:
        shared: Tuner of the first blocks; it only replaces their weights.
        branches: S tuners of the other blocks; each only replaces weights of these.
        count: Number of first blocks.
    """

    rides_blocks = False  # ``model`` returns what runs the blocks

    def __init__(self, shared: Tuner, branches: Sequence[Tuner], count: int) -> None:
        super().__init__()
        self.shared, self.branches, self.count = shared, nn.ModuleList(branches), count

    def weights(self) -> Mapping[str, Tensor]:
        return self.shared.weights()

    def model(self, model: nn.Module) -> Any:
        return _Branching(self, model)


class _Branching:
    """A timm model for one forward pass, whose last blocks run once per branch."""

    def __init__(self, tuner: Branches, vit: Any) -> None:
        self.tuner, self.vit = tuner, vit

    def forward_features(self, images: Tensor) -> Tensor:
        tokens, blocks = started(self.vit, images, self.tuner.prompts_at)
        for i, block in enumerate(blocks[: self.tuner.count]):
            tokens = self.tuner.block(i, block, tokens)
        rest = _LastBlocks(self.vit)
        parts = []
        for branch in self.tuner.branches:
            swapped = {f"model.{name}": weight for name, weight in branch.weights().items()}  # type: ignore[operator]
            parts.append(functional_call(rest, swapped, (self.tuner, blocks, tokens)))
        return torch.cat(parts, dim=1)

    def forward_head(self, features: Tensor, pre_logits: bool) -> Tensor:
        return features


class _LastBlocks(nn.Module):
    """The blocks after the first, final norm and pooling, as a module in which weights can be replaced for one call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tuner: Branches, blocks: Sequence[Any], tokens: Tensor) -> Tensor:
        for i, block in enumerate(blocks[tuner.count :], tuner.count):
            tokens = tuner.block(i, block, tokens)
        return tuner.finish(self.model, tokens)
