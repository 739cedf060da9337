"""The forward pass of a ViT with a tuner. This is the only file that depends on timm's block layout.

A :class:`Tuner` adds trainable parameters to a frozen vision transformer. The forward pass calls its hooks after the
position embedding, around every block and before pooling, and asks ``weights`` for replacement weights. The transformer
itself is never copied or modified, so any number of tuners can share it in memory.

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
    """Refuse models that token-level tuners do not fit.

    Raises:
        BackboneError: The model is not timm's VisionTransformer, or has other blocks than its plain pre-norm ``Block``
            or another attention than its plain ``Attention`` without a gate.
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
            "token-level tuners fit timm's VisionTransformer with plain pre-norm blocks (ViT, DeiT, CLIP, DINOv2, "
            f"SigLIP); this backbone is {what}. Tuners that change weights (LoRA, BitFit, full) and learners on frozen "
            "features work with it"
        )


def attention_input(block: Any, tokens: Tensor) -> Tensor:
    """Norm(x), the input of a ``Block``'s attention, [B, N, D] → [B, N, D]."""
    return block.norm1(tokens)


def attention_branch(block: Any, tokens: Tensor) -> Tensor:
    """LayerScale(Attention(Norm(x))), which the first half of a ``Block`` adds to its input, [B, N, D] → [B, N, D]."""
    return block.ls1(block.attn(attention_input(block, tokens)))


def mlp_branch(block: Any, tokens: Tensor) -> Tensor:
    """LayerScale(MLP(Norm(x))), which the second half of a ``Block`` adds to its input, [B, N, D] → [B, N, D]."""
    return block.ls2(block.mlp(block.norm2(tokens)))


def attention_half(block: Any, tokens: Tensor, branch: Tensor | None = None) -> Tensor:
    """x + DropPath(branch), the first half of a ``Block``; ``branch`` is by default its :func:`attention_branch`."""
    return tokens + block.drop_path1(attention_branch(block, tokens) if branch is None else branch)


def mlp_half(block: Any, tokens: Tensor, branch: Tensor | None = None) -> Tensor:
    """x + DropPath(branch), the second half of a ``Block``; ``branch`` is by default its :func:`mlp_branch`."""
    return tokens + block.drop_path2(mlp_branch(block, tokens) if branch is None else branch)


def prefixed_branch(block: Any, tokens: Tensor, keys: Tensor, values: Tensor, *, compensate: bool = False) -> Tensor:
    """Compute :func:`attention_branch` with additional keys and values in front of those of the tokens.

    The prefix is split over the heads as it is: neither the qkv projection nor the key norm is applied to it.

    Args:
        block: A plain ``Block``.
        tokens: [B, N, D], not yet normalised.
        keys: Keys [P, A], or [B, P, A] with one prefix per image; A is the attention width, heads × head width.
        values: Values, of the same shape as ``keys``.
        compensate: Whether every query attends to the prefix with total weight 1, in addition to the weights that the
            softmax over prefix and tokens gives to the tokens (LAE, arXiv 2303.10070).

    Returns:
        [B, N, D].
    """
    attention = block.attn
    qkv = attention.qkv(block.norm1(tokens)).unflatten(2, (3, attention.num_heads, attention.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, head width] each
    q, k = attention.q_norm(q), attention.k_norm(k)

    def over_heads(prefix: Tensor, own: Tensor) -> Tensor:
        heads = prefix.to(own.dtype).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(-3, -2)
        return heads.expand(tokens.shape[0], -1, -1, -1)  # len() would fix the batch size of an exported program

    def attend(k: Tensor, v: Tensor) -> Tensor:
        if attention.fused_attn:
            dropout = attention.attn_drop.p if attention.training else 0.0
            return functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        # timm's explicit computation, which is faster on some machines
        return attention.attn_drop((q * attention.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v

    keys, values = over_heads(keys, k), over_heads(values, v)
    # with compensation the prefix takes part in the joint softmax with values of 0, and has a separate softmax as well
    shared = torch.zeros_like(values) if compensate else values
    mixed = attend(torch.cat([keys, k], dim=2), torch.cat([shared, v], dim=2))
    if compensate and keys.shape[2]:
        mixed = mixed + attend(keys, values)
    mixed = attention.norm(mixed.transpose(1, 2).flatten(2))
    return block.ls1(attention.proj_drop(attention.proj(mixed)))


def attention_width(model: Any) -> int:
    """The width of keys and values, heads × head width; it equals D in most models."""
    attention = model.blocks[0].attn
    return int(attention.num_heads * attention.head_dim)


def class_position(model: Any) -> Tensor:
    """The position embedding of the class token, [1, 1, D]; zeros if the model has none."""
    if model.pos_embed is None or model.no_embed_class or not model.has_class_token:
        return torch.zeros(1, 1, int(model.embed_dim), device=next(model.parameters()).device)
    return model.pos_embed[:, :1]


def affine_layers(model: nn.Module) -> list[str]:
    """Names of the layers whose outputs scale-and-shift tuning (SSF) changes.

    These are the patch projection; both norms, qkv, the attention projection and the MLP's linear layers of every
    block; and the final norm (``fc_norm`` in models where timm applies it after pooling).

    Raises:
        BackboneError: The model is not a plain ViT, see :func:`require_plain_vit`.
    """
    require_plain_vit(model)
    names = ["patch_embed.proj"]
    for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
        linear = [name for name, layer in block.mlp.named_modules() if isinstance(layer, nn.Linear)]
        inside = ["norm1", "attn.qkv", "attn.proj", "norm2", *(f"mlp.{name}" for name in linear)]
        names += [f"blocks.{i}.{name}" for name in inside]
    return names + final_norms(model)


def final_norms(model: nn.Module) -> list[str]:
    """Names of the norms after the last block; timm applies ``fc_norm`` after pooling."""
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
    """A small trainable module inserted into a frozen ViT. A hook that is not overridden changes nothing."""

    rides_blocks: bool = True
    """Whether the tuner needs the hooks on tokens and blocks, and thus a plain ViT. A tuner that only replaces weights
    or modules sets it to False and fits any timm model."""

    def reset(self, generator: torch.Generator) -> None:
        """Draw initial values again from ``generator`` (on the CPU); by default there is nothing to draw."""

    def model(self, model: nn.Module) -> nn.Module:
        """Return the module tree to run in place of the frozen ``model``, sharing its weights; by default ``model``."""
        return model

    def weights(self) -> Mapping[str, Tensor]:
        """Return the backbone weights that this tuner replaces, by name in the timm model; by default none."""
        return {}

    def embed(self, tokens: Tensor) -> Tensor:
        """Change tokens [B, N, D] after the position embedding, e.g. prepend or append prompts."""
        return tokens

    def block(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        """Run block i on tokens [B, N, D], e.g. with prompts of this block."""
        return self.mlp(i, block, self.attention(i, block, tokens))

    def attention(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        """Run the attention half of block i, residual included, [B, N, D] → [B, N, D]."""
        return attention_half(block, tokens)

    def mlp(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        """Run the MLP half of block i, residual included, [B, N, D] → [B, N, D]."""
        return mlp_half(block, tokens)

    def pool(self, vit: Any, tokens: Tensor) -> Tensor:
        """Pool tokens [B, N, D] after the final norm to features [B, F]; remove prompts before timm's own pooling."""
        return vit.forward_head(tokens, pre_logits=True)


class TunedForward(nn.Module):
    """The forward pass, as a module in which ``torch.func.functional_call`` can replace weights for one call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tuner: Tuner | None) -> Tensor:
        """Compute features [B, F] of images [B, 3, H, W]; without a tuner they equal timm's own."""
        vit: Any = self.model if tuner is None else tuner.model(self.model)  # timm's modules are not typed
        if tuner is None or not tuner.rides_blocks:
            return vit.forward_head(vit.forward_features(images), pre_logits=True)
        require_plain_vit(vit)
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        tokens = tuner.embed(tokens)
        for i, block in enumerate(vit.blocks):
            tokens = tuner.block(i, block, tokens)
        return tuner.pool(vit, vit.norm(tokens))
