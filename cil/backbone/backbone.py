"""A pre-trained timm model: frozen, fingerprinted, and called with or without a tuner."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cil.backbone.kept_tokens import KeptTokens
from cil.backbone.text import TextSide
from cil.backbone.vit import TunedForward, Tuner, keep_no_biases
from cil.errors import BackboneError

FROZEN = "frozen"
"""Version of the frozen backbone's features, the same for every learner."""


class Backbone(nn.Module):
    """A frozen timm model with the facts about it that results record.

    Args:
        model: A timm model; its classifier head is ignored.
        name: Name with the tag of the weights, as results record it.
        data_config: timm's resolved data configuration.
        text: The text side of a vision-language model.
        source_head: The classifier that the model was pre-trained with, if it is kept.
        facts: What is recorded beside name, weights and width, as plain values.

    Attributes:
        fingerprint: sha256 over the names, dtypes, shapes and bytes of all weights; equal weights have equal digests.
        feature_dim: Width F of the features.
        passes: Number of images sent through the model so far.
    """

    text: TextSide | None = None
    source_head: nn.Linear | None = None
    _kept: KeptTokens | None = None

    def __init__(
        self,
        model: nn.Module,
        name: str,
        data_config: dict[str, Any],
        text: TextSide | None = None,
        facts: Mapping[str, Any] | None = None,
        source_head: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.text, self.facts = text, dict(facts or {})
        if source_head is not None:
            object.__setattr__(self, "source_head", source_head)  # not a submodule: features do not depend on it
            self.facts["source_head"] = {"classes": source_head.out_features, "sha256": fingerprint(source_head)}
        self.tuned_forward = TunedForward(model.requires_grad_(False).eval())
        keep_no_biases(model)
        self.name, self.data_config = name, data_config
        self.feature_dim = int(model.head_hidden_size)  # type: ignore[arg-type]
        self.fingerprint = fingerprint(model)
        self.passes = 0

    @property
    def model(self) -> nn.Module:
        """The timm model itself."""
        return self.tuned_forward.model

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images, from the data configuration or else from the model."""
        timm_model: Any = self.model
        return tuple(self.data_config.get("input_size") or (3, *timm_model.patch_embed.img_size))

    @property
    def device(self) -> torch.device:
        """Device of the frozen weights."""
        return next(self.model.parameters()).device

    def forward(self, images: Tensor, tuner: Tuner | None = None) -> Tensor:
        """Compute features [B, F] of normalised images, float [B, 3, H, W], with ``tuner`` inserted.

        ``torch.compile(backbone)`` and ``backbone.compile()`` work, and tuners of one kind and size share the compiled
        code. ``fullgraph=True`` does not work, because images are counted outside the compiled graph.

        Raises:
            BackboneError: A token-level tuner does not fit this family of models.
        """
        # an exported program does not count images, and the size of its batch is not known yet
        return self._features(images, tuner) if torch.compiler.is_exporting() else self._counted(images, tuner)

    # if this function were compiled, it would be recompiled for every value of ``passes``; what it calls is compiled
    @partial(torch.compiler.disable, recursive=False)
    def _counted(self, images: Tensor, tuner: Tuner | None) -> Tensor:
        self.passes += len(images)
        return self._features(images, tuner)

    def _features(self, images: Tensor, tuner: Tuner | None) -> Tensor:
        weights = tuner.weights() if tuner is not None else {}
        kept = self._kept
        # inference tensors cannot take part in training, and a gradient of the images needs the graph
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or images.requires_grad:
            kept = None
        if weights:
            swapped = {f"model.{key}": value for key, value in weights.items()}
            return functional_call(self.tuned_forward, swapped, (images, tuner, kept))
        return self.tuned_forward(images, tuner, kept)

    @contextmanager
    def keeping_tokens(self, most_bytes: float) -> Iterator[None]:
        """Compute tokens below a tuner's first block once per image during the ``with`` block; results are the same.

        Args:
            most_bytes: Bytes that these tokens may take; see :class:`~cil.backbone.kept_tokens.KeptTokens`.
        """
        self._kept = KeptTokens(most_bytes)
        try:
            yield
        finally:
            self._kept = None

    def views(self) -> dict[Hashable, Callable[[Tensor], Tensor]]:
        """The single view of a frozen model, under the version that learners use for it; see ``Learner.views``."""
        return {FROZEN: self}

    def _apply(self, *args: Any, **kwargs: Any) -> Backbone:
        """What every move to another device or dtype calls; there timm's modules get new caches."""
        super()._apply(*args, **kwargs)
        keep_no_biases(self.model)
        return self

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: the model is frozen, so dropout and stochastic depth stay off."""
        return super().train(False)


def text_side(backbone: Backbone) -> TextSide:
    """The text side of a backbone.

    Raises:
        BackboneError: The backbone has none.
    """
    if backbone.text is None:
        raise BackboneError(
            f"this learner compares images with class names, and {backbone.name} has no text tower; use a backbone "
            "open_clip/<architecture>.<tag>, e.g. open_clip/ViT-B-16.laion400m_e32"
        )
    return backbone.text


def fingerprint(model: nn.Module) -> str:
    """Compute a sha256 over name, dtype, shape and bytes of every entry of the state dict, in the order of names."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(
            value.detach().cpu().contiguous().view(torch.uint8).numpy() if value.ndim else repr(value.item()).encode()
        )
    return digest.hexdigest()
