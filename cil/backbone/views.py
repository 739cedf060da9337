"""The blocks of timm's ViT families behind one interface: what tuners see of a block, whatever the family.

The plain ``Block`` of ``VisionTransformer`` has this interface itself, so it is its own view. The blocks of ``Eva``
(EVA-02, DINOv3, Perception Encoder) and ``Beit`` are called with rotary or relative positions, and scale their branches
by parameters. Their views are light objects made for one forward pass. They hold no weights and read those of the block
when they are called, so that replaced weights act.

Positions of foreign tokens (prompts) carry no information: rotary rows turn by no angle, and relative biases are zero.

Shapes: B images, N tokens, D the embedding width, A the attention width, heads × head width d.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from cil.errors import BackboneError

Place = Literal["front", "end"]
"""Where a tuner inserts foreign tokens: right behind the model's own prefix tokens, or after all of its tokens."""

LAYOUTS: dict[type[nn.Module], tuple[type[nn.Module], tuple[type[nn.Module], ...]]] = {
    VisionTransformer: (Block, (Attention,)),
    Eva: (EvaBlock, (EvaAttention, AttentionRope)),
    Beit: (BeitBlock, (BeitAttention,)),
}
"""Family → the block and the attentions that have a view."""


def require_views(model: nn.Module) -> None:
    """Refuse models that token-level tuners do not fit.

    Raises:
        BackboneError: The model is of none of the families in :data:`LAYOUTS`, or has other blocks than their plain
            pre-norm block, or another attention, or gated attention in a plain ViT.
    """
    what = ""
    kind = next((kind for kind in LAYOUTS if isinstance(model, kind)), None)
    if kind is None:
        what = type(model).__name__
    else:
        expected, attentions = LAYOUTS[kind]
        for block in model.blocks:  # type: ignore[union-attr]
            attention = getattr(block, "attn", None)
            if type(block) is not expected:
                what = f"one with {type(block).__name__}"
            elif type(attention) not in attentions:
                what = f"one with {type(attention).__name__}"
            elif kind is VisionTransformer and getattr(attention, "gate", None) is not None:
                what = "one with gated attention"
    if what:
        raise BackboneError(
            "token-level tuners fit timm's VisionTransformer with plain pre-norm blocks (ViT, DeiT, CLIP, DINOv2, "
            "SigLIP), Eva (EVA-02, DINOv3, Perception Encoder) and Beit; this backbone is "
            f"{what}. Tuners that change weights (LoRA, BitFit, full) and learners on frozen features work with it"
        )


class View:
    """A block for one forward pass, with the attributes of timm's plain ``Block``.

    Args:
        block: The timm block.
        prefix: Number of the model's own prefix tokens (class and registers).
        place: Where foreign tokens stand, if there are any.
    """

    def __init__(self, block: Any, prefix: int, place: Place) -> None:
        self.block, self.prefix, self.place = block, prefix, place

    @property
    def norm1(self) -> Any:
        return self.block.norm1

    @property
    def norm2(self) -> Any:
        return self.block.norm2

    @property
    def mlp(self) -> Any:
        return self.block.mlp

    @property
    def drop_path1(self) -> Any:
        return self.block.drop_path1

    @property
    def drop_path2(self) -> Any:
        return self.block.drop_path2

    def ls1(self, x: Tensor) -> Tensor:
        return x if self.block.gamma_1 is None else self.block.gamma_1 * x

    def ls2(self, x: Tensor) -> Tensor:
        return x if self.block.gamma_2 is None else self.block.gamma_2 * x

    def attn(self, u: Tensor) -> Tensor:
        """Attention of normalised tokens, [B, N, D] → [B, N, D]."""
        raise NotImplementedError

    def qkv(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, heads, N, d] each, after norms, biases and rotation."""
        raise NotImplementedError

    def foreign_queries(self, u: Tensor) -> Tensor:
        """Queries [B, heads, T, d] of normalised foreign tokens [B, T, D], which have no position."""
        queries, norm = self._projected(u)[0], getattr(self.block.attn, "q_norm", None)
        return queries if norm is None else norm(queries)

    def mask(self, length: int) -> Tensor | None:
        """What is added to the scores of ``length`` tokens, [heads, N, N] or [1, heads, N, N]; None for nothing."""
        return None

    def mix(self, u: Tensor, mixed: Tensor) -> Tensor:
        """From the heads' outputs [B, N, A] to the attention's, [B, N, D]; ``u`` is the attention's input."""
        attention = self.block.attn
        if hasattr(attention, "norm"):
            mixed = attention.norm(mixed)
        if getattr(attention, "gate", None) is not None:
            mixed = mixed * attention.gate(u).sigmoid()
        return attention.proj_drop(attention.proj(mixed))

    def __call__(self, x: Tensor) -> Tensor:
        """Run the whole block, [B, N, D] → [B, N, D]."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _projected(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as the projections give them, [B, heads, N, d] each."""
        attention = self.block.attn
        if attention.qkv is None:
            return tuple(
                projection(u).unflatten(2, (-1, self.head_width)).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
        if getattr(attention, "q_bias", None) is None:
            qkv = attention.qkv(u)
        else:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
            separate = attention.qkv_bias_separate
            qkv = attention.qkv(u) + bias if separate else functional.linear(u, attention.qkv.weight, bias)
        return qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    @property
    def head_width(self) -> int:
        attention = self.block.attn
        return int(attention.proj.in_features // attention.num_heads)


class PlainView(View):
    """A plain ``Block``, for :func:`cil.backbone.vit.prefixed_branch` alone; its own forward pass needs no view."""

    def __init__(self, block: Any) -> None:
        super().__init__(block, 0, "end")

    def ls1(self, x: Tensor) -> Tensor:
        return self.block.ls1(x)

    def qkv(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.block.attn
        q, k, v = self._projected(u)
        return attention.q_norm(q), attention.k_norm(k), v


class EvaView(View):
    """A block of ``Eva`` with its rotary embedding, [N of patches, 2 d] or with dimensions before; None for none."""

    def __init__(self, block: Any, prefix: int, place: Place, rope: Tensor | None) -> None:
        super().__init__(block, prefix, place)
        self.rope = rope

    def _rope(self, length: int) -> Tensor | None:
        """The rotary embedding of ``length`` tokens without the model's prefix tokens: foreign ones do not turn."""
        if self.rope is None:
            return None
        foreign = length - self.prefix - self.rope.shape[-2]
        if not foreign:
            return self.rope
        rows = self.rope.new_zeros(*self.rope.shape[:-2], foreign, self.rope.shape[-1])
        rows[..., rows.shape[-1] // 2 :] = 1  # sines, then cosines
        return torch.cat([rows, self.rope] if self.place == "front" else [self.rope, rows], dim=-2)

    def attn(self, u: Tensor) -> Tensor:
        return self.block.attn(u, rope=self._rope(u.shape[1]))

    def qkv(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.block.attn
        q, k, v = self._projected(u)
        q, k = attention.q_norm(q), attention.k_norm(k)
        rope = self._rope(u.shape[1])
        if rope is not None:
            half, first = getattr(attention, "rotate_half", False), self.prefix
            q, k = (
                torch.cat([x[:, :, :first], apply_rot_embed_cat(x[:, :, first:], rope, half=half)], dim=2).type_as(v)
                for x in (q, k)
            )
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return q, k, v


class BeitView(View):
    """A block of ``Beit`` with the relative position bias that all blocks share, [heads, N, N]; None for none."""

    def __init__(self, block: Any, prefix: int, place: Place, shared: Tensor | None) -> None:
        super().__init__(block, prefix, place)
        self.shared = shared

    def _bias(self) -> Tensor | None:
        """The relative position bias of the model's own tokens, [heads, N, N] or [1, heads, N, N]."""
        if self.block.attn.relative_position_bias_table is None:
            return self.shared
        bias: Tensor = self.block.attn._get_rel_pos_bias()
        return bias if self.shared is None else bias + self.shared

    def mask(self, length: int) -> Tensor | None:
        bias = self._bias()
        if bias is None or length == bias.shape[-1]:
            return bias
        foreign, at = length - bias.shape[-1], self.prefix if self.place == "front" else bias.shape[-1]
        for dim in (-2, -1):
            shape = list(bias.shape)
            shape[dim] = foreign
            before, after = bias.narrow(dim, 0, at), bias.narrow(dim, at, bias.shape[dim] - at)
            bias = torch.cat([before, bias.new_zeros(shape), after], dim=dim)
        return bias

    def attn(self, u: Tensor) -> Tensor:
        bias = self._bias()
        if bias is None or u.shape[1] == bias.shape[-1]:
            return self.block.attn(u, shared_rel_pos_bias=self.shared)
        return self.mix(u, attend(self.block.attn, *self.qkv(u), self.mask(u.shape[1])))

    def qkv(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._projected(u)


def attend(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ · scale + mask) v, computed as the timm ``attention`` computes it.

    Args:
        attention: The timm attention, for its implementation, scale and dropout.
        q: Queries [B, heads, N, d].
        k: Keys [B, heads, M, d].
        v: Values [B, heads, M, d].
        mask: Added to the scores, [heads, N, M] or [1, heads, N, M]; None for nothing.

    Returns:
        The heads side by side, [B, N, A].
    """
    if attention.fused_attn:
        dropout = attention.attn_drop.p if attention.training else 0.0
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    else:  # timm's explicit computation, which is faster on some machines
        scores = q * attention.scale @ k.transpose(-2, -1)
        out = attention.attn_drop((scores if mask is None else scores + mask).softmax(dim=-1)) @ v
    return out.transpose(1, 2).flatten(2)


def started(vit: Any, images: Tensor, place: Place) -> tuple[Tensor, list[Any]]:
    """Tokens [B, N, D] of images [B, 3, H, W] before the first block, and what tuners get as the blocks.

    Args:
        vit: A model that :func:`require_views` accepts.
        images: Normalised images.
        place: Where the tuner inserts foreign tokens.
    """
    tokens, prefix = vit.patch_embed(images), vit.num_prefix_tokens
    if isinstance(vit, Eva):
        tokens, rope = vit._pos_embed(tokens)
        ropes = rope if getattr(vit, "rope_mixed", False) and rope is not None else [rope] * len(vit.blocks)
        views = [EvaView(block, prefix, place, ropes[i]) for i, block in enumerate(vit.blocks)]
        return vit.norm_pre(tokens), list(views)
    if isinstance(vit, Beit):
        tokens = torch.cat((vit.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        tokens = vit.pos_drop(tokens if vit.pos_embed is None else tokens + vit.pos_embed)
        shared = vit.rel_pos_bias() if vit.rel_pos_bias is not None else None
        return tokens, [BeitView(block, prefix, place, shared) for block in vit.blocks]
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(tokens))), list(vit.blocks)
