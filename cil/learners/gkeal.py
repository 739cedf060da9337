"""GKEAL: ridge regression on Gaussian kernels."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers import Ridge
from cil.classifiers.ridge import Choice
from cil.learner import Context
from cil.learners.bases.on_features import ClassifierOnFeatures
from cil.stream import Task


class GKEAL(ClassifierOnFeatures):
    """GKEAL (Zhuang et al., CVPR 2023): ridge regression on Gaussian kernels around images of the first task.

    h_j(x) = exp(−‖f(x) − m_j‖² / 2σ²), where m_j are the features of M images of the first task, drawn once. Then as
    ACIL. Keeps m, G and Q. One forward pass per image.
    """

    class Config(ClassifierOnFeatures.Config):
        centres: PositiveInt = Field(512, description="number M of kernels")
        bandwidth: PositiveFloat | None = Field(
            None, description="σ > 0 in units of the features; null: the median distance between the centres"
        )
        strength: Choice | PositiveFloat = Field(1e-3, description="ridge strength λ > 0, or how it is chosen (RanPAC)")
        balance: bool = Field(False, description="whether all classes weigh the same, however many images they have")

    name = "gkeal"
    summary = "ridge regression on Gaussian kernels around images of the first task"
    trains = "nothing"
    paper = "Zhuang et al., GKEAL, CVPR 2023"
    centres: Tensor
    bandwidth: Tensor

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.register_buffer("centres", torch.zeros(config.centres, self.width))
        self.register_buffer("bandwidth", torch.tensor(config.bandwidth or 1.0))

    def make_classifier(self) -> Ridge:
        return Ridge(self.config.centres, None, self.config.strength, balance=self.config.balance)

    def training_features(self, task: Task, ctx: Context) -> tuple[Tensor, Tensor]:
        if task.index == 0:
            features, _ = ctx.features(self, task.train)
            if self.scales is not None:
                self.scales.fit(features)
            self.draw(super().scaled(features), ctx.generator)
        return super().training_features(task, ctx)

    def draw(self, features: Tensor, generator: torch.Generator) -> None:
        """Draw the centres among features [N, width], each at most once more than any other, and set σ."""
        order = torch.randperm(len(features), generator=generator)
        self.centres.copy_(features[order.repeat(-(-len(self.centres) // len(order)))[: len(self.centres)]])
        if self.config.bandwidth is None and len(features) > 1:
            self.bandwidth.copy_(torch.pdist(self.centres[: len(features)].double()).median())

    def scaled(self, features: Tensor) -> Tensor:
        """h(x) [B, M] of features [B, width]."""
        x, m = super().scaled(features).double(), self.centres.double()
        squares = x.square().sum(1, keepdim=True) - 2 * x @ m.T + m.square().sum(1)
        return torch.exp(-squares.clamp(min=0) / (2 * self.bandwidth.double().square()))
