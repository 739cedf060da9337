"""SLDA: linear discriminant analysis, class means and one covariance updated task after task."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cil.classifiers import LDA
from cil.learners.adapt_once import AdaptOnce


class SLDA(AdaptOnce):
    """Deep SLDA (Hayes and Kanan, arXiv 1909.01520), in its batch form.

    logit_c = fᵀΣ⁻¹μ_c − ½ μ_cᵀΣ⁻¹μ_c + log π_c with class means μ_c and one within-class covariance Σ of all classes,
    shrunk to (1 − s) Σ + s · tr(Σ)/F · I. All are sums over images, so the order of tasks does not matter while nothing
    is trained (``tuner`` adapts the backbone on the first task, as APER does). The paper's running covariance over a
    stream of single images approximates this Σ and depends on their order. One forward pass an image; keeps F² numbers,
    and F a class. It is the classifier of ``merge``, and so what merging has to beat.
    """

    class Config(AdaptOnce.Config):
        shrinkage: float = Field(1e-4, ge=0, le=1, description="s: the published 10⁻⁴; more for few images")
        priors: Literal["uniform", "counts"] = Field("uniform", description="π_c: all alike, or as frequent as seen")

    name = "slda"
    paper = "Hayes and Kanan, Lifelong Machine Learning with Deep Streaming LDA, CVPR-W 2020, arXiv 1909.01520"

    def make_classifier(self) -> LDA:
        return LDA(self.backbone.feature_dim, self.config.shrinkage, priors=self.config.priors)
