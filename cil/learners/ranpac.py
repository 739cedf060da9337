"""RanPAC: ridge regression on randomly projected features."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from cil.classifiers import Ridge
from cil.classifiers.ridge import Choice
from cil.learner import Context
from cil.learners.adapt_once import AdaptOnce
from cil.stream import Task
from cil.tuning import TunerConfig


class RanPAC(AdaptOnce):
    """RanPAC (McDonnell et al., arXiv 2307.02251).

    Phase 1 (with a ``tuner``) adapts on the first task as APER does, and keeps the adapted branch alone. Then
    h(x) = ReLU(f(x) R) with R ~ N(0, 1) drawn once, G ← G + HᵀH, Q ← Q + HᵀY, W = (G + λI)⁻¹ Q, and predict
    argmax_c h(x) · W_c: linear scores, W's columns not normalised. For a fixed λ this is ridge regression on all data
    at once. λ is chosen anew on every task, from the task's own images or, with ``gcv``, from G and Q. One forward pass
    an image.
    """

    class Config(AdaptOnce.Config):
        tuner: TunerConfig | None = Field(None, description="what is adapted on the first task; null: no phase 1")
        projection: PositiveInt | None = Field(10_000, description="width M of the random projection; null: none")
        strength: Choice | PositiveFloat = Field(
            "holdout",
            description="ridge λ: by a fifth of the task held out, by leaving out each of its images, by generalised "
            "cross-validation over all tasks, or a number",
        )
        decision: Literal["linear", "cosine"] = Field(
            "linear", description="cosine divides each class's weights by their norm, as LAMDA-PILOT does"
        )

    name = "ranpac"
    paper = "McDonnell et al., RanPAC, NeurIPS 2023, arXiv 2307.02251"
    classifier: Ridge

    def make_classifier(self) -> Ridge:
        config = self.config
        return Ridge(self.backbone.feature_dim, config.projection, config.strength, config.decision)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index == 0:
            self.classifier.draw(ctx.generator)

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        ctx.log("ridge_strength", float(self.classifier.strength_))
