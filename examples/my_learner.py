"""Class means compared after whitening: a learner in one file."""

import torch
from pydantic import Field

from cil import Learner, LearnerConfig


class WhitenedMean(Learner):
    """Nearest class mean under the covariance within classes (Fisher's linear discriminant, equal priors).

    W = Σ_i (f_i − μ_{y_i})(f_i − μ_{y_i})ᵀ / n over all features so far, Σ = (1 − s) W + s tr(W)/F · I; predict
    argmax_c fᵀ Σ⁻¹ μ_c − ½ μ_cᵀ Σ⁻¹ μ_c. Nothing is trained, and each image takes one forward pass. F² + F numbers
    are kept, and F + 1 per class. Sums over images make W, so the result is the same for any order of the tasks.
    """

    class Config(LearnerConfig):
        shrinkage: float = Field(0.1, gt=0, le=1, description="share s of a scaled identity in the covariance")

    name = "whitened_mean"
    paper = "Fisher 1936, The Use of Multiple Measurements in Taxonomic Problems"

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        width = backbone.feature_dim
        # Everything that must survive the stage is a buffer (or a parameter): it is saved, and a run can resume.
        self.register_buffer("counts", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(0, width, dtype=torch.float64))
        self.register_buffer("products", torch.zeros(width, width, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros(0, width))
        self.register_buffer("bias", torch.zeros(0))

    def begin(self, task, ctx):  # allocate rows for the new classes, without images
        super().begin(task, ctx)
        new = len(task.seen) - len(self.counts)
        for name in ("counts", "sums", "weight", "bias"):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(new, *old.shape[1:])]))

    def learn(self, task, ctx):  # one stage, from this task's images alone
        features, labels = ctx.features(self, task.train)  # [N, F], [N]; computed once per image
        features = features.double()
        self.counts += labels.bincount(minlength=len(self.counts))
        self.sums.index_add_(0, labels, features)
        self.products += features.T @ features
        means = self.sums / self.counts[:, None]
        within = (self.products - means.T @ self.sums) / self.counts.sum()
        share, identity = self.config.shrinkage, torch.eye(len(within)).to(within)
        covariance = (1 - share) * within + share * within.trace() / len(within) * identity
        weight = torch.linalg.solve(covariance, means.T).T
        self.weight, self.bias = weight.float(), -0.5 * (weight * means).sum(1).float()

    def logits(self, features):  # [B, F] → [B, classes seen], in order of appearance
        return features @ self.weight.T + self.bias
