"""Forward passes that return tokens: for tuners that only replace weights.

Shapes: B images, N tokens (class and register tokens first), D the embedding width, F the feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

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
