"""Features of several blocks of the backbone, collected during one forward pass, with or without a tuner."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.views import require_views, started
from cil.backbone.vit import Tuner, feature_width
from cil.errors import BackboneError
from cil.tuning.blocks import chosen_of

Token = Literal["class", "mean", "std"]
"""What is taken from a block's output: the class token, or the mean or the standard deviation of the patch tokens."""
Named = Literal["half", "all", "last"]
"""Blocks by name: the last half (of an odd number the smaller half), all, or the last one."""


class Collector(Tuner):
    """Features of chosen blocks beside the backbone's own: [block i_1, block i_2, …, final].

    LayUP (Ahrens et al., TMLR 2024, arXiv 2312.08888) concatenates the class tokens of the last blocks. Here a block's
    part is [class, mean, std] of its output tokens [B, N, D], or some of the three. The mean and the standard deviation
    (with n − 1) run over the patch tokens, without the model's registers and without the prompts of a tuner. The final
    part is the feature that the same backbone and tuner have without a collector, bit for bit.

    The collected parts come from the pass that computes the final feature, so they cost no further pass, and only
    vectors are kept of each block. The collector adds nothing to the pass and has no parameters. In families whose
    blocks have no views (:func:`cil.backbone.views.require_views`), timm's ``forward_intermediates`` collects. In those
    without a sequence of tokens (Swin, Hiera, ConvNeXt) its feature maps stand for the blocks, and only their means can
    be taken; one blank image is sent through the model to learn their widths.

    Args:
        backbone: The frozen backbone.
        blocks: Blocks by name or by index, counted from 0; see :data:`Named`.
        tokens: What is taken from each block, in any order; see :data:`Token`.
        norm: Whether the model's final norm is applied to each block's tokens, or to the pooled parts where timm
            applies it after the pooling (``fc_norm``). Without it, lengths grow with depth.
        final: Whether the backbone's own feature is appended.
        tuner: Tuner that is inserted into the backbone; None: none.

    Attributes:
        blocks: Indices of the chosen blocks, ascending.
        widths: Width of every part, in the order of the features: block by block, class, mean, std; final last.
        width: Width of the features, the sum.
        frozen: Whether there is no tuner, so that the features are those of the backbone alone.

    Raises:
        BackboneError: A block does not exist or is repeated, nothing is collected, the model has no class token, timm
            cannot return what its blocks compute, or the model has feature maps and more than their means is asked for.
    """

    rides_blocks = False  # ``model`` returns what runs the blocks and the tuner's hooks

    def __init__(
        self,
        backbone: Backbone,
        blocks: Named | Sequence[int] = "half",
        tokens: Sequence[Token] = ("class", "mean"),
        *,
        norm: bool = False,
        final: bool = True,
        tuner: Tuner | None = None,
    ) -> None:
        super().__init__()
        model: Any = backbone.model
        self.inner, self.frozen = Tuner() if tuner is None else tuner, tuner is None
        self.tokens, self.norm, self.final = tuple(token for token in get_args(Token) if token in tokens), norm, final
        if unknown := [token for token in tokens if token not in get_args(Token)]:
            raise BackboneError(f"layers: unknown token {unknown[0]!r}; give some of {', '.join(get_args(Token))}")
        if not self.tokens:
            raise BackboneError(f"layers: no tokens; give some of {', '.join(get_args(Token))}")
        self.walks = (tuner is not None and tuner.rides_blocks) or _has_views(model)
        self.sequence = self.walks or "return_prefix_tokens" in _parameters(model)
        self._require(model)
        widths = [int(model.embed_dim)] * len(model.blocks) if self.walks else self._measured(backbone)
        self.blocks = _indices(blocks, len(widths))
        self.widths = tuple(widths[i] for i in self.blocks for _ in self.tokens)
        if final:
            self.widths += (feature_width(backbone, tuner),)
        self.width = sum(self.widths)

    def _require(self, model: Any) -> None:
        """Refuse what this family of models cannot give."""
        name = type(model).__name__
        if not self.walks and not _parameters(model):
            raise BackboneError(f"layers: timm's {name} does not return what its blocks compute; set layers: null")
        if not self.sequence and (self.tokens != ("mean",) or self.norm):
            raise BackboneError(
                f"layers: {name} has feature maps of different widths instead of tokens; set tokens: [mean] and "
                "norm: false"
            )
        holders = (model, getattr(model, "embeds", None))
        if "class" in self.tokens and all(getattr(holder, "cls_token", None) is None for holder in holders):
            raise BackboneError(f"layers: this {name} has no class token; set tokens: [mean] or [mean, std]")

    def _measured(self, backbone: Backbone) -> list[int]:
        """Width of what ``forward_intermediates`` returns of every block, from one blank image."""
        model: Any = backbone.model
        name, blank = type(model).__name__, next(model.parameters()).new_zeros(1, *backbone.input_size)
        try:
            with torch.inference_mode():
                tokens, kept = _forward_intermediates(model, blank, None, sequence=self.sequence)
                found = model.forward_head(tokens, pre_logits=True)
                final = model.forward_head(model.forward_features(blank), pre_logits=True)
                widths = [part.shape[2] for part, _ in kept]
        except (RuntimeError, TypeError, AttributeError, IndexError, AssertionError) as error:  # another form of output
            raise BackboneError(
                f"layers: timm's {name} does not return what its blocks compute in a form that can be collected "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); set layers: null"
            ) from None
        if self.final and not torch.equal(found, final):
            raise BackboneError(
                f"layers: what timm's {name} returns beside its blocks is not its feature; set final: false"
            )
        return widths

    def weights(self) -> Mapping[str, Tensor]:
        return self.inner.weights()

    def model(self, model: nn.Module) -> Any:
        return _Collecting(self, self.inner.model(model))

    def parts(self, vit: Any, classes: Tensor, patches: Tensor) -> list[Tensor]:
        """The chosen parts [B, D] of one block: its class token [B, D] and its patch tokens [B, N, D]."""
        take: dict[str, Callable[[], Tensor]] = {
            "class": lambda: classes,
            "mean": lambda: patches.mean(1),
            "std": lambda: patches.std(1),
        }
        found = [take[token]() for token in self.tokens]
        after_pooling = getattr(vit, "fc_norm", None) if self.norm else None
        if isinstance(after_pooling, nn.Linear):  # the projection of joint features, which is no norm
            return found
        return found if after_pooling is None else [after_pooling(part) for part in found]


class _Collecting:
    """A timm model for one forward pass, with the features that a collector collects in place of its own."""

    def __init__(self, collector: Collector, vit: Any) -> None:
        self.collector, self.vit = collector, vit

    def forward_features(self, images: Tensor) -> Tensor:
        parts, final = self._walk(images) if self.collector.walks else self._intermediates(images)
        return torch.cat([*parts, final] if self.collector.final else parts, dim=1)

    def forward_head(self, features: Tensor, pre_logits: bool) -> Tensor:
        return features

    def _walk(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Run the blocks one by one and pool each chosen output at once, so that no block's tokens are kept."""
        collector, tuner, vit = self.collector, self.collector.inner, self.vit
        tokens, blocks = started(vit, images, tuner.prompts_at)
        own, prefix, parts = tokens.shape[1], vit.num_prefix_tokens, []
        tokens = tuner.embed(tokens)
        for i, block in enumerate(blocks):
            tokens = tuner.block(i, block, tokens)
            if i in collector.blocks:
                seen = vit.norm(tokens) if collector.norm else tokens
                first = prefix + (tokens.shape[1] - own if tuner.prompts_at == "front" else 0)  # behind the prompts
                parts += collector.parts(vit, seen[:, 0], seen[:, first : first + own - prefix])
        return parts, tuner.finish(vit, tokens)

    def _intermediates(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        collector, vit = self.collector, self.vit
        tokens, kept = _forward_intermediates(
            vit, images, list(collector.blocks), sequence=collector.sequence, norm=collector.norm
        )
        parts: list[Tensor] = []
        for patches, prefix in kept:  # a model without prefix tokens has no class token, and none was asked for
            parts += collector.parts(vit, (patches if prefix is None else prefix)[:, 0], patches)
        return parts, vit.forward_head(tokens, pre_logits=True)


def _indices(blocks: Named | Sequence[int], depth: int) -> tuple[int, ...]:
    named = {"half": depth // 2 or 1, "all": depth, "last": 1}
    if not isinstance(blocks, str):
        return chosen_of(depth, sorted(blocks), "layers.blocks")
    if blocks not in named:
        raise BackboneError(f"layers.blocks: unknown {blocks!r}; give {', '.join(named)} or indices")
    return tuple(range(depth)[-named[blocks] :])


def _has_views(model: nn.Module) -> bool:
    try:
        require_views(model)
    except BackboneError:
        return False
    return True


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments of timm's ``forward_intermediates``; none if the model has no such method."""
    method = getattr(model, "forward_intermediates", None)
    return {} if method is None else inspect.signature(method).parameters


def _forward_intermediates(
    model: Any, images: Tensor, indices: list[int] | None, *, sequence: bool, norm: bool = False
) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    """What timm's pooling gets [B, …], and of each block the patch tokens [B, N, D] and the prefix tokens [B, P, D].

    A feature map [B, D, H, W] is returned as its H · W patch tokens. Without ``indices`` all blocks are returned.
    ``sequence`` says whether the model has tokens instead of feature maps.
    """
    prefixed = bool(getattr(model, "num_prefix_tokens", 0))  # timm's ViTs with relative positions fail without any
    more: dict[str, Any] = {"return_prefix_tokens": prefixed, "output_fmt": "NLC", "norm": norm} if sequence else {}
    tokens, kept = model.forward_intermediates(images, indices=indices, stop_early=False, **more)
    pairs = [part if isinstance(part, tuple) else (part, None) for part in kept]
    return tokens, [(part.flatten(2).mT if part.ndim == 4 else part, prefix) for part, prefix in pairs]
