"""LoRanPAC: least squares on random features through a truncated singular value decomposition, updated in blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classifiers.base import Array
from cil.classifiers.memory import DOUBLE
from cil.classifiers.random_features import RandomFeatures
from cil.classifiers.ridge import RESOLVED
from cil.errors import ConfigError, DataError
from cil.utils.precision import exact, without_autocast


class TruncatedSVD(RandomFeatures):
    """Minimum-norm least squares of one-hot labels on the leading singular directions of H: LoRanPAC (2410.00645).

    Random features are so strongly correlated that HᵀH is singular to working precision, and the solution of ridge
    regression then depends on rounding. Therefore the left singular vectors and values (U, σ) of Hᵀ are kept instead of
    HᵀH, and updated in blocks of m samples: with B = UᵀHᵀ, QR = Hᵀ − UB and
    [[diag σ, B], [0, R]] = U' diag(σ') V'ᵀ the new ones are [U Q]U' and σ'. Of these pairs the first
    min(max(round((1−τ)n), c), round((1−τ)M), r) are kept, with n the number of samples and c that of classes so far:
    with about one image per class, fewer directions could not separate them. Then W = U diag(1/(σ²+λ)) UᵀHᵀY, or the
    nearest mean by cosine as long as no class has two samples.

    Memory and time do not grow with the tasks once r pairs are kept: a block costs O(M(r+m)²), never M³. With τ = 0 and
    no ``rank`` nothing is truncated, and W is the limit of ridge regression for λ → 0, whatever the split of the
    samples over calls. Otherwise the truncated directions are lost, so the result depends on where blocks end.

    Args:
        feature_dim: Feature width F.
        projection: Width M of the random features; None: no projection, H = X and M = F.
        truncation: Share τ of the directions that is truncated, 0 ≤ τ < 1.
        rank: Largest number r of directions kept, ≥ 1; None: no limit.
        strength: Additional ridge penalty λ ≥ 0.
        block: Largest number m of samples per update, ≥ 1; the last block of a call may be smaller.

    Buffers:
        basis: float64 [k, M], Uᵀ. singular_values: float64 [k], σ, descending. smallest: float64 scalar, the
        smallest σ' of the last update before truncation. targets: float64 [C, M], YᵀH. counts: int64 [C].
        projection: float32 [F, M], R; zero until drawn.

    Raises:
        ConfigError: An argument is out of range.
    """

    truncation: float
    rank: int | None
    block: int
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
        super().__init__(feature_dim, projection, truncation=truncation, rank=rank, block=block)
        if not 0 <= truncation < 1:
            raise ConfigError(f"TruncatedSVD: truncation is {truncation}; it must be at least 0 and below 1")
        if rank is not None and rank < 1:
            raise ConfigError(f"TruncatedSVD: rank is {rank}; it must be at least 1, or None")
        if not 0 <= strength < math.inf:
            raise ConfigError(f"TruncatedSVD: strength is {strength}; it must be finite and not negative")
        if block < 1:
            raise ConfigError(f"TruncatedSVD: block is {block}; it must be at least 1")
        self.strength = strength
        self.register_buffer("basis", torch.zeros(0, self.width, dtype=torch.float64))
        self.register_buffer("singular_values", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("smallest", torch.zeros((), dtype=torch.float64))

    def kept_bytes(self, classes: int, width: int) -> float:
        directions = min(round((1 - self.truncation) * width), self.rank or width)
        return super().kept_bytes(classes, width) + DOUBLE * directions * width

    def peak_bytes(self, classes: int, width: int) -> float:
        updated = min(round((1 - self.truncation) * width), self.rank or width) + self.block
        return 3 * super().kept_bytes(classes, width) + DOUBLE * (4 * updated * width + 4 * updated**2)

    @exact()
    def partial_fit(self, features: Array, labels: Array, generator: torch.Generator | None = None) -> TruncatedSVD:
        """Add features [N, F] with labels [N].

        ``generator`` (None: a fixed one) draws the projection if that has not been done yet.

        Raises:
            DataError: A shape, type or value is wrong; nothing is learned then.
        """
        features, labels = self.prepare_fit(features, labels)
        self.ensure_drawn(generator or torch.Generator().manual_seed(0))
        for x, y in zip(features.split(self.block), labels.split(self.block), strict=True):
            h = self.expand(x)
            self.targets.index_add_(0, y, h)
            self.counts += torch.bincount(y, minlength=self.num_classes)
            self._add(h)
        return self

    def _add(self, h: Tensor) -> None:
        """Update (U, σ) by the block h [m, M], and truncate."""
        inside = self.basis @ h.T  # B
        outside, rest = torch.linalg.qr(h.T - self.basis.T @ inside)  # Q, R
        below = rest.new_zeros(len(rest), len(self.singular_values))
        core = torch.cat([torch.cat([self.singular_values.diag(), inside], 1), torch.cat([below, rest], 1)])
        left, values, _ = torch.linalg.svd(core, full_matrices=False)
        # if samples are linearly dependent, Q has arbitrary columns, whose singular values are zero
        resolved = int((values > values[0] * max(core.shape) * torch.finfo(values.dtype).eps).sum())
        limits = [round((1 - self.truncation) * size) for size in (int(self.counts.sum()), self.width)]
        limits[0] = max(limits[0], int((self.counts > 0).sum()))
        kept = min(resolved, max(1, min(limits)), self.rank or resolved)
        self.smallest = values[max(0, resolved - 1)].clone()
        basis = torch.cat([self.basis.T, outside], 1) @ left[:, :kept]
        # QR restores orthogonality, which rounding reduces; it may flip signs, but only U diag(·) Uᵀ is used
        self.basis, self.singular_values = torch.linalg.qr(basis).Q.T.contiguous(), values[:kept].clone()

    @without_autocast()
    def logits(self, features: Array) -> Tensor:
        features = self.checked(features)
        return self.only_seen(self.expand(features) @ self.weights.to(features.dtype))

    @property
    def weights(self) -> Tensor:
        """W, float64 [M, C]."""
        return self.cached("weights", self._solve)

    def _solve(self) -> Tensor:
        if not bool((self.counts > 1).any()):
            return self.nearest_mean()
        return (self.basis.T * self._inverse()) @ (self.basis @ self.targets.T)

    @property
    def condition_number(self) -> float:
        """σ₁²/σ_k² of the kept directions: the factor by which W may amplify errors in the targets. NaN without any."""
        return self._ratio(self.singular_values[-1:])

    @property
    def uncut_condition_number(self) -> float:
        """The same ratio before the truncation of the last update."""
        return self._ratio(self.smallest[None])

    def _ratio(self, smallest: Tensor) -> float:
        return float((self.singular_values[0] / smallest).square()) if len(self.singular_values) else math.nan

    @exact()
    def leave_one_out_accuracy(self, features: Array, labels: Array) -> float:
        """Estimate the share of samples [N, F], all learned before, that W would classify correctly without them.

        The leave-one-out (PRESS) prediction for given U and σ is (ŷ_i − h_i y_i) / (1 − h_i), with the leverage
        h_i = h(x_i)ᵀ U diag(1/(σ²+λ)) Uᵀ h(x_i). If nothing is truncated and there are fewer samples
        than directions, every h_i is 1: W interpolates, and the estimate is undefined.

        Returns:
            A fraction in [0, 1], or NaN if W interpolates one of the samples.

        Raises:
            DataError: A shape, type or value is wrong.
        """
        features = self.checked(features).double()
        labels = self.checked_labels(labels, len(features))
        if not len(labels) or not bool(torch.isin(labels, self.counts.nonzero()).all()):
            raise DataError("TruncatedSVD.leave_one_out_accuracy: give samples of classes that were learned before")
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
