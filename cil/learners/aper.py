"""APER: class prototypes on the concatenation of pre-trained and adapted features."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from pydantic import Field

from cil.classifiers import NCM
from cil.features import View
from cil.learners.bases.first_session import AdaptOnce
from cil.tuning import TunerConfig
from cil.tuning.configs import AdapterConfig


class APER(AdaptOnce):
    """APER, earlier called ADAM: adapt and merge (Zhou et al., arXiv 2303.07338).

    A tuner θ is trained on the first task, then frozen. φ(x) = [f(x), f_θ(x)] concatenates the pre-trained and the
    adapted feature, without normalisation; the prototype of a class is p_c = mean φ(x_i), and the prediction is
    argmax_c cos(φ(x), p_c). Keeps θ and one prototype of 2 F numbers per class. Two forward passes per image.
    """

    class Config(AdaptOnce.Config):
        tuner: TunerConfig = Field(AdapterConfig(), description="tuner trained on the first task")

    name = "aper"
    summary = "class means of frozen and adapted features, concatenated"
    trains = "a tuner on the first task"
    paper = "Zhou et al., Revisiting Class-Incremental Learning with Pre-Trained Models, IJCV 2024, arXiv 2303.07338"

    def make_classifier(self) -> NCM:
        return NCM(sum(self.blocks))

    def views(self) -> Mapping[Hashable, View]:
        return {**self.frozen(), **super().views()}
