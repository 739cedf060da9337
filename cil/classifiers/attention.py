"""Attention of one token per image over tokens that all images share (PROOF), without a sequence per image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SharedAttention(nn.Module):
    """A block LayerNorm(x + out(softmax(q kᵀ/√d) v)) of single-head attention over [image, shared tokens].

    The shared tokens are the same for every image b, so the attention of query i is a mixture of two parts: with
    probability σ(s_ib − log Σ_j exp s_ij), j over the shared tokens, it is the image's value, and else the shared
    tokens' own attention. That is exact, and costs O((B + M) d² + B M d) in place of O(B M d²) for M shared tokens.

    While it trains, probabilities and outputs have dropout. Of the shared probabilities all images of a step have the
    same mask.

    Args:
        width: Width d of the tokens.
        dropout: Share of dropped values in training.
    """

    def __init__(self, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Parameter(torch.zeros(width, width)) for _ in range(3))
        self.out = nn.utils.skip_init(nn.Linear, width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.requires_grad_(False).eval()

    def draw(self, generator: torch.Generator) -> None:
        """Queries, keys and values from N(0, 1/d); the output map from N(0, 1/d), which is Xavier's, without a bias."""
        for p in (self.query, self.key, self.value, self.out.weight):
            drawn = torch.randn(p.shape, generator=generator, device=generator.device)
            p.data.copy_(drawn / math.sqrt(len(p)))
        self.out.bias.data.zero_()

    def forward(self, images: Tensor, shared: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Outputs of the images' tokens [B, d], and in each image's sequence those of the first shared ones.

        Args:
            images: Tokens [B, d], one per image.
            shared: Tokens [M, d] that are in every image's sequence.
            count: Number of shared tokens whose outputs are needed.

        Returns:
            ([B, d], [B, count, d]).
        """
        queries = torch.cat([images, shared[:count]])
        scores = queries @ self.query @ (shared @ self.key).T / math.sqrt(len(self.key))  # [B + count, M]
        own_keys, own_values = images @ self.key, images @ self.value
        among = self.dropout(scores.softmax(1)) @ (shared @ self.value)
        rest = scores.logsumexp(1)
        own = (images @ self.query * own_keys).sum(1) / math.sqrt(len(self.key))
        of_image = self._mixed(own - rest[: len(images)], among[: len(images)], own_values)
        cross = own_keys @ (shared[:count] @ self.query).T / math.sqrt(len(self.key))  # [B, count]
        of_shared = self._mixed(cross - rest[len(images) :], among[len(images) :][None], own_values[:, None])
        return self.norm(images + of_image), self.norm(shared[:count] + of_shared)

    def _mixed(self, odds: Tensor, among: Tensor, own: Tensor) -> Tensor:
        """out(p · own + (1 − p) · among) with p = σ(odds); the linear map is applied before the parts are mixed."""
        weight, p = self.out.weight, odds.sigmoid()
        mixed = (1 - p)[..., None] * (among @ weight.T) + self.dropout(p)[..., None] * (own @ weight.T)
        return self.dropout(mixed + self.out.bias)
