"""APER: prototypes on the pre-trained and the adapted features side by side."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from cil.backbone import FROZEN
from cil.classifiers import NCM
from cil.features import View
from cil.learners.adapt_once import AdaptOnce
from cil.tuning import TunerConfig
from cil.tuning.table import AdapterConfig


class APER(AdaptOnce):
    """APER, earlier ADAM: adapt and merge (Zhou et al., arXiv 2303.07338).

    A tuner is adapted on the first task; then φ(x) = [f(x), f_θ(x)], the raw concatenation of the pre-trained and the
    adapted feature, and for every class p_c = mean φ(x_i); predict argmax_c cos(φ(x), p_c). Two forward passes an
    image, one through each branch, over the whole stream.
    """

    class Config(AdaptOnce.Config):
        tuner: TunerConfig = Field(AdapterConfig(), description="what is adapted on the first task")

    name = "aper"
    paper = "Zhou et al., Revisiting Class-Incremental Learning with Pre-Trained Models, IJCV 2024, arXiv 2303.07338"

    def make_classifier(self) -> NCM:
        return NCM(2 * self.backbone.feature_dim)

    def views(self) -> Mapping[Hashable, View]:
        return {FROZEN: self.backbone, super().feature_version: partial(self.backbone, tuner=self.tuner)}

    def features(self, images: Tensor) -> Tensor:
        return torch.cat([view(images) for view in self.views().values()], dim=1)
