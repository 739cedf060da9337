"""LoRanPAC: least squares on randomly projected features, by an SVD that is truncated after every update."""

from __future__ import annotations

import math

from pydantic import Field, PositiveInt

from cil.classifiers import TruncatedSVD
from cil.learner import Context
from cil.learners.bases.first_session import AdaptOnce
from cil.stream import Task
from cil.tuning import TunerConfig


class LoRanPAC(AdaptOnce):
    """LoRanPAC (arXiv 2410.00645).

    As in RanPAC, h(x) = ReLU(f(x) R) with R ~ N(0, 1) drawn once, but without ridge: the left singular vectors and
    values (U, σ) of all h so far are kept and truncated after every update, M ← M + Σ h(x_i) onehot(y_i)ᵀ and
    W = U diag(1/σ²) Uᵀ M; the prediction is argmax_c h(x) · W_c. Memory is constant in the number of tasks, there is no
    E × E matrix and no ridge strength to choose. With a ``tuner`` it is adapted on the first task, as in APER. One
    forward pass per image.
    """

    class Config(AdaptOnce.Config):
        tuner: TunerConfig | None = Field(None, description="tuner trained on the first task; null: none")
        projection: PositiveInt = Field(10_000, description="width E of the random projection")
        truncation: float = Field(
            0.25, ge=0, lt=1, description="fraction τ in [0, 1) of the singular directions that is removed"
        )
        rank: PositiveInt | None = Field(2000, description="largest number of singular directions kept; null: no limit")
        strength: float = Field(0.0, ge=0, description="ridge strength λ ≥ 0 in addition to the truncation")
        block: PositiveInt = Field(2000, description="images per update of the decomposition, at most")

    name = "loranpac"
    summary = "least squares on random projections, by a truncated SVD in constant memory"
    trains = "nothing, or a tuner on the first task"
    paper = "LoRanPAC, ICLR 2025, arXiv 2410.00645"
    classifier: TruncatedSVD

    def make_classifier(self) -> TruncatedSVD:
        c = self.config
        return TruncatedSVD(self.width, c.projection, c.truncation, c.rank, c.strength, c.block)

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        figures = {
            "rank": len(self.classifier.singular_values),
            "condition_number": self.classifier.condition_number,
            "condition_number_uncut": self.classifier.uncut_condition_number,
            "leave_one_out_accuracy": self.classifier.leave_one_out_accuracy(*self.training_features(task, ctx)),
        }
        for name, value in figures.items():
            # not finite: all features are zero; or nothing is truncated, and W interpolates the task
            if math.isfinite(value):
                ctx.log(name, value)
