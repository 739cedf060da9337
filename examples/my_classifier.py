"""A custom classifier, and a learner that uses it."""

import torch
from pydantic import Field

from cil.classifiers.base import StatisticsClassifier
from cil.learners.bases.first_session import AdaptOnce
from cil.utils.precision import exact


class NaiveBayes(StatisticsClassifier):
    """Gaussian naive Bayes with equal priors: score_c = −½ Σ_d [(f_d − μ_cd)² / v_cd + log v_cd].

    v_cd is the variance of feature d in class c plus ``smoothing`` times the largest variance of any feature.

    Buffers:
        counts: int64 [C]. sums, squares: float64 [C, F], of the features and of their squares.
    """

    per_class = ("counts", "sums", "squares")

    def __init__(self, feature_dim, smoothing=1e-3):
        super().__init__(feature_dim)
        self.smoothing = smoothing
        self.register_buffer("sums", torch.zeros(0, feature_dim, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(0, feature_dim, dtype=torch.float64))

    @exact()
    def partial_fit(self, features, labels):
        features, labels = self.prepare_fit(features, labels)  # checked, in float64, rows added for new labels
        self.sums.index_add_(0, labels, features)
        self.squares.index_add_(0, labels, features.square())
        self.counts += labels.bincount(minlength=self.num_classes)
        return self

    def moments(self):
        """(means, variances), float64 [C, F] each."""
        counts = self.counts.clamp(min=1)[:, None]
        means = self.sums / counts
        spread = (self.squares.sum(0) / self.counts.sum() - (self.sums.sum(0) / self.counts.sum()).square()).max()
        return means, (self.squares / counts - means.square()).clamp(min=0) + self.smoothing * spread

    def logits(self, features):
        means, variances = self.cached("moments", self.moments)  # recomputed after new samples
        x = self.checked(features)
        distances = (x.double()[:, None] - means).square() / variances + variances.log()
        return self.only_seen(-0.5 * distances.sum(2).to(x.dtype))


class NaiveBayesLearner(AdaptOnce):
    """Gaussian naive Bayes on frozen features, or on features adapted on the first task if there is a tuner."""

    class Config(AdaptOnce.Config):
        smoothing: float = Field(1e-3, gt=0, description="share of the largest variance added to every variance")

    name = "naive_bayes"
    paper = "baseline"

    def make_classifier(self):
        return NaiveBayes(self.width, self.config.smoothing)
