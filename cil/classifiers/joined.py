"""Joins the features of several backbones: weights from the first task, and scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cil.classifiers.leave_one_out import left_out_predictions, mean_log_evidence, scorable, thin_svd
from cil.classifiers.scales import BlockScales, Scale
from cil.errors import ConfigError, DataError
from cil.utils.precision import exact

Weighting = Literal["equal", "logme", "loo", "stack"]
TEMPERATURE = 0.1
"""Temperature of the softmax over LogME, that of B-Tuning (You et al., JMLR 2022)."""


class Joined(nn.Module):
    """Features of K backbones → those of one: [√w_1 x_1/r_1, …, √w_K x_K/r_K].

    Scales r (:class:`~cil.classifiers.scales.BlockScales`) and weights w, which sum to 1, come from the features and
    labels of the first task, and never change. The weights are, with the backbones' features scaled by r:

    * ``equal``: 1/K.
    * ``logme``: softmax of the log evidence per sample, divided by :data:`TEMPERATURE`.
    * ``loo``: proportional to max(0, ln(a_k/(1 − a_k)) + ln(C − 1)), the weight of multi-class boosting, with the
      leave-one-out ridge accuracy a_k.
    * ``stack``: those of least squared error ‖Y − Σ_k w_k P_k‖² on the simplex (stacking; Breiman 1996), with the
      leave-one-out ridge predictions P_k [N, C] of backbone k and one-hot labels Y.
    * K numbers ≥ 0: divided by their sum.

    Args:
        widths: Width F_k of each backbone's features.
        scale: Kind of scale.
        weights: Kind of weights, or the weights themselves.

    Buffers:
        weights: float64 [K], w; 1/K before :meth:`fit`. ``scales.factors``: √w_k / r_k.

    Raises:
        ConfigError: An argument is wrong.
    """

    weights: Tensor

    def __init__(
        self, widths: Sequence[int], scale: Scale = "rms", weights: Weighting | Sequence[float] = "equal"
    ) -> None:
        super().__init__()
        self.scales, self.weighting = BlockScales(widths, scale), weights
        if isinstance(weights, str) and weights not in get_args(Weighting):
            raise ConfigError(f"weights are {weights!r}; allowed: {', '.join(get_args(Weighting))}, or numbers")
        self.register_buffer("weights", torch.full((len(widths),), 1 / len(widths), dtype=torch.float64))

    @property
    def from_images(self) -> bool:
        """Whether scales or weights depend on the images given to :meth:`fit`."""
        return self.scales.from_images or self.weighting in ("logme", "loo", "stack")

    @exact()
    def fit(self, features: Tensor, labels: Tensor) -> Joined:
        """Set scales and weights from the first task: features [N, ΣF_k] with labels [N].

        Raises:
            DataError: The kind of weights needs two classes and a class with two images, and the task has not.
        """
        blocks = self.scales.fit(features)(features).double().split(self.scales.widths, dim=1)
        self.weights = self._weights(blocks, labels).to(self.weights)
        self.scales.fit(features, self.weights)
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Features of all backbones side by side [B, ΣF_k] → joined features [B, ΣF_k]; every image by itself."""
        return self.scales(features)

    def _weights(self, blocks: Sequence[Tensor], labels: Tensor) -> Tensor:
        if self.weighting == "equal":
            return self.weights
        if not isinstance(self.weighting, str):
            given = torch.tensor(list(self.weighting), dtype=torch.float64)
            return given / given.sum()
        try:
            scored = [scorable(block, labels) for block in blocks]
        except DataError as error:
            raise DataError(
                f"combine.weights: {self.weighting} cannot be computed on the first task: {error}; set combine.weights "
                "to equal or to numbers, or give the first task more classes or images"
            ) from None
        y = scored[0][1]
        parts = [(*thin_svd(x), x.shape[1]) for x, _ in scored]
        if self.weighting == "logme":
            evidence = torch.tensor([mean_log_evidence(u, s, width, y) for u, s, width in parts], dtype=torch.float64)
            return (evidence / TEMPERATURE).softmax(0)
        predictions = [left_out_predictions(u, s, y)[0] for u, s, _ in parts]
        return boosting_weights(predictions, y) if self.weighting == "loo" else stacking_weights(predictions, y)


def boosting_weights(predictions: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Weights by accuracy, float64 [K] with sum 1: w_k ∝ max(0, ln(a_k/(1 − a_k)) + ln(C − 1)).

    No error among N samples counts as half an error. If no member is better than chance, the weights are equal.

    Args:
        predictions: Scores [N, C] of each member.
        labels: int64 [N].
    """
    n, classes = predictions[0].shape
    found = []
    for scores in predictions:
        right = min(float((scores.argmax(1) == labels).double().mean()), 1 - 0.5 / n)
        found.append(max(0.0, math.log(right / (1 - right)) + math.log(classes - 1)) if right else 0.0)
    weights = torch.tensor(found, dtype=torch.float64)
    return weights / weights.sum() if any(found) else torch.full_like(weights, 1 / len(weights))


def stacking_weights(predictions: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Weights w ≥ 0 with sum 1 of least ‖Y − Σ_k w_k P_k‖², float64 [K].

    The minimum is at the minimum over some set of members with the others at 0, so every set is tried. Of sets that are
    equally good up to rounding, such as those of equal members, the largest is chosen.

    Args:
        predictions: P_k, scores [N, C] of each member, K ≤ 12.
        labels: int64 [N].
    """
    flat = torch.stack([scores.double().flatten() for scores in predictions])
    targets = F.one_hot(labels, predictions[0].shape[1]).double().flatten()
    m, b = flat @ flat.T, flat @ targets
    count, best, value = len(flat), torch.zeros_like(b), math.inf
    for size in range(count, 0, -1):
        for chosen in combinations(range(count), size):
            members = list(chosen)
            # stationary on Σw = 1: M w + ν = b; equal members make this singular, and their weights are then equal
            system, right = m.new_ones(size + 1, size + 1), b.new_ones(size + 1)
            system[:size, :size], right[:size], system[size, size] = m[members][:, members], b[members], 0
            w = torch.linalg.lstsq(system, right, driver="gelsd").solution[:size]
            if float(w.min()) < 0:
                continue
            w = w / w.sum()
            loss = float(w @ m[members][:, members] @ w / 2 - b[members] @ w)
            if loss < value - 1e-12 * float(m.diagonal().max()):
                best, value = torch.zeros_like(b), loss
                best[members] = w
    return best
