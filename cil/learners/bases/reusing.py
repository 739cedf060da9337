"""What holds a tuner that is trained through all tasks to what it was: the keys ``anchor``, ``distill``, ``bss``
and ``co_tuning``.

They are keys of the learners that train one tuner on every task with :meth:`ReusingTuning.fit_tuner`: finetune, l2_sp,
slca, cofima and ssiat.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator
from torch import Tensor, nn

from cil.backbone import Backbone, Tuner, feature_width
from cil.errors import ConfigError
from cil.learner import Context
from cil.learners.bases.anchor import Anchor, AnchorConfig, AnchoredSteps, AnchorState
from cil.learners.bases.co_tuning import CoTuning
from cil.learners.bases.distilling import Distillation, DistillConfig
from cil.learners.bases.sequential import SequentialTuning
from cil.stream import Task
from cil.training import ParamGroup, Recipe, check_whole_steps, fit
from cil.training.distillation import spectral_shrinkage
from cil.training.processes import across_processes

log = logging.getLogger(__name__)

FeatureLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(features [B, F], labels [B]) → (mean loss, logits [B, C])."""


class ReuseRecipe(Recipe):
    """A training recipe with what holds the tuner to what it was."""

    anchor: AnchorConfig = Field(
        None, description="pull of the tuner's weights to earlier ones: the name of a norm, or a section; null: none"
    )
    distill: DistillConfig = Field(
        None, description="term that holds what the tuner computes near a teacher's: what is held, or a section"
    )
    bss: float = Field(
        0.0,
        ge=0,
        description="weight η ≥ 0 of the squared smallest singular value of a step's features (BSS; 0.001 in its "
        "paper); a step must have no more images than features. 0: none",
    )

    co_tuning: float = Field(
        0.0,
        ge=0,
        description="weight λ ≥ 0 of the cross-entropy of the backbone's own classifier with the classes that are "
        "related to an image's (Co-Tuning; 2.3 in its code); needs backbone.source_head: true. 0: none",
    )

    @model_validator(mode="after")
    def _reuse(self) -> ReuseRecipe:
        if self.anchor is not None and self.anchor.norm == "l1" and self.optimizer != "sgd":
            raise ValueError(
                f"anchor: l1 takes proximal steps at the rate of SGD, and optimizer is {self.optimizer}; set "
                "optimizer: sgd with its own lr, or another norm"
            )
        check_whole_steps(self, "bss")
        if self.distill is not None and self.distill.what == "relations":
            check_whole_steps(self, "distill", off="null")
        return self


def refuse_reuse(config: ReuseRecipe, learner: str, why: str) -> None:
    """Refuse the keys in a learner whose own terms take their place.

    Raises:
        ValueError: A key is set.
    """
    for key in ("anchor", "distill", "bss", "co_tuning"):
        if getattr(config, key):
            raise ValueError(f"{key}: {learner} {why}; leave it out")


class ReusingTuning(SequentialTuning):
    """A learner whose tuner is trained by :meth:`fit_tuner`, which adds the terms of :class:`ReuseRecipe` to its loss.

    Attributes:
        anchoring: State of the anchor; None without one.
        known: Number of classes before the current task.
    """

    tuner: Tuner
    head: Any
    decoupled: bool | None = None
    """Whether squares of the anchor act after the step; None: under AdamW."""

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.known = 0
        self.anchoring: AnchorState | None = None

    @classmethod
    def uses_source_head(cls, parameters: Any) -> bool:
        return bool(parameters.co_tuning)

    def begin(self, task: Task, ctx: Context) -> None:
        self.known = self.seen
        super().begin(task, ctx)

    def anchor_to(self, tuner: Tuner) -> None:
        """Make room for the anchor's state of a tuner; called when the tuner is built."""
        anchor = self.anchor
        if anchor is None:
            return
        self.anchoring = AnchorState(anchor, tuner, self.backbone)
        if self.config.optimizer == "adam" and anchor.norm in ("l2", "fisher") and anchor.weight:
            log.warning(
                "anchor: %s under optimizer: adam, which rescales the pull of each weight; adamw does not", anchor.norm
            )

    @property
    def anchor(self) -> Anchor | None:
        """The anchor that the configuration asks for."""
        return self.config.anchor

    @property
    def old_scores(self) -> nn.Module:
        """Features → logits, whose first :attr:`known` columns are those of old classes."""
        return self.head

    def fit_tuner(
        self, loss: FeatureLoss, groups: Sequence[ParamGroup], task: Task, recipe: Recipe, ctx: Context
    ) -> None:
        """Minimise ``loss`` of the tuner's features over a task, with the terms that the configuration asks for.

        Args:
            loss: Loss of the features.
            groups: What is trained: the tuner's parameters, and those of a head.
            task: The task.
            recipe: The recipe; the terms are those of the learner's configuration.
            ctx: Context of the stage.

        Raises:
            ConfigError: ``bss`` with more images per step than features.
            BackboneError: ``co_tuning`` without the backbone's own classifier.
        """
        config, count = self.config, len(task.train)
        groups = [replace(group, parameters=list(group.parameters)) for group in groups]  # they are read twice
        width, most = feature_width(self.backbone, self.tuner), min(recipe.train_batch_size, count)
        if config.bss and most > width:
            raise ConfigError(
                f"train_batch_size: {recipe.train_batch_size}; bss needs steps of at most {width} images, the width of "
                f"the features; set train_batch_size: {width} or lower, or bss: 0"
            )
        per_epoch = math.ceil(count / recipe.train_batch_size)
        anchor = self._anchored(groups, task, recipe, per_epoch, ctx)
        distillation = None
        if config.distill is not None and config.distill.acts(task):
            distillation = Distillation(
                config.distill, self.backbone, self.tuner, self.old_scores, self.known, task, ctx
            )
        related = None
        if config.co_tuning:
            related = CoTuning(config.co_tuning, self.backbone, task, ctx)
            groups.append(related.group)

        def whole(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            features = self.tuned(images) if distillation is None else distillation.features(images)
            value, logits = loss(features, labels)
            if distillation is not None:
                value = value + distillation.term(images, features)
            if config.bss:
                value = value + config.bss * across_processes(spectral_shrinkage, ctx.accelerator, features.float())
            if related is not None:
                value = value + related.term(features, labels)
            penalty = None if anchor is None else anchor.penalty()
            return value if penalty is None else value + penalty, logits

        steps = 0

        def after_step() -> None:
            nonlocal steps
            steps += 1
            if anchor is not None:
                anchor.after_step()
            if distillation is not None and steps % per_epoch == 0 and steps < per_epoch * recipe.epochs:
                distillation.begin_epoch()

        if distillation is not None:
            distillation.begin_epoch()
        compares = bool(config.bss) or (distillation is not None and distillation.compares)
        fit(whole, groups, task.train, recipe, ctx, after_step, batch_loss=compares)
        if anchor is not None and anchor.config.norm == "l1":
            ctx.log("unmoved_share", anchor.unmoved)

    def _anchored(
        self, groups: Sequence[ParamGroup], task: Task, recipe: Recipe, per_epoch: int, ctx: Context
    ) -> AnchoredSteps | None:
        if self.anchoring is None or self.anchor is None:
            return None
        tensors = self.anchoring.tensors(self.tuner, groups, task, ctx)
        anchored = {id(part.weight) for part in tensors}
        head = [(p, g.lr_factor) for g in groups for p in g.parameters if id(p) not in anchored]
        return AnchoredSteps(self.anchor, tensors, head, recipe, per_epoch, self.decoupled)
