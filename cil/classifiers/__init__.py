"""How features become logits. Each classifier is usable alone, on tensors or numpy arrays."""

from cil.classifiers.alignment import (
    Gaussians,
    SampledFeatures,
    mean_scales,
    normalized_cross_entropy,
    with_variation,
)
from cil.classifiers.base import Classifier, match_saved_shapes
from cil.classifiers.heads import CosineHead, Head, LinearHead
from cil.classifiers.lda import LDA
from cil.classifiers.mahalanobis import Mahalanobis
from cil.classifiers.ncm import NCM
from cil.classifiers.ridge import Ridge
from cil.classifiers.truncated_svd import TruncatedSVD

__all__ = [
    "LDA",
    "NCM",
    "Classifier",
    "CosineHead",
    "Gaussians",
    "Head",
    "LinearHead",
    "Mahalanobis",
    "Ridge",
    "SampledFeatures",
    "TruncatedSVD",
    "match_saved_shapes",
    "mean_scales",
    "normalized_cross_entropy",
    "with_variation",
]
