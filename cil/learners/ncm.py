"""SimpleCIL: nearest class mean on frozen features."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from cil.classifiers.few_shots import Calibration
from cil.classifiers.ncm import NCM, Metric, Teen
from cil.learner import Context
from cil.learners.bases.on_features import ClassifierOnFeatures
from cil.stream import Task


class NCMLearner(ClassifierOnFeatures):
    """SimpleCIL: class prototypes of a frozen backbone, compared by cosine (Zhou et al., arXiv 2303.07338).

    For every new class c, p_c = mean of f(x_i) over its training images (test transform, features not normalised); the
    prediction is argmax_c cos(f(x), p_c). Nothing is trained, so the final accuracy does not depend on class order,
    task split, batch size or seed. With several backbones, the score is the weighted sum of their cosines. Keeps F + 1
    numbers per class. One forward pass per image.
    """

    class Config(ClassifierOnFeatures.Config):
        metric: Metric = Field("cosine", description="similarity of a feature and a class mean")
        calibrate: Literal["none", "teen", "nearest"] = Field(
            "none",
            description="calibration of few-shot classes; teen: move their means towards similar base classes; "
            "nearest: mean with the means of the nearest base classes",
        )
        shots: PositiveInt = Field(
            5,
            description="largest number of images of a calibrated class; classes with more are base classes",
        )
        alpha: float = Field(0.5, ge=0, le=1, description="share of the base classes in a calibrated mean")
        neighbours: PositiveInt = Field(1, description="number of base classes for nearest")
        tau: PositiveFloat = Field(16, description="sharpness of the weights of base classes in teen")

    name = "ncm"
    summary = "nearest class mean of frozen features, by cosine (SimpleCIL)"
    trains = "nothing"
    learns_batches = True
    paper = "Zhou et al., Revisiting Class-Incremental Learning with Pre-Trained Models, IJCV 2024, arXiv 2303.07338"
    classifier: NCM

    def make_classifier(self) -> NCM:
        config = self.config
        teen: Teen | Calibration | None = None
        if config.calibrate == "teen":
            teen = Teen(config.shots, config.alpha, config.tau)
        elif config.calibrate == "nearest":
            teen = Calibration("nearest", config.shots, config.neighbours)
        blocks = self.joined.scales.widths if self.joined is not None else None
        return NCM(self.width, config.metric, teen, blocks)

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        if self.joined is not None:
            self.classifier.block_weights = self.joined.weights
