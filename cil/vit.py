"""The one file that knows timm's block layout.

A :class:`Tuner` is what rides along a frozen vision transformer: the forward loop below consults it after the position
embedding, around every block and before pooling, and takes from it the weights it replaces. The transformer itself is
never copied and never edited, so any number of tuners share one in memory.

Shapes: B images, N tokens (class and register tokens first), D the embedding width, F the feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from cil.errors import BackboneError


def require_plain_vit(model: nn.Module) -> None:
    """Refuse what token-level tuners do not fit.

    Raises:
        BackboneError: Not timm's VisionTransformer, blocks other than its plain pre-norm ``Block``, or attention other
            than its plain ``Attention`` without a gate.
    """
    what = ""
    if not isinstance(model, VisionTransformer):
        what = type(model).__name__
    else:
        for block in model.blocks:
            attention = getattr(block, "attn", None)
            if type(block) is not Block:
                what = f"one with {type(block).__name__}"
            elif type(attention) is not Attention:
                what = f"one with {type(attention).__name__}"
            elif getattr(attention, "gate", None) is not None:
                what = "one with gated attention"
    if what:
        raise BackboneError(
            "token-level tuners fit timm's VisionTransformer of plain pre-norm blocks (ViT, DeiT, CLIP, DINOv2, "
            f"SigLIP); this backbone is {what}. Tuners of weights (LoRA, BitFit, full) and learners on frozen features "
            "work on it"
        )


def attention_input(block: Any, tokens: Tensor) -> Tensor:
    """Norm(x): what the attention of a ``Block`` reads, [B, N, D] → [B, N, D]."""
    return block.norm1(tokens)


def attention_branch(block: Any, tokens: Tensor) -> Tensor:
    """LayerScale(Attention(Norm(x))): what the first half of a ``Block`` adds to its input, [B, N, D] → [B, N, D]."""
    return block.ls1(block.attn(attention_input(block, tokens)))


def mlp_branch(block: Any, tokens: Tensor) -> Tensor:
    """LayerScale(MLP(Norm(x))): what the second half of a ``Block`` adds to its input, [B, N, D] → [B, N, D]."""
    return block.ls2(block.mlp(block.norm2(tokens)))


def attention_half(block: Any, tokens: Tensor, branch: Tensor | None = None) -> Tensor:
    """x + DropPath(branch): the first half of a ``Block``; the branch is :func:`attention_branch` unless given."""
    return tokens + block.drop_path1(attention_branch(block, tokens) if branch is None else branch)


def mlp_half(block: Any, tokens: Tensor, branch: Tensor | None = None) -> Tensor:
    """x + DropPath(branch): the second half of a ``Block``; the branch is :func:`mlp_branch` unless given."""
    return tokens + block.drop_path2(mlp_branch(block, tokens) if branch is None else branch)


def prefixed_branch(block: Any, tokens: Tensor, keys: Tensor, values: Tensor, *, compensate: bool = False) -> Tensor:
    """:func:`attention_branch` with further keys and values in front of the tokens' own.

    The prefix is split over the heads as it is: neither the qkv projection nor the key norm is applied to it.

    Args:
        block: A plain ``Block``.
        tokens: [B, N, D], not yet normalised.
        keys: [P, A], or one prefix an image: [B, P, A]; A is the attention width, heads × head width.
        values: As ``keys``.
        compensate: Every query attends to the prefix with total weight 1, besides what the softmax over all leaves to
            the tokens (LAE, arXiv 2303.10070).

    Returns:
        [B, N, D].
    """
    attention = block.attn
    qkv = attention.qkv(block.norm1(tokens)).unflatten(2, (3, attention.num_heads, attention.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, head width] each
    q, k = attention.q_norm(q), attention.k_norm(k)

    def over_heads(prefix: Tensor, own: Tensor) -> Tensor:
        heads = prefix.to(own.dtype).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(-3, -2)
        return heads.expand(tokens.shape[0], -1, -1, -1)  # len() would fix the batch of an exported program

    def attend(k: Tensor, v: Tensor) -> Tensor:
        if attention.fused_attn:
            dropout = attention.attn_drop.p if attention.training else 0.0
            return functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        # timm's own explicit path: on some machines it is the faster one
        return attention.attn_drop((q * attention.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v

    keys, values = over_heads(keys, k), over_heads(values, v)
    # with compensation the prefix takes its share of the softmax over all, but speaks through a softmax of its own
    shared = torch.zeros_like(values) if compensate else values
    mixed = attend(torch.cat([keys, k], dim=2), torch.cat([shared, v], dim=2))
    if compensate and keys.shape[2]:
        mixed = mixed + attend(keys, values)
    mixed = attention.norm(mixed.transpose(1, 2).flatten(2))
    return block.ls1(attention.proj_drop(attention.proj(mixed)))


def attention_width(model: Any) -> int:
    """heads × head width, the width of keys and values; D on all but a few models."""
    attention = model.blocks[0].attn
    return int(attention.num_heads * attention.head_dim)


def class_position(model: Any) -> Tensor:
    """What the position embedding adds to the class token, [1, 1, D]; zero where there is nothing of the kind."""
    if model.pos_embed is None or model.no_embed_class or not model.has_class_token:
        return torch.zeros(1, 1, int(model.embed_dim), device=next(model.parameters()).device)
    return model.pos_embed[:, :1]


def affine_layers(model: nn.Module) -> list[str]:
    """Names of the layers scale-and-shift tuning follows: patch projection; both norms, qkv, attention projection and
    the MLP's linear layers of every block; the final norm (``fc_norm`` where timm puts it behind the pooling).

    Raises:
        BackboneError: As :func:`require_plain_vit`.
    """
    require_plain_vit(model)
    names = ["patch_embed.proj"]
    for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
        linear = [name for name, layer in block.mlp.named_modules() if isinstance(layer, nn.Linear)]
        inside = ["norm1", "attn.qkv", "attn.proj", "norm2", *(f"mlp.{name}" for name in linear)]
        names += [f"blocks.{i}.{name}" for name in inside]
    return names + final_norms(model)


def final_norms(model: nn.Module) -> list[str]:
    """Names of the norms behind the last block; ``fc_norm`` is timm's behind the pooling."""
    return [n for n in ("norm", "fc_norm") if not isinstance(getattr(model, n, nn.Identity()), nn.Identity)]


def last_blocks(model: nn.Module, count: int) -> tuple[str, ...]:
    """Name prefixes (``"blocks.11."``) of the last ``count`` blocks and the final norm.

    Raises:
        BackboneError: ``count`` is not in 1 … number of blocks, or the model has no ``blocks``.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise BackboneError(f"training the last blocks needs a model with a list of blocks, not {type(model).__name__}")
    if not 1 <= count <= len(blocks):
        raise BackboneError(f"blocks: got {count}, this backbone has {len(blocks)}; give 1 to {len(blocks)}")
    return (*(f"blocks.{i}." for i in range(len(blocks) - count, len(blocks))), "norm.", "fc_norm.")


class Tuner(nn.Module):
    """What rides along a frozen ViT. Every hook does nothing until it is overridden."""

    rides_blocks: bool = True
    """False for a tuner that only replaces weights or modules: it then fits any timm model, not just plain ViTs."""

    def reset(self, generator: torch.Generator) -> None:
        """Draw fresh initial values from ``generator`` (on the CPU); nothing to draw by default."""

    def model(self, model: nn.Module) -> nn.Module:
        """The module tree to run in place of the frozen ``model``, sharing its weights; ``model`` itself by default."""
        return model

    def weights(self) -> Mapping[str, Tensor]:
        """Backbone weights this tuner replaces, by their name in the timm model; none by default."""
        return {}

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, D] after the position embedding: prepend or append prompts here."""
        return tokens

    def block(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        """Run block i on tokens [B, N, D]: insert deep prompts here."""
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
        vit: Any = self.model if tuner is None else tuner.model(self.model)  # timm's modules are not typed
        if tuner is None or not tuner.rides_blocks:
            return vit.forward_head(vit.forward_features(images), pre_logits=True)
        require_plain_vit(vit)
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        tokens = tuner.embed(tokens)
        for i, block in enumerate(vit.blocks):
            tokens = tuner.block(i, block, tokens)
        return tuner.pool(vit, vit.norm(tokens))
