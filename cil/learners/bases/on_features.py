"""The base of learners whose classifier learns from features that no later task changes (NCM, SLDA, RanPAC, …).

It is the one place that states what these features are: the backbone's own, or with ``layers`` also those of its
blocks, brought to one scale.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeInt, model_validator
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers import Classifier
from cil.classifiers.base import StatisticsClassifier
from cil.classifiers.scales import BlockScales, Scale
from cil.config import Section
from cil.features import View
from cil.learner import Context, Learner, LearnerConfig
from cil.stream import Task
from cil.tuning import Tuner
from cil.tuning.layers import Collector, Named, Token


class Layers(Section):
    """Blocks of the backbone that are part of the features; see :class:`cil.tuning.layers.Collector`."""

    blocks: Named | Annotated[list[NonNegativeInt], Field(min_length=1)] = Field(
        "half", description="chosen blocks: the last half, all, the last one, or indices counted from 0"
    )
    tokens: list[Token] = Field(
        ["class", "mean"],
        min_length=1,
        description="parts of each block's output: the class token, mean and standard deviation of the patch tokens",
    )
    norm: bool = Field(False, description="whether the backbone's final norm is applied to each block's output")
    final: bool = Field(True, description="whether the backbone's own feature is appended")
    scale: Scale = Field(
        "rms",
        description="scale of the parts; rms: mean square 1 on the images of the first task; unit: length 1 for each "
        "image; none: as they are",
    )

    @model_validator(mode="after")
    def _no_repeats(self) -> Layers:
        for key, values in (("blocks", self.blocks), ("tokens", self.tokens)):
            if isinstance(values, list) and len(set(values)) < len(values):
                raise ValueError(f"{key}: {list(values)} has an entry twice; give each at most once")
        return self


def _as_layers(raw: Any) -> Any:
    """Expand bare blocks to a section: ``half`` to ``{blocks: half}``, ``[4, 5]`` to ``{blocks: [4, 5]}``."""
    return {"blocks": raw} if isinstance(raw, str | list) else raw


Chosen = Annotated[Layers | None, BeforeValidator(_as_layers)]
"""Type of the key ``layers``, for a learner with another default."""


class OnFeatures(Learner):
    """A learner on features that are frozen, or adapted once.

    With ``layers`` the features are those of the chosen blocks beside the backbone's own, from one forward pass
    (:class:`cil.tuning.layers.Collector`). Their scales are taken from the first task and then stay, because the sums
    of a classifier hold scaled features (:class:`cil.classifiers.scales.BlockScales`).

    Args:
        config: Hyper-parameters.
        backbone: The frozen backbone.
        tuner: Tuner that computes the features together with the backbone; None: none.
    """

    class Config(LearnerConfig):
        layers: Chosen = Field(
            None,
            description="blocks whose outputs are part of the features, by name or indices, or a section; null: only "
            "the backbone's own feature",
        )

    def __init__(self, config: Any, backbone: Backbone, tuner: Tuner | None = None) -> None:
        super().__init__(config, backbone)
        self.tuner = tuner
        # by version of the view; in a dictionary, or the tuner would be in the state once more
        self._collectors: dict[Hashable, Collector] = {}
        self.scales = self.make_scales()

    def make_scales(self) -> BlockScales | None:
        """The scales of :attr:`blocks`, not fitted yet; None if the features are used as they are."""
        layers = self.config.layers
        return BlockScales(self.blocks, layers.scale) if layers is not None and len(self.blocks) > 1 else None

    @property
    def blocks(self) -> tuple[int, ...]:
        """Widths of the parts of :meth:`features`: of every view, of every block."""
        return tuple(width for view in self.views().values() for width in _widths(view, self.backbone))

    @property
    def width(self) -> int:
        """Width of the features with the tuner, or without one of the frozen backbone; ``layers`` are among them."""
        views = OnFeatures.views(self)  # a subclass may have further ones
        return sum(width for view in views.values() for width in _widths(view, self.backbone))

    def frozen(self) -> dict[Hashable, View]:
        """The views of the backbone without a tuner, with ``layers`` collected."""
        views: Mapping[Hashable, Any] = self.backbone.views()  # each is a backbone
        if self.config.layers is None:
            return dict(views)
        collected = {version: self._collector(version, view, None) for version, view in views.items()}
        # the version says what is collected, because that of the frozen backbone is the same for every learner
        return {(v, *_choice(c)): partial(views[v], tuner=c) for v, c in collected.items()}

    def adapted(self, version: Hashable, tuner: Tuner) -> dict[Hashable, View]:
        """The view of the backbone with a tuner, with ``layers`` collected."""
        seen = tuner if self.config.layers is None else self._collector(version, self.backbone, tuner)
        return {version: partial(self.backbone, tuner=seen)}

    def _collector(self, version: Hashable, backbone: Any, tuner: Tuner | None) -> Collector:
        found = self._collectors.get(version)
        if found is None or (tuner is not None and found.inner is not tuner):
            found = Collector(backbone, **self.config.layers.model_dump(exclude={"scale"}), tuner=tuner)
            self._collectors[version] = found
        return found

    def views(self) -> Mapping[Hashable, View]:
        if self.tuner is None:
            return self.frozen()
        return self.adapted("adapted" if self.seen else "not adapted yet", self.tuner)

    def training_features(self, task: Task, ctx: Context) -> tuple[Tensor, Tensor]:
        """Scaled features [N, width] of the task's training images, and their labels [N].

        The first task sets the scales.
        """
        features, labels = ctx.features(self, task.train)
        if self.scales is not None and task.index == 0:
            self.scales.fit(features)
        return self.scaled(features), labels

    def scaled(self, features: Tensor) -> Tensor:
        """Features [B, width] as the classifier gets them."""
        return features if self.scales is None else self.scales(features)


class ClassifierOnFeatures(OnFeatures):
    """A learner that states its classifier and fits it to the features of each task."""

    classifier: Classifier

    def __init__(self, config: Any, backbone: Backbone, tuner: Tuner | None = None) -> None:
        super().__init__(config, backbone, tuner)
        self.classifier = self.make_classifier()

    @abstractmethod
    def make_classifier(self) -> Classifier:
        """The classifier on :meth:`features`, without statistics; a view of them has the width :attr:`width`."""

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.classifier.grow(len(task.seen))

    def learn(self, task: Task, ctx: Context) -> None:
        self.classifier.partial_fit(*self.training_features(task, ctx))

    @property
    def statistics(self) -> StatisticsClassifier | None:
        return self.classifier if isinstance(self.classifier, StatisticsClassifier) else None

    def logits(self, features: Tensor) -> Tensor:
        return self.classifier.logits(self.scaled(features))


def _widths(view: Any, backbone: Backbone) -> tuple[int, ...]:
    """Widths of the parts of a view; of a function that is no backbone with a tuner it is taken to be F."""
    if isinstance(view, partial):
        tuner = view.keywords.get("tuner")
        if isinstance(tuner, Collector):
            return tuner.widths
        return (tuner.width,) if tuner is not None and tuner.width is not None else _widths(view.func, backbone)
    return (getattr(view, "feature_dim", backbone.feature_dim),)


def _choice(collector: Collector) -> tuple[Hashable, ...]:
    """What distinguishes the features of two collectors on one backbone."""
    return collector.blocks, collector.tokens, collector.norm, collector.final
