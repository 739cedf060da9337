"""A viewer for some views of a learner, so that the feature cache computes them beside the learner's own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from cil.features import View
from cil.learner import Learner


class SomeViews:
    """``ctx.features(SomeViews(learner, views), data)`` are the features of ``views()`` instead of the learner's.

    Keep one for all stages: the cache drops what a viewer no longer has.

    Args:
        learner: The learner, whose evaluation mode is set while the features are computed.
        views: Function that returns the views by version, as ``Learner.views``.
    """

    def __init__(self, learner: Learner, views: Callable[[], Mapping[Hashable, View]]) -> None:
        self.learner, self.views = learner, views

    @property
    def training(self) -> bool:
        return self.learner.training

    @training.setter
    def training(self, mode: bool) -> None:
        self.learner.train(mode)

    def train(self, mode: bool = True) -> Any:
        return self.learner.train(mode)
