"""Calibration of scores: one temperature that turns them into probabilities, and means of several classifiers'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEPS = 100
HALVINGS = 40
LARGEST = 1e3
"""Largest β in units of one over the scores' spread; images that are all classified correctly would ask for ∞."""


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T > 0 whose probabilities softmax(z/T) have the least cross-entropy (Guo et al., ICML 2017).

    The loss is convex in β = 1/T: with p = softmax(βz), L(β) = mean log Σ_c exp(β z_c) − β z_y has the derivatives
    mean (E_p[z] − z_y) and mean Var_p(z) ≥ 0. Newton's steps are halved until the loss falls, so the minimum is found
    from any start. β stays in [1/1000, 1000] divided by the mean standard deviation of an image's scores: if all images
    were classified worse than by chance, the best β would be 0, and if all were classified correctly, there is none.

    Args:
        logits: Scores z of held-out images, [N, C]; −∞ for classes that cannot be predicted.
        labels: Their classes, int64 [N], each with a finite score.

    Returns:
        T; 1 if there are no images, or if no image's scores differ.
    """
    z, possible = logits.double(), logits.isfinite()
    z = torch.where(possible, z, 0)
    count = possible.sum(1).clamp(min=1)
    centred = torch.where(possible, z - (z.sum(1) / count)[:, None], 0)
    spread = float((centred.square().sum(1) / count).sqrt().mean()) if len(z) else 0.0
    if not spread > 0:
        return 1.0
    z = centred / spread  # a shift of an image's scores changes no probability
    own, impossible = z.gather(1, labels[:, None])[:, 0], torch.where(possible, 0, float("-inf"))

    def loss(beta: float) -> float:
        return float(((beta * z + impossible).logsumexp(1) - beta * own).mean())

    beta, best = 1.0, loss(1.0)
    for _ in range(STEPS):
        p = (beta * z + impossible).softmax(1)
        mean = (p * z).sum(1)
        slope, curvature = float((mean - own).mean()), float(((p * z.square()).sum(1) - mean.square()).mean())
        step = slope / max(curvature, 1e-12)
        for _ in range(HALVINGS):
            tried = min(max(beta - step, 1 / LARGEST), LARGEST)
            if (value := loss(tried)) < best:
                break
            step /= 2
        else:  # no smaller loss within rounding
            break
        beta, best = tried, value
    return spread / beta


def mean_logits(scores: Sequence[Tensor], temperatures: Tensor, weights: Tensor) -> Tensor:
    """log softmax(Σ_k w_k z_k / T_k), float64 [B, C], of scores z_k [B, C]; heads of weight 0 have no part in it."""
    parts = [
        torch.where(w > 0, w * z.double() / t, 0)  # 0 · −∞ would be NaN; a branch on w could not be exported
        for z, t, w in zip(scores, temperatures.double(), weights.double(), strict=True)
    ]
    return torch.stack(parts).sum(0).log_softmax(1)


def mean_probabilities(scores: Sequence[Tensor], temperatures: Tensor, weights: Tensor) -> Tensor:
    """log Σ_k w_k softmax(z_k / T_k), float64 [B, C], of scores z_k [B, C]; heads of weight 0 have no part in it."""
    parts = [
        (z.double() / t).log_softmax(1) + w.log()
        for z, t, w in zip(scores, temperatures.double(), weights.double(), strict=True)
    ]
    return torch.stack(parts).logsumexp(0)
