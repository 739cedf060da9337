"""Losses of class scores: softmax cross-entropy over all classes or the task's own, and CosFace."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from cil.training.recipe import Recipe

Loss = Callable[..., tuple[Tensor, Tensor]]
"""(inputs, labels) → (scalar loss, logits [B, C]); (*inputs, labels) if the data has several inputs."""


def cross_entropy(logits_of: Callable[[Tensor], Tensor], recipe: Recipe, first: int = 0) -> Loss:
    """Softmax cross-entropy over the classes from ``first`` on, with the recipe's label smoothing.

    Args:
        logits_of: Inputs → logits [B, C].
        recipe: Source of the label smoothing.
        first: First class in the softmax: 0 for all classes seen, the task's first class for a local loss. No label may
            be smaller.
    """

    def loss(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(inputs)
        return F.cross_entropy(logits[:, first:], labels - first, label_smoothing=recipe.label_smoothing), logits

    return loss


def local_cross_entropy(rows_of: Callable[[Tensor], Tensor], recipe: Recipe, first: int) -> Loss:
    """As :func:`cross_entropy`, for head rows trained alone: column 0 of ``rows_of``'s logits is class ``first``."""
    return cross_entropy(lambda inputs: F.pad(rows_of(inputs), (first, 0), value=-math.inf), recipe, first)


def cosface(
    cosines_of: Callable[[Tensor], Tensor], recipe: Recipe, first: int = 0, scale: float = 20.0, margin: float = 0.0
) -> Loss:
    """CE(s · (cos θ_c − m · 1[c = y]), y): the true class must win by a margin (CosFace, arXiv 1801.09414).

    Args:
        cosines_of: Inputs → cosines [B, C] in [−1, 1].
        recipe: Source of the label smoothing.
        first: As in :func:`cross_entropy`.
        scale: s.
        margin: m, a cosine; 0 is softmax cross-entropy of s · cos θ.
    """

    def loss(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        cosines = cosines_of(inputs)
        target = F.one_hot(labels, cosines.shape[1]).to(cosines)
        value = cross_entropy(lambda logits: logits, recipe, first)(scale * (cosines - margin * target), labels)[0]
        return value, scale * cosines

    return loss
