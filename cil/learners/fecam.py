"""FeCAM: Mahalanobis distances to class means."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, PositiveFloat

from cil.classifiers import Mahalanobis
from cil.learners.adapt_once import AdaptOnce


class FeCAM(AdaptOnce):
    """FeCAM (Goswami et al., arXiv 2309.14062), in the order of the authors' ViT scripts.

    u = f/‖f‖; per class μ_c = mean u_i and Σ_c their covariance; shrink Σ_s = Σ + α₁ v₁ I + α₂ v₂ (1 − I), normalise to
    correlations Σ̂, and predict argmin_c (u − μ_c)ᵀ Σ̂_c⁻¹ (u − μ_c). Nothing is trained (``tuner`` adds the
    first-task adaptation another toolbox uses). One forward pass an image; keeps F² + F numbers a class.
    """

    class Config(AdaptOnce.Config):
        shrinkage: tuple[NonNegativeFloat, NonNegativeFloat] = Field(
            (1.0, 0.0), description="α₁, α₂: weight of the mean variance and of the mean covariance added"
        )
        tukey: PositiveFloat = Field(1.0, description="power applied to features first; 1: none, as for ViTs")
        normalize: bool = Field(True, description="L2-normalise features first")
        correlation: bool = Field(True, description="normalise covariances to correlations")

    name = "fecam"
    paper = "Goswami et al., FeCAM, NeurIPS 2023, arXiv 2309.14062"

    def make_classifier(self) -> Mahalanobis:
        config = self.config
        return Mahalanobis(
            self.backbone.feature_dim,
            shrinkage=config.shrinkage,
            normalize=config.normalize,
            tukey=config.tukey,
            correlation=config.correlation,
        )
