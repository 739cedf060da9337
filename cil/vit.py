"""The one file that knows timm's block layout.

A :class:`Tuner` is what rides along a frozen vision transformer: the forward loop below consults it after the position
embedding, around every block and before pooling, and takes from it the weights it replaces. The transformer itself is
never copied and never edited, so any number of tuners share one in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from cil.errors import BackboneError


def attention_half(block: Any, tokens: Tensor) -> Tensor:
    """x + DropPath(LayerScale(Attention(Norm(x)))): the first half of a timm ``Block``, [B, N, D] → [B, N, D]."""
    _require_block(block)
    return tokens + block.drop_path1(block.ls1(block.attn(block.norm1(tokens))))


def mlp_half(block: Any, tokens: Tensor) -> Tensor:
    """x + DropPath(LayerScale(MLP(Norm(x)))): the second half of a timm ``Block``, [B, N, D] → [B, N, D]."""
    _require_block(block)
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def _require_block(block: nn.Module) -> None:
    if not isinstance(block, Block):
        raise BackboneError(
            f"token-level tuners need timm's plain pre-norm Block; this backbone has {type(block).__name__}. "
            "Learners on frozen features work on it"
        )


class Tuner(nn.Module):
    """What rides along a frozen ViT. Every hook does nothing until it is overridden.

    B images, N tokens (class and register tokens first), D the embedding width, F the feature width.
    """

    rides_blocks: bool = True
    """False for a tuner that only replaces weights: it then fits any timm model, not just plain ViTs."""

    def weights(self) -> Mapping[str, Tensor]:
        """Backbone weights this tuner replaces, by their name in the timm model; none by default."""
        return {}

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, D] after the position embedding: prepend or append prompts here."""
        return tokens

    def block(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        """Run block i on tokens [B, N, D]: add an adapter, insert deep prompts, scale and shift."""
        return self.mlp(i, block, self.attention(i, block, tokens))

    def attention(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        """The attention half of block i, residual included, [B, N, D] → [B, N, D]."""
        return attention_half(block, tokens)

    def mlp(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        """The MLP half of block i, residual included, [B, N, D] → [B, N, D]."""
        return mlp_half(block, tokens)

    def pool(self, vit: Any, tokens: Tensor) -> Tensor:
        """Tokens [B, N, D] after the final norm → features [B, F]; remove prompts before timm's own pooling."""
        return vit.forward_head(tokens, pre_logits=True)


class Walk(nn.Module):
    """The forward loop, as a module so that ``torch.func.functional_call`` can swap weights for the time of a call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tuner: Tuner | None) -> Tensor:
        """Images [B, 3, H, W] → features [B, F]; equal to timm's own when nothing rides along."""
        vit: Any = self.model  # timm's modules are not typed
        if tuner is None or not tuner.rides_blocks:
            return vit.forward_head(vit.forward_features(images), pre_logits=True)
        if not isinstance(vit, VisionTransformer):
            raise BackboneError(
                f"token-level tuners fit timm's VisionTransformer (ViT, DeiT, CLIP, DINOv2, SigLIP); "
                f"this backbone is {type(vit).__name__}. Learners on frozen features work on it"
            )
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        tokens = tuner.embed(tokens)
        for i, block in enumerate(vit.blocks):
            tokens = tuner.block(i, block, tokens)
        return tuner.pool(vit, vit.norm(tokens))
