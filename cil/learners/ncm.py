"""SimpleCIL: nearest class mean on frozen features."""

from __future__ import annotations

from pydantic import Field

from cil.classifiers.ncm import NCM, Metric
from cil.learners.bases.on_features import ClassifierOnFeatures


class NCMLearner(ClassifierOnFeatures):
    """SimpleCIL: class prototypes of a frozen backbone, compared by cosine (Zhou et al., arXiv 2303.07338).

    For every new class c, p_c = mean of f(x_i) over its training images (test transform, features not normalised); the
    prediction is argmax_c cos(f(x), p_c). Nothing is trained, so the final accuracy does not depend on class order,
    task split, batch size or seed. Keeps F + 1 numbers per class. One forward pass per image.
    """

    class Config(ClassifierOnFeatures.Config):
        metric: Metric = Field("cosine", description="similarity of a feature and a class mean")

    name = "ncm"
    summary = "nearest class mean of frozen features, by cosine (SimpleCIL)"
    trains = "nothing"
    paper = "Zhou et al., Revisiting Class-Incremental Learning with Pre-Trained Models, IJCV 2024, arXiv 2303.07338"

    def make_classifier(self) -> NCM:
        return NCM(self.width, self.config.metric)
