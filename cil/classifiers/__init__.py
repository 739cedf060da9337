"""Classifiers map features to logits. Each can be used on its own, on tensors or numpy arrays."""

from cil.classifiers.base import Classifier, match_saved_shapes
from cil.classifiers.gaussians import Gaussians
from cil.classifiers.heads import CosineHead, Head, LinearHead
from cil.classifiers.lda import LDA
from cil.classifiers.mahalanobis import Mahalanobis
from cil.classifiers.ncm import NCM
from cil.classifiers.parts import PartsLDA
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
    "PartsLDA",
    "Ridge",
    "TruncatedSVD",
    "match_saved_shapes",
]
