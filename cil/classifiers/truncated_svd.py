"""Least squares on random features through a singular value decomposition that is truncated as it grows: LoRanPAC."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classifiers.base import Array
from cil.classifiers.random_features import RandomFeatures
from cil.classifiers.ridge import RESOLVED
from cil.errors import ConfigError
from cil.precision import exact, without_autocast


class TruncatedSVD(RandomFeatures):
    """Minimum-norm least squares of one-hot labels on the leading singular directions of H: LoRanPAC (2410.00645).

    Random features are so alike that HᵀH is singular to working precision, and ridge regression's answer then hangs on
    rounding. So the left singular pairs (U, σ) of Hᵀ are kept instead of HᵀH, block by block of m samples: with
    B = UᵀHᵀ, QR = Hᵀ − UB and [[diag σ, B], [0, R]] = U' diag(σ') V'ᵀ the pairs become [U Q]U' and σ'; of these the
    first min(round((1−τ)n), round((1−τ)M), r) stay, n the samples so far. Then W = U diag(1/(σ²+λ)) UᵀHᵀY.

    Memory and time do not grow with the tasks once r pairs are kept: O(M(r+m)²) a block, never M³. With τ = 0 and no
    ``rank`` nothing is cut, and W is the limit of ridge regression for λ → 0, however the samples were cut into calls.
    Otherwise what was cut is lost, so the result depends on where blocks end.

    Args:
        feature_dim: Feature width F.
        projection: Width M of the random features; None: H = F, M = feature_dim.
        truncation: τ, 0 ≤ τ < 1, share of the directions that is cut.
        rank: r, the most directions kept; None: no limit.
        strength: Ridge λ ≥ 0 in addition.
        block: Samples m an update takes at most; the rest of a call is a smaller block.

    Buffers:
        basis: float64 [k, M], Uᵀ. singular_values: float64 [k], σ, descending. smallest: float64 scalar, the last
        block's smallest σ' before the cut. targets: float64 [C, M], YᵀH. counts: int64 [C].
        projection: float32 [F, M], R; zero until drawn.

    Raises:
        ConfigError: An argument is out of range.
    """

    basis: Tensor
    singular_values: Tensor
    smallest: Tensor

    def __init__(
        self,
        feature_dim: int,
        projection: int | None = None,
        truncation: float = 0.25,
        rank: int | None = None,
        strength: float = 0.0,
        block: int = 2000,
    ) -> None:
        super().__init__(feature_dim, projection)
        if not 0 <= truncation < 1:
            raise ConfigError(f"TruncatedSVD: truncation is {truncation}; it must be at least 0 and below 1")
        if rank is not None and rank < 1:
            raise ConfigError(f"TruncatedSVD: rank is {rank}; it must be at least 1, or None")
        if not 0 <= strength < math.inf:
            raise ConfigError(f"TruncatedSVD: strength is {strength}; it must be finite and not negative")
        if block < 1:
            raise ConfigError(f"TruncatedSVD: block is {block}; it must be at least 1")
        self.truncation, self.rank, self.strength, self.block = truncation, rank, strength, block
        self.register_buffer("basis", torch.zeros(0, self.width, dtype=torch.float64))
        self.register_buffer("singular_values", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("smallest", torch.zeros((), dtype=torch.float64))

    @exact()
    def partial_fit(self, features: Array, labels: Array, generator: torch.Generator | None = None) -> TruncatedSVD:
        """Add features [N, F] with labels [N].

        ``generator`` (None: a fixed one) draws the projection if that was not yet done.

        Raises:
            DataError: Shapes, types or values are wrong; nothing is learned then.
        """
        features, labels = self.taken(features, labels)
        self.drawn(generator or torch.Generator().manual_seed(0))
        for x, y in zip(features.split(self.block), labels.split(self.block), strict=True):
            h = self.expand(x)
            self.targets.index_add_(0, y, h)
            self.counts += torch.bincount(y, minlength=self.num_classes)
            self._add(h)
        return self

    def _add(self, h: Tensor) -> None:
        """Update (U, σ) by the block h [m, M], and cut."""
        inside = self.basis @ h.T  # B
        outside, rest = torch.linalg.qr(h.T - self.basis.T @ inside)  # Q, R
        below = rest.new_zeros(len(rest), len(self.singular_values))
        core = torch.cat([torch.cat([self.singular_values.diag(), inside], 1), torch.cat([below, rest], 1)])
        left, values, _ = torch.linalg.svd(core, full_matrices=False)
        # where samples span less than their number, Q holds arbitrary directions: these have no singular value
        found = int((values > values[0] * max(core.shape) * torch.finfo(values.dtype).eps).sum())
        limits = [round((1 - self.truncation) * size) for size in (int(self.counts.sum()), self.width)]
        kept = min(found, max(1, min(limits)), self.rank or found)
        self.smallest = values[max(0, found - 1)].clone()
        basis = torch.cat([self.basis.T, outside], 1) @ left[:, :kept]
        # rounding tilts the columns a little every time; QR may turn signs, and only U diag(·) Uᵀ is ever used
        self.basis, self.singular_values = torch.linalg.qr(basis).Q.T.contiguous(), values[:kept].clone()

    @without_autocast()
    def logits(self, features: Array) -> Tensor:
        features = self.checked(features)
        return self.only_seen(self.expand(features) @ self.weights.to(features.dtype))

    @property
    def weights(self) -> Tensor:
        """W, float64 [M, C]."""
        return self.solved("weights", lambda: (self.basis.T * self._inverse()) @ (self.basis @ self.targets.T))

    @property
    def condition_number(self) -> float:
        """σ₁²/σ_k² of what is kept: by how much W may multiply an error in the targets. NaN while there is nothing."""
        return self._ratio(self.singular_values[-1:])

    @property
    def uncut_condition_number(self) -> float:
        """The same before the last block's cut."""
        return self._ratio(self.smallest[None])

    def _ratio(self, smallest: Tensor) -> float:
        return float((self.singular_values[0] / smallest).square()) if len(self.singular_values) else math.nan

    @exact()
    def leave_one_out_accuracy(self, features: Array, labels: Array) -> float:
        """Share of samples [N, F], all learned before, that W would get right had it not seen their labels [N].

        The leave-one-out (PRESS) prediction for given U and σ is (ŷ_i − h_i y_i) / (1 − h_i), with the leverage
        h_i = h(x_i)ᵀ U diag(1/(σ²+λ)) Uᵀ h(x_i). Where nothing is cut and samples are fewer than directions every
        h_i is 1: W interpolates, and the formula says nothing.

        Returns:
            A fraction, or NaN if W interpolates one of the samples.

        Raises:
            DataError: Shapes, types or values are wrong.
        """
        features, labels = self.taken(features, labels)
        hits = 0
        for x, y in zip(features.split(self.block), labels.split(self.block), strict=True):
            h = self.expand(x)
            leverage = (h @ self.basis.T).square() @ self._inverse()
            if bool((leverage > 1 - RESOLVED).any()):
                return math.nan
            scores = self.only_seen(h @ self.weights - leverage[:, None] * F.one_hot(y, self.num_classes))
            hits += int((scores.argmax(1) == y).sum())  # dividing a row by 1 − h_i > 0 does not change its argmax
        return hits / len(labels)

    def _inverse(self) -> Tensor:
        return 1 / (self.singular_values.square() + self.strength)
