"""A synthetic text side for the checks: a text about a class is what the backbone makes of the class's clean image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cil.backbone import TextSide

SCALE = 100.0
"""That of trained CLIP models."""


class DrawnTexts:
    """A text tower without language: it finds a class's name in the text, and "draws" the class.

    Args:
        draw: Name → feature of the class's image without noise, float32 [F]; None for a name it does not know.
        projection: Orthogonal matrix [F, F] from features to the joint space.
        fingerprint: What tells the drawings from others.
    """

    version = "1"

    def __init__(self, draw: Callable[[str], Tensor | None], projection: Tensor, fingerprint: str) -> None:
        self._draw, self._projection, self.fingerprint = draw, projection, fingerprint
        width = len(projection)
        # texts and images of trained models lie in two cones: all texts share an offset
        self._gap = torch.from_numpy(np.random.RandomState(11).normal(size=width)).float()

    def __call__(self, texts: Sequence[str], device: torch.device) -> Tensor:
        return torch.stack([self._vector(text) for text in texts]).to(device)

    def _vector(self, text: str) -> Tensor:
        words = text.lower().strip(".").replace(",", "").split()
        found = next((feature for word in words if (feature := self._draw(word)) is not None), None)
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        noise = torch.from_numpy(np.random.RandomState(seed).normal(size=len(self._gap))).float()
        if found is None:
            return noise
        vector = found @ self._projection
        return vector + vector.norm() * (0.1 * self._gap + 0.02 * noise) / len(self._gap) ** 0.5


def drawn_texts(width: int, draw: Callable[[str], Tensor | None], fingerprint: str = "drawn texts") -> TextSide:
    """A text side for a backbone with features of a width, in which a text is the image of the class that it names."""
    rotation = np.linalg.qr(np.random.RandomState(7).normal(size=(width, width)))[0]
    projection = torch.from_numpy(rotation).float()
    return TextSide(width, SCALE, 0.0, projection, None, lambda: DrawnTexts(draw, projection, fingerprint))
