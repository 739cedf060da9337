"""Class Gaussians with one covariance, as densities: how likely features are, and not only of which class."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cil.classifiers.base import Array
from cil.classifiers.lda import LDA
from cil.utils.precision import without_autocast


class TiedGaussians(LDA):
    """logits are log joint densities, log π_c + log N(x; μ_c, Σ), with Σ as in :class:`LDA`.

    They differ from those of LDA by terms that are the same for all classes. Their softmax is therefore LDA's, and the
    sum of their exponentials is the density of x under the mixture of the classes, by which the images of several such
    classifiers can be compared. They are float64, because densities of wide features span hundreds of digits.

    Args:
        feature_dim: Feature width F.
        shrinkage: Shrinkage s in [0, 1]; without variance, and for s = 1, Σ is spherical.

    Buffers:
        As :class:`LDA`.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(self, feature_dim: int, shrinkage: float = 0.5) -> None:
        super().__init__(feature_dim, shrinkage)
        self.share = shrinkage  # a number, where LDA may also choose it

    @without_autocast()
    def logits(self, features: Array) -> Tensor:
        x = self.checked(features).double()
        whitening, whitened, bias = self.cached("density", self._density)
        white = x @ whitening.T
        squares = white.square().sum(1, keepdim=True) - 2 * white @ whitened.T + whitened.square().sum(1)
        return self.only_seen(bias - squares / 2)

    def _density(self) -> tuple[Tensor, Tensor, Tensor]:
        """L⁻¹ [F, F] of the lower factor L of Σ, L⁻¹μ_c [C, F], and log π_c − log |L| − F/2 log 2π [C]."""
        covariance = self.covariance
        scale = self.scale_of(covariance)
        covariance.mul_(1 - self.share).diagonal().add_(max(self.share, 1e-10) * scale)
        factor = torch.linalg.cholesky(covariance)
        volume = factor.diagonal().log().sum() + self.feature_dim / 2 * math.log(2 * math.pi)
        whitening = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
        shares = self.counts.double() / self.counts.sum().clamp(min=1)
        return whitening, self.means @ whitening.T, shares.clamp(min=torch.finfo(torch.float64).tiny).log() - volume
