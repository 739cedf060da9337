"""Norms, and an order statistic of a model's weights that needs no copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 22
_DIGIT = 16


def norm(tensor: Tensor) -> float:
    """‖·‖₂ of all entries, accumulated in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def kth_largest_magnitude(tensors: Callable[[], Iterable[Tensor]], k: int, dtype: torch.dtype) -> float:
    """The k-th largest |x| over all entries of all tensors, k counted from 1; infinite for k = 0.

    A radix selection: non-negative floating point numbers order as their bit patterns do, so histograms of 16 bits at a
    time, from the top, find the exact value in two passes for float32 and four for float64, whatever the model's size.

    Args:
        tensors: Yields the tensors; called once a pass, each time with the same values.
        k: 0 ≤ k ≤ number of entries.
        dtype: float32 or float64, that of all tensors.
    """
    if k == 0:
        return float("inf")
    whole = torch.int64 if dtype == torch.float64 else torch.int32
    shift = torch.iinfo(whole).bits
    prefix = 0
    while shift:
        shift -= _DIGIT
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for tensor in tensors():
            for part in tensor.detach().abs().flatten().split(_CHUNK):
                bits = part.view(whole)
                rest = bits >> shift
                digits = rest[rest >> _DIGIT == prefix] & ((1 << _DIGIT) - 1)  # of those still in question
                counts += torch.bincount(digits, minlength=len(counts)).cpu()
        at_least = counts.flip(0).cumsum(0)  # entries whose digit is 65535, ≥ 65534, …
        place = int((at_least < k).sum())
        k -= int(at_least[place - 1]) if place else 0
        prefix = prefix << _DIGIT | (len(counts) - 1 - place)
    return float(torch.tensor(prefix, dtype=whole).view(dtype))
