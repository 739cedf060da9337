"""One tuner that is trained further on every task: shared by finetune, SLCA, SSIAT and the Avalanche strategies."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import Tensor

from cil.backbone import Tuner
from cil.features import View
from cil.learner import Learner


class SequentialTuning(Learner):
    """A learner that trains one tuner on every task in turn; its features change with each task.

    These features are kept in memory only, because the view is a method and not ``partial(self.backbone, tuner=…)``:
    few later runs would ask for the features of weights that every task replaces.

    Attributes:
        tuner: The tuner θ; None for the frozen backbone alone.
    """

    tuner: Tuner | None

    def tuned(self, images: Tensor) -> Tensor:
        """f_θ(x): images [B, 3, H, W] → features [B, F]."""
        return self.backbone(images, self.tuner)

    def views(self) -> Mapping[Hashable, View]:
        return {self.stages: self.tuned}
