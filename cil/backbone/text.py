"""The text side of a vision-language backbone: vectors of texts, and the space that images share with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from cil.utils.precision import exact


class TextTower(Protocol):
    """What turns texts into vectors."""

    fingerprint: str
    """sha256 over its weights, its vocabulary, and how it cuts texts."""
    version: str
    """Version of the code that computes the vectors."""

    def __call__(self, texts: Sequence[str], device: torch.device) -> Tensor: ...


class TextSide:
    """Everything of a vision-language model but its image tower: frozen, and not part of any learner's state.

    Images and texts meet in a *joint* space of width d. The image tower's pooled features [B, F] are one matrix away
    from it. The text tower is built when the first text is encoded, so that runs without texts, and predictions, never
    need it.

    Args:
        width: Width d of the joint space.
        scale: The factor s of cosines in the model's own logits, exp(logit_scale): near 100 after training.
        bias: What SigLIP adds to every logit; 0 for the others. It is the same for all classes.
        projection: The matrix from features to the joint space, float32 [F, d]; None if the features are in it.
        offset: A vector added after the projection, float32 [d]; None for most models.
        tower: Builds the text tower.

    Attributes:
        known: Vectors of each group of texts that was encoded or read so far.
    """

    def __init__(
        self,
        width: int,
        scale: float,
        bias: float,
        projection: Tensor | None,
        offset: Tensor | None,
        tower: Callable[[], TextTower],
    ) -> None:
        self.width, self.scale, self.bias = width, scale, bias
        self.projection, self.offset = projection, offset
        self._build = tower
        self.known: dict[tuple[str, ...], Tensor] = {}

    @cached_property
    def tower(self) -> TextTower:
        """The text tower; building it reads its weights."""
        return self._build()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the text tower's :attr:`~TextTower.fingerprint`, the projection, the scale and the bias."""
        digest = hashlib.sha256(f"{self.tower.fingerprint} {self.scale!r} {self.bias!r}".encode())
        for tensor in (self.projection, self.offset):
            digest.update(b"none" if tensor is None else tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @exact()
    def encode(self, texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Vectors of texts in the joint space, float32 [n, d] on the CPU, not normalised.

        The number of texts in a call can change the last bits, so callers encode the texts of one class together.
        """
        return self.tower(texts, torch.device(device)).float().cpu()

    def __deepcopy__(self, memo: object) -> TextSide:
        return self  # frozen, and large: copies of a backbone share it
