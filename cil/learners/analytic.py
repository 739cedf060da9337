"""ACIL, AIR and DS-AL: ridge regression on random features with a fixed strength."""

from __future__ import annotations

import math

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers import Ridge
from cil.classifiers.base import StatisticsClassifier
from cil.classifiers.ridge import Choice, Strength
from cil.learner import Context
from cil.learners.bases.selecting import selection_of
from cil.learners.ranpac import RanPAC
from cil.stream import Task
from cil.utils.linalg import BLOCK


class ACIL(RanPAC):
    """ACIL (Zhuang et al., arXiv 2205.14922), and G-ACIL (arXiv 2403.15706): RanPAC with a fixed ridge strength.

    h(x) = ReLU(f(x) U) with U ~ U(±1/√F) drawn once, and W = (Σ h hᵀ + γI)⁻¹ Σ h onehot(y)ᵀ. The authors update W and
    the inverse recursively; the sums of RanPAC give the same W. R ~ N(0, 1) in place of U only changes the unit of h:
    λ = 3Fγ. Keeps R, G and Q. One forward pass per image.
    """

    class Config(RanPAC.Config):
        projection: PositiveInt | None = Field(8192, description="width M of the random projection; null: none")
        strength: Choice | PositiveFloat = Field(
            0.1,
            description="ridge strength γ > 0 for a projection whose entries have the variance 1/(3F), as the authors' "
            "have, or how it is chosen, as in RanPAC",
        )
        text: None = Field(None, description="always null: texts are an option of ranpac")

    name = "acil"
    summary = "recursive ridge regression on random features, with a fixed strength"
    paper = "Zhuang et al., ACIL, NeurIPS 2022, arXiv 2205.14922"

    @property
    def unit(self) -> float:
        """Mean square of R's entries over that of U's: 3F, 1 without a projection."""
        return 1.0 if self.config.projection is None else 3.0 * self.width

    def make_classifier(self) -> Ridge:
        c = self.config
        strength: Strength = c.strength
        if not isinstance(strength, str):
            strength *= self.unit
        return Ridge(self.width, c.projection, strength, c.decision, c.balance, selection_of(c.select))


class AIR(ACIL):
    """AIR (Fang et al., arXiv 2408.10349): ACIL in which all classes weigh the same.

    W = (Σ_c w_c G_c + γI)⁻¹ [w_c Q_c] with w_c ∝ 1/n_c and mean 1 over the classes so far. All images of a class come
    in one task, so the sums of images that weigh 1/n_c suffice, with λ = γ · mean_c(1/n_c), and no G_c is kept.
    """

    class Config(ACIL.Config):
        balance: bool = Field(True, description="whether all classes weigh the same, however many images they have")

    name = "air"
    summary = "ACIL in which all classes weigh the same"
    paper = "Fang et al., AIR, arXiv 2408.10349"
    needs_new_classes = True

    def learn(self, task: Task, ctx: Context) -> None:
        if self.config.balance and not isinstance(self.config.strength, str):
            sizes = torch.bincount(torch.as_tensor(task.train.labels), minlength=self.seen).to(ctx.device)
            counts = self.classifier.counts + sizes
            mean = float((1 / counts[counts > 0].double()).mean())
            self.classifier.strength_.fill_(self.unit * self.config.strength * mean)
        super().learn(task, ctx)


class DSAL(ACIL):
    """DS-AL (Zhuang et al., arXiv 2403.17503): ACIL, and a second ridge regression of what it leaves unexplained.

    E = onehot(y) − h(x)W for the task's classes, and 0 for older ones. A second regression V with strength γ_c learns E
    from t(x) = tanh(f(x) U). Scores are h(x)W + c · t(x)V. W is that of the task's end for all its images.
    """

    class Config(ACIL.Config):
        compensation: float = Field(1.0, ge=0, description="weight c of the second regression's scores")
        compensation_strength: PositiveFloat = Field(0.1, description="ridge strength γ_c of the second regression")

    name = "ds_al"
    summary = "ACIL with a second ridge regression of its residuals"
    paper = "Zhuang et al., DS-AL, AAAI 2024, arXiv 2403.17503"
    needs_new_classes = True

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.second = Ridge(self.classifier.width, None, config.compensation_strength)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.second.grow(len(task.seen))

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        features, labels = self.training_features(task, ctx)
        for x, y in zip(features.double().split(BLOCK), labels.split(BLOCK), strict=True):
            explained = self.classifier.logits(x)
            explained[:, : task.classes[0]] = 0
            explained.nan_to_num_(neginf=0)  # classes without images
            self.second.partial_fit(self.bounded(x), y, explained=explained)

    @property
    def statistics(self) -> StatisticsClassifier | None:
        return None  # the second regression's sums depend on W, so a class cannot be removed from them

    def bounded(self, features: Tensor) -> Tensor:
        """t(x) [B, M] of features [B, width]."""
        projection = self.classifier.projection
        return (features if projection is None else features @ projection.to(features) / math.sqrt(self.unit)).tanh()

    def logits(self, features: Tensor) -> Tensor:
        main = super().logits(features)
        second = self.second.logits(self.bounded(self.scaled(features)))
        return torch.where(main.isfinite(), main + self.config.compensation * second, main)
