"""Chooses backbones to be used together: greedily, by the leave-one-out accuracy of ridge regression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cil.classifiers.base import Array
from cil.classifiers.scales import BlockScales
from cil.selection.transferability import ridge_leave_one_out
from cil.utils.precision import exact


@exact()
def choose_together(features: Sequence[Tensor], labels: Array, most: int) -> list[tuple[int, float]]:
    """Greedy forward selection: the candidate is added with which the accuracy is highest, as long as it increases.

    The accuracy is that of :func:`~cil.selection.transferability.ridge_leave_one_out` on the features side by side,
    each candidate's with the mean square 1 (``combine.scale: rms``). Of equal candidates the first is chosen.

    Args:
        features: [N, F_k] of each candidate, on the same images.
        labels: int64 [N].
        most: Largest number of backbones, ≥ 1.

    Returns:
        For each chosen candidate in order its position, and the accuracy in [0, 1] with it and those before it, which
        strictly increases.

    Raises:
        DataError: As :func:`~cil.selection.transferability.scores`.
    """
    scaled = [BlockScales([x.shape[1]]).fit(x)(x.double()) for x in features]
    chain: list[tuple[int, float]] = []
    while len(chain) < min(most, len(scaled)):
        members = [k for k, _ in chain]
        tried = {
            k: ridge_leave_one_out(torch.cat([scaled[j] for j in (*members, k)], dim=1), labels)[0]
            for k in range(len(scaled))
            if k not in members
        }
        best = max(tried, key=lambda k: tried[k])
        if chain and tried[best] <= chain[-1][1]:
            break
        chain.append((best, tried[best]))
    return chain
