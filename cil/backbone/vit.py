"""The forward pass of a ViT with a tuner. This file and ``views.py`` alone depend on timm's block layout.

A :class:`Tuner` adds trainable parameters to a frozen vision transformer. The forward pass calls its hooks after the
position embedding, around every block and after the last one, and asks ``weights`` for replacement weights. The
transformer itself is never copied or modified, so any number of tuners can share it in memory.

Shapes: B images, N tokens (class and register tokens first), D the embedding width, F the feature width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cil.backbone.kept_tokens import KeptTokens
from cil.backbone.views import Place, PlainView, View, attend, require_views, started
from cil.errors import BackboneError


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
        block: A plain ``Block``, or the view of a block of another family.
        tokens: [B, N, D], not yet normalised.
        keys: Keys [P, A], or [B, P, A] with one prefix per image; A is the attention width, heads × head width.
        values: Values, of the same shape as ``keys``.
        compensate: Whether every query attends to the prefix with total weight 1, in addition to the weights that the
            softmax over prefix and tokens gives to the tokens (LAE, arXiv 2303.10070).

    Returns:
        [B, N, D].
    """
    view = block if isinstance(block, View) else PlainView(block)
    attention = view.block.attn
    u = view.norm1(tokens)
    q, k, v = view.qkv(u)  # [B, heads, N, head width] each
    mask = view.mask(tokens.shape[1])

    def over_heads(prefix: Tensor, own: Tensor) -> Tensor:
        heads = prefix.to(own.dtype).unflatten(-1, (own.shape[1], own.shape[3])).transpose(-3, -2)
        return heads.expand(tokens.shape[0], -1, -1, -1)  # len() would fix the batch size of an exported program

    keys, values = over_heads(keys, k), over_heads(values, v)
    if mask is not None:
        mask = torch.cat([mask.new_zeros(*mask.shape[:-1], keys.shape[2]), mask], dim=-1)
    # with compensation the prefix takes part in the joint softmax with values of 0, and has a separate softmax as well
    shared = torch.zeros_like(values) if compensate else values
    mixed = attend(attention, q, torch.cat([keys, k], dim=2), torch.cat([shared, v], dim=2), mask)
    if compensate and keys.shape[2]:
        mixed = mixed + attend(attention, q, keys, values, None)
    return view.ls1(view.mix(u, mixed))


def queried_branches(block: Any, tokens: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Compute :func:`attention_branch` of the tokens, and of foreign tokens that read them and are read by none.

    Foreign tokens have no position: in the families with rotary or relative ones, they neither turn nor get a bias.

    Args:
        block: A plain ``Block``, or the view of a block of another family.
        tokens: [B, N, D], not yet normalised.
        queries: The foreign tokens [B, T, D], not yet normalised.

    Returns:
        [B, N, D] and [B, T, D].
    """
    view = block if isinstance(block, View) else PlainView(block)
    attention = view.block.attn
    u, asked = view.norm1(tokens), view.norm1(queries)
    q, k, v = view.qkv(u)
    own = attend(attention, q, k, v, view.mask(tokens.shape[1]))
    found = attend(attention, view.foreign_queries(asked), k, v, None)
    return view.ls1(view.mix(u, own)), view.ls1(view.mix(asked, found))


def attention_width(model: Any) -> int:
    """The width A of keys and values, heads × head width; it equals D in most models."""
    return int(model.blocks[0].attn.proj.in_features)


def class_position(model: Any) -> Tensor:
    """The position embedding of the class token, [1, 1, D]; zeros if the model has none."""
    if model.pos_embed is None or getattr(model, "no_embed_class", False) or model.cls_token is None:
        return torch.zeros(1, 1, int(model.embed_dim), device=next(model.parameters()).device)
    return model.pos_embed[:, :1]


def key_value_rows(model: Any, i: int) -> dict[str, int]:
    """Where block i's weights compute keys and values: name of each weight → its first such row.

    One fused weight computes both, in this order; separate ones are two entries, keys first.

    Raises:
        BackboneError: Several heads of queries share keys and values.
    """
    attention, at = model.blocks[i].attn, f"blocks.{i}.attn"
    width = attention_width(model)
    if attention.qkv is not None:
        return {f"{at}.qkv.weight": width}
    if attention.k_proj.out_features != width:
        raise BackboneError(
            f"lora_kv: heads share keys and values in {at} ({attention.k_proj.out_features} of {width} rows), which "
            "this tuner has no parameters for; use lora with targets: [k_proj, v_proj]"
        )
    return {f"{at}.k_proj.weight": 0, f"{at}.v_proj.weight": 0}


def projection_rows(model: Any, i: int, parts: str) -> dict[str, int]:
    """As :func:`key_value_rows`, which it is for ``parts`` "kv"; for "qkv" with the rows of queries in front."""
    rows = key_value_rows(model, i)
    if parts == "kv":
        return rows
    fused = model.blocks[i].attn.qkv is not None
    return dict.fromkeys(rows, 0) if fused else {f"blocks.{i}.attn.q_proj.weight": 0, **rows}


def affine_layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The layers whose outputs scale-and-shift tuning (SSF) changes, with the names of their biases.

    These are the patch projection; both norms, the projections of the attention and the MLP's linear layers of every
    block; and the final norm (``fc_norm`` in models where timm applies it after pooling). A layer has one bias, of its
    own name. Only where timm keeps three biases beside a fused qkv, the layer has these, each for a third of the rows.

    Raises:
        BackboneError: The model's blocks have no views, see :func:`cil.backbone.views.require_views`.
    """
    require_views(model)
    names = ["patch_embed.proj"]
    biases: dict[str, tuple[str, ...]] = {}
    for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
        projections, linear = _linear_layers(block)
        inside = ["norm1", *projections, "attn.proj", "norm2", *linear]
        names += [f"blocks.{i}.{name}" for name in inside]
        if len(projections) == 1 and getattr(block.attn, "q_bias", None) is not None:
            biases[f"blocks.{i}.attn.qkv"] = tuple(f"blocks.{i}.attn.{part}_bias" for part in "qkv")
    return {name: biases.get(name, (f"{name}.bias",)) for name in names + final_norms(model)}


def query_value_rows(model: Any, i: int) -> list[tuple[str, int]]:
    """Where block i's weights compute queries, and where values: (name of the weight, first such row), twice.

    Raises:
        BackboneError: See :func:`key_value_rows`.
    """
    *_, (name, first) = key_value_rows(model, i).items()
    return [(name, 0), (name, 2 * first)] if first else [(f"blocks.{i}.attn.q_proj.weight", 0), (name, 0)]


def widening_layers(model: nn.Module, i: int) -> list[str]:
    """Names of block i's weights that read normalised tokens: those of queries, keys and values, and the MLP's first.

    A gated MLP has two of these, and the attention one or three.
    """
    projections, linear = _linear_layers(model.blocks[i])  # type: ignore[index]
    return [f"blocks.{i}.{name}.weight" for name in [*projections, *linear[:-1]]]


def _linear_layers(block: Any) -> tuple[list[str], list[str]]:
    """Names in a block of the layers that compute queries, keys and values, and of the MLP's linear layers in order."""
    projections = ["attn.qkv"] if block.attn.qkv is not None else ["attn.q_proj", "attn.k_proj", "attn.v_proj"]
    return projections, [f"mlp.{name}" for name, layer in block.mlp.named_modules() if isinstance(layer, nn.Linear)]


def final_norms(model: nn.Module) -> list[str]:
    """Names of the norms after the last block; timm applies ``fc_norm`` after pooling, where a CLIP model may have its
    projection."""
    return [n for n in ("norm", "fc_norm") if not isinstance(getattr(model, n, nn.Identity()), nn.Identity | nn.Linear)]


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


def first_changed_block(model: nn.Module, names: Iterable[str]) -> int:
    """The first block that differs if the weights of these names do, and nothing below it; 0 for weights elsewhere.

    Args:
        model: A timm model; only one whose blocks have views can start in the middle.
        names: Names of weights.
    """
    try:
        require_views(model)
    except BackboneError:
        return 0
    before_features = [name for name in names if not name.startswith(("norm.", "fc_norm."))]
    blocks = [re.match(r"blocks\.(\d+)\.", name) for name in before_features]
    return min((int(found[1]) if found else 0 for found in blocks), default=0)


class Unkept(dict[str, Tensor]):
    """A cache that keeps nothing: a value can be read once, right after it was stored."""

    def __contains__(self, key: object) -> bool:
        return False

    def __getitem__(self, key: str) -> Tensor:
        return self.pop(key)


def keep_no_biases(model: nn.Module) -> None:
    """Let attentions compute their position biases in every call, as in training.

    In evaluation mode some families (LeViT, TinyViT, EfficientViT, EfficientFormer) keep those of the first call, and
    would ignore the ones that a tuner replaces.
    """
    for module in model.modules():
        if hasattr(module, "attention_bias_cache"):
            setattr(module, "attention_bias_cache", Unkept())  # noqa: B010  # mypy takes it for that of a tensor


class Tuner(nn.Module):
    """A small trainable module inserted into a frozen ViT. A hook that is not overridden changes nothing."""

    rides_blocks: bool = True
    """Whether the tuner needs the hooks on tokens and blocks, and thus a ViT whose blocks have views. A tuner that only
    replaces weights or modules sets it to False and fits any timm model."""
    prompts_at: Place = "end"
    """Where the tuner inserts tokens of its own, if it does: ``front``, right behind the model's class and register
    tokens, or ``end``, after all tokens. Models with rotary or relative positions must know it."""
    width: int | None = None
    """Width of the features with this tuner, where it is not the backbone's own; None where it is."""
    first_block: int = 0
    """The first block that the tuner changes. If it is above 0, tokens before this block are those of the frozen model,
    and training without augmentation computes them once (:class:`~cil.backbone.kept_tokens.KeptTokens`)."""

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

    def finish(self, vit: Any, tokens: Tensor) -> Tensor:
        """Turn the last block's output [B, N, D] into features: by default the final norm, then :meth:`pool`."""
        return self.pool(vit, vit.norm(tokens))


def feature_width(backbone: Any, tuner: Tuner | None) -> int:
    """Width of the features of a backbone with a tuner: the tuner's, or else the backbone's ``feature_dim``."""
    own = None if tuner is None else tuner.width
    return int(backbone.feature_dim if own is None else own)


class TunedForward(nn.Module):
    """The forward pass, as a module in which ``torch.func.functional_call`` can replace weights for one call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tuner: Tuner | None, kept: KeptTokens | None = None) -> Tensor:
        """Compute features [B, F] of images [B, 3, H, W]; without a tuner they equal timm's own."""
        if kept is not None and tuner is not None and tuner.first_block:
            return self._from_first_block(images, tuner, kept)
        vit: Any = self.model if tuner is None else tuner.model(self.model)  # timm's modules are not typed
        if tuner is None or not tuner.rides_blocks:
            return vit.forward_head(vit.forward_features(images), pre_logits=True)
        require_views(vit)
        tokens, blocks = started(vit, images, tuner.prompts_at)
        tokens = tuner.embed(tokens)
        for i, block in enumerate(blocks):
            tokens = tuner.block(i, block, tokens)
        return tuner.finish(vit, tokens)

    def _from_first_block(self, images: Tensor, tuner: Tuner, kept: KeptTokens) -> Tensor:
        """The same, with the tokens before the tuner's first block from ``kept``."""
        vit: Any = self.model

        @torch.no_grad()
        def below(images: Tensor) -> Tensor:
            tokens, blocks = started(vit, images, tuner.prompts_at)
            for i, block in enumerate(blocks[: tuner.first_block]):
                tokens = tuner.block(i, block, tokens)
            return tokens

        _, blocks = started(vit, images[:1], tuner.prompts_at)  # some families make their blocks' views for a pass
        tokens = kept.before(tuner.first_block, images, below)
        for i, block in enumerate(blocks[tuner.first_block :], tuner.first_block):
            tokens = tuner.block(i, block, tokens)
        return tuner.finish(vit, tokens)
