"""LoRanPAC: least squares on randomly projected features, through a continually truncated SVD."""

from __future__ import annotations

import math

from pydantic import Field, PositiveInt

from cil.classifiers import TruncatedSVD
from cil.learner import Context
from cil.learners.adapt_once import AdaptOnce
from cil.stream import Task
from cil.tuning import TunerConfig


class LoRanPAC(AdaptOnce):
    """LoRanPAC (arXiv 2410.00645).

    As RanPAC, h(x) = ReLU(f(x) R) with R ~ N(0, 1) drawn once, but no ridge: the left singular pairs (U, σ) of all h
    seen are kept and truncated as they grow, M ← M + Σ h(x_i) onehot(y_i)ᵀ, W = U diag(1/σ²) Uᵀ M, and predict
    argmax_c h(x) · W_c. Constant memory, no strength to choose, and no matrix as wide as the projection is, squared.
    With a ``tuner`` the first task adapts it as APER does. One forward pass an image.
    """

    class Config(AdaptOnce.Config):
        tuner: TunerConfig | None = Field(None, description="what is adapted on the first task; null: nothing")
        projection: PositiveInt = Field(10_000, description="width E of the random projection")
        truncation: float = Field(0.25, ge=0, lt=1, description="share τ of the singular directions that is cut")
        rank: PositiveInt | None = Field(2000, description="most singular directions kept; null: no limit")
        strength: float = Field(0.0, ge=0, description="ridge λ in addition")
        block: PositiveInt = Field(2000, description="images an update of the decomposition takes at most")

    name = "loranpac"
    paper = "LoRanPAC, ICLR 2025, arXiv 2410.00645"
    classifier: TruncatedSVD

    def make_classifier(self) -> TruncatedSVD:
        c = self.config
        return TruncatedSVD(self.backbone.feature_dim, c.projection, c.truncation, c.rank, c.strength, c.block)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index == 0:
            self.classifier.draw(ctx.generator)

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        ctx.log("rank", len(self.classifier.singular_values))
        ctx.log("condition_number", self.classifier.condition_number)
        ctx.log("condition_number_uncut", self.classifier.uncut_condition_number)
        score = self.classifier.leave_one_out_accuracy(*ctx.features(self, task.train))
        if not math.isnan(score):  # nothing is cut, and W interpolates the task
            ctx.log("leave_one_out_accuracy", score)
