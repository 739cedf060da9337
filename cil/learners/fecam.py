"""FeCAM: Mahalanobis distances to class means, with one covariance per class."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from cil.classifiers import Mahalanobis
from cil.learners.bases.first_session import AdaptOnce


class FeCAM(AdaptOnce):
    """FeCAM (Goswami et al., arXiv 2309.14062), in the order of the authors' ViT scripts.

    u = f/‖f‖. Each class has the mean μ_c and the covariance Σ_c of its u_i. Σ_c is shrunk to
    Σ_s = Σ + α₁ v₁ I + α₂ v₂ (1 − I), v₁ and v₂ the mean variance and the mean covariance, and normalised to
    correlations Σ̂; the prediction is argmin_c (u − μ_c)ᵀ Σ̂_c⁻¹ (u − μ_c). Nothing is trained (``tuner`` adds the
    first-task adaptation that another toolbox uses). Keeps (F² + 3F)/2 numbers per class. One forward pass per image.
    """

    class Config(AdaptOnce.Config):
        shrinkage: tuple[NonNegativeFloat, NonNegativeFloat] = Field(
            (1.0, 0.0), description="shrinkage weights α₁ ≥ 0 of the mean variance and α₂ ≥ 0 of the mean covariance"
        )
        tukey: PositiveFloat = Field(
            1.0, description="exponent > 0 of the power transform of features; 1: none, as for ViTs"
        )
        normalize: bool = Field(True, description="whether to L2-normalise features")
        correlation: bool = Field(True, description="whether to normalise covariances to correlations")

        covariance_rank: PositiveInt | None = Field(
            None,
            description="number r ≥ 1 of directions that are kept of each class's covariance, beside its diagonal: r F "
            "numbers per class in place of F²/2, and as many products per image; null: all",
        )

    name = "fecam"
    summary = "Mahalanobis distance to class means, one covariance per class"
    trains = "nothing, or a tuner on the first task"
    paper = "Goswami et al., FeCAM, NeurIPS 2023, arXiv 2309.14062"

    def make_classifier(self) -> Mahalanobis:
        config = self.config
        return Mahalanobis(
            self.width,
            shrinkage=config.shrinkage,
            normalize=config.normalize,
            tukey=config.tukey,
            correlation=config.correlation,
            rank=config.covariance_rank,
        )
