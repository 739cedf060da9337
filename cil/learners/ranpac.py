"""RanPAC: ridge regression on randomly projected features."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from cil.classifiers import Ridge
from cil.classifiers.ridge import Choice
from cil.classifiers.text_prior import TextRidge
from cil.learner import Context
from cil.learners.bases.beside_texts import OptionalTexts
from cil.learners.bases.selecting import Selected, selection_of
from cil.stream import Task
from cil.tuning import TunerConfig


class RanPAC(OptionalTexts):
    """RanPAC (McDonnell et al., arXiv 2307.02251).

    Phase 1 (with a ``tuner``) trains the tuner on the first task, as in APER, and uses its features only. Then
    h(x) = ReLU(f(x) R) with R ~ N(0, 1) drawn once, G ← G + HᵀH, Q ← Q + HᵀY, W = (G + λI)⁻¹ Q, and the prediction is
    argmax_c h(x) · W_c, with columns of W that are not normalised. For a fixed λ this equals ridge regression on all
    data at once. λ is chosen on every task, from the task's own images or, with ``gcv``, from G and Q. Keeps R, G and
    Q. One forward pass per image.
    """

    class Config(OptionalTexts.Config):
        tuner: TunerConfig | None = Field(None, description="tuner trained on the first task; null: no phase 1")
        projection: PositiveInt | None = Field(10_000, description="width M of the random projection; null: none")
        strength: Choice | PositiveFloat = Field(
            "holdout",
            description="ridge strength λ > 0, or how it is chosen: on a held-out fifth of the task, by leave-one-out "
            "on the task, or by generalised cross-validation over all tasks",
        )
        decision: Literal["linear", "cosine"] = Field(
            "linear",
            description="class scores; cosine: each class's weights are divided by their norm, as in LAMDA-PILOT",
        )
        balance: bool = Field(
            False,
            description="whether all classes weigh the same, however many images they have, so that few-shot classes "
            "are predicted, too; a class's images must all be in one task",
        )
        select: Selected = None

    name = "ranpac"
    summary = "ridge regression on random projections of the features"
    trains = "nothing, or a tuner on the first task"
    learns_batches = True
    paper = "McDonnell et al., RanPAC, NeurIPS 2023, arXiv 2307.02251"
    classifier: Ridge

    def make_classifier(self) -> Ridge:
        config = self.config
        more = config.projection, config.strength, config.decision, config.balance, selection_of(config.select)
        if config.text is None or not config.text.prior:
            return Ridge(self.width, *more)
        return TextRidge(self.width, lambda: self.text.prototypes, config.text.prior, *more)

    def usual_weight(self) -> float:
        return float(self.text.scale)  # a ridge score, near 1 for the class and 0 for others, weighs as a cosine

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        ctx.log("ridge_strength", float(self.classifier.strength_))
