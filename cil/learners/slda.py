"""SLDA: linear discriminant analysis with class means and one covariance that are updated with each task."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers import LDA, Gaussians
from cil.classifiers.base import StatisticsClassifier
from cil.classifiers.few_shots import Calibration, Draws
from cil.classifiers.text_prior import TextLDA
from cil.errors import DataError
from cil.learner import Context
from cil.learners.bases.beside_texts import OptionalTexts
from cil.learners.bases.selecting import Selected, selection_of
from cil.stream import Task


class SLDA(OptionalTexts):
    """Deep SLDA (Hayes and Kanan, arXiv 1909.01520) in batch form.

    logit_c = fᵀΣ⁻¹μ_c − ½ μ_cᵀΣ⁻¹μ_c + log π_c, with class means μ_c and one within-class covariance Σ of all classes,
    shrunk to (1 − s) Σ + s · tr(Σ)/F · I; s is given, or follows from the statistics (``gcv``, ``samples``). These are
    sums over images, so the order of tasks has no effect if nothing is trained (a ``tuner`` is trained on the first
    task, as in APER). The paper's running covariance over a stream of single images approximates Σ and depends on their
    order. Keeps F² numbers, and F + 1 per class. One forward pass per image. ``merge`` uses the same classifier, so
    SLDA is its baseline without training.

    With ``calibrate: draws`` (Yang et al., arXiv 2101.06395) a class of few images also has features drawn from one
    Gaussian near each of them, made from the nearest base classes so far. Their covariances are kept, F (F + 1) / 2
    numbers each.
    """

    class Config(OptionalTexts.Config):
        shrinkage: Literal["gcv", "samples"] | Annotated[float, Field(ge=0, le=1)] = Field(
            1e-4,
            description="shrinkage s in [0, 1] of the covariance; published: 10⁻⁴, larger for few images. gcv: chosen "
            "by generalised cross-validation from the statistics of all tasks, for wide features; samples: "
            "F / (N − 1 + F) for N images so far",
        )
        priors: Literal["uniform", "counts"] = Field(
            "uniform", description="class priors π_c: equal, or the class frequencies so far"
        )
        balance: bool = Field(
            False,
            description="whether all classes weigh the same in the covariance, however many images they have; a "
            "class's images must all be in one task",
        )
        calibrate: Literal["none", "nearest", "between", "draws"] = Field(
            "none",
            description="calibration of few-shot classes; nearest: mean with those of the nearest base classes; "
            "between: shrinkage of the mean to that of all base classes, by the covariance of their means; draws: "
            "features drawn near each of its images, for which a class's images must all be in one task",
        )
        shots: PositiveInt = Field(
            5, description="largest number of images of a calibrated class; classes with more are base classes"
        )
        neighbours: PositiveInt = Field(2, description="number of base classes for nearest and draws")
        alpha: float = Field(
            0.21, ge=0, description="variance added to every feature for draws, as a multiple of the mean variance"
        )
        draws: PositiveInt = Field(750, description="number of features drawn per few-shot class")
        select: Selected = None

    name = "slda"
    summary = "linear discriminant analysis, one covariance for all classes"
    trains = "nothing, or a tuner on the first task"
    learns_batches = True
    paper = "Hayes and Kanan, Lifelong Machine Learning with Deep Streaming LDA, CVPR-W 2020, arXiv 1909.01520"
    classifier: LDA

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.base = Gaussians(self.width) if config.calibrate == "draws" else None

    @property
    def statistics(self) -> StatisticsClassifier | None:
        return super().statistics if self.base is None else None  # drawn features are no image's

    def make_classifier(self) -> LDA:
        config = self.config
        calibration = None
        if config.calibrate in ("nearest", "between"):
            calibration = Calibration(config.calibrate, config.shots, config.neighbours)
        more: dict[str, Any] = {
            "shrinkage": config.shrinkage,
            "priors": config.priors,
            "balance": config.balance,
            "calibration": calibration,
            "select": selection_of(config.select),
        }
        if config.text is None or not config.text.prior:
            return LDA(self.width, **more)
        return TextLDA(self.width, lambda: self.text.prototypes, config.text.prior, **more)

    def usual_weight(self) -> float:
        return self.width / (self.width + int(self.classifier.counts.sum()) - 1)

    def training_features(self, task: Task, ctx: Context) -> tuple[Tensor, Tensor]:
        features, labels = super().training_features(task, ctx)
        if self.base is None:
            return features, labels
        if len(again := labels[self.classifier.counts[labels] > 0]):
            raise DataError(
                f"slda: class {int(again[0])} has images already; with calibrate: draws all images of a class must "
                "come in one task"
            )
        config = self.config
        draws = Draws(config.shots, config.neighbours, config.alpha, config.draws)
        return draws.extended(features, labels, self.base, ctx.generator)

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        if isinstance(self.config.shrinkage, str):
            ctx.log("shrinkage", self.classifier.shrinkages[0])
