"""Norms, singular vectors, and an order statistic of a model's weights that needs no copy of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from cil.errors import ConfigError
from cil.merging.layout import Entry
from cil.utils.linalg import add_gram_

_CHUNK = 1 << 22
_DIGIT = 16


def require_finite(name: str, scale: float) -> None:
    """Refuse a factor on updates that is not finite.

    Args:
        name: Name of the rule, for the message.
        scale: The factor.

    Raises:
        ConfigError: It is infinite or NaN.
    """
    if not math.isfinite(scale):
        raise ConfigError(f"{name}: scale is {scale}; it must be finite")


def norm(tensor: Tensor) -> float:
    """‖·‖₂ of all entries, accumulated in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def kth_largest_magnitude(tensors: Callable[[], Iterable[Tensor]], k: int, dtype: torch.dtype) -> float:
    """Return the k-th largest |x| over all entries of all tensors, with k counted from 1; infinity for k = 0.

    This is a radix selection. Non-negative floating point numbers have the same order as their bit patterns, so
    histograms of 16 bits at a time, from the highest, give the exact value in two passes for float32 and four for
    float64, whatever the size of the model.

    Args:
        tensors: Function that yields the tensors; it is called once per pass and must always yield the same values.
        k: Rank of the wanted magnitude, 0 ≤ k ≤ number of entries.
        dtype: Dtype of all tensors, float32 or float64.
    """
    if k == 0:
        return float("inf")
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    shift = torch.iinfo(integer).bits
    prefix = 0
    while shift:
        shift -= _DIGIT
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for tensor in tensors():
            for part in tensor.detach().abs().flatten().split(_CHUNK):
                bits = part.view(integer)
                rest = bits >> shift
                digits = rest[rest >> _DIGIT == prefix] & ((1 << _DIGIT) - 1)  # of entries with this prefix
                counts += torch.bincount(digits, minlength=len(counts)).cpu()
        at_least = counts.flip(0).cumsum(0)  # entries whose digit is 65535, ≥ 65534, …
        position = int((at_least < k).sum())
        k -= int(at_least[position - 1]) if position else 0
        prefix = prefix << _DIGIT | (len(counts) - 1 - position)
    return float(torch.tensor(prefix, dtype=integer).view(dtype))


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [m, q], σ [q] descending, V [n, q] with matrix = U diag(σ) Vᵀ, q = min(m, n).

    A wide matrix is transposed first, because LAPACK takes about one and a half times as long for it. For a float32
    matrix the eigenvectors of its Gram matrix are computed in float64, which is faster. Directions up to :func:`rank`
    are as accurate as those of an SVD in float32; the others are arbitrary in both.
    """
    m, n = matrix.shape
    if m < n:
        v, sigma, u = thin_svd(matrix.T)
        return u, sigma, v
    if matrix.dtype == torch.float32:
        gram = matrix.new_zeros(n, n, dtype=torch.float64)
        add_gram_(gram, matrix.double(), block=192)
        values, vectors = torch.linalg.eigh(gram)
        sigma = values.flip(0).clamp(min=0).sqrt().to(matrix)
        v = vectors.flip(1).to(matrix)
        return matrix @ v / sigma.clamp(min=torch.finfo(sigma.dtype).tiny), sigma, v
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, sigma, vh.T


def rank(sigma: Tensor, shape: Sequence[int]) -> int:
    """Return the numerical rank: the number of σ above max(m, n) ε σ_0. Directions of the others are arbitrary."""
    return int((sigma > max(shape) * torch.finfo(sigma.dtype).eps * sigma[0]).sum())


def row_blocks(entry: Entry, matrix: Tensor, split_qkv: bool) -> tuple[Tensor, ...]:
    """Return the matrices in a linear weight: query, key and value of a fused one if split, else the weight itself."""
    return matrix.chunk(3) if split_qkv and entry.fused else (matrix,)
