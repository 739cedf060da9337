"""Distillation while one tuner is trained through all tasks: what a frozen teacher computes holds what it computes."""

from __future__ import annotations

import copy
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from cil.backbone import Backbone, Tuner, feature_width
from cil.classifiers.drift import AffineMap, read_out
from cil.config import Section
from cil.errors import ConfigError
from cil.features import View
from cil.learner import Context
from cil.stream import Task
from cil.training.distillation import feature_distance, relation_distance, score_distance, token_distance
from cil.training.processes import across_processes
from cil.tuning.block_tokens import BlockTokens
from cil.utils.precision import without_autocast


class Distill(Section):
    """A term of the loss that holds what the tuner computes near what a frozen teacher computes."""

    what: Literal["logits", "features", "blocks", "relations"] = Field(
        "logits",
        description="what is held; logits: the old classes' scores (LwF); features; blocks: the tokens after every "
        "block (DELTA without attention); relations: distances and angles between the images of a step (RKD)",
    )
    teacher: Literal["previous", "pretrained"] = Field(
        "previous", description="teacher: the model before the task, from the second task on, or the frozen backbone"
    )
    weight: float = Field(1.0, ge=0, description="weight γ ≥ 0 of the term; 0: none")
    temperature: float | None = Field(
        2.0,
        gt=0,
        description="temperature τ > 0 of logits; null: its limit, half the mean square of differences",
    )
    map: Literal["none", "linear"] = Field(
        "none",
        description="map from features to the teacher's; linear: an affine one, fitted at the start of every epoch, so "
        "that features may drift as long as the teacher's can be read from them",
    )

    @model_validator(mode="after")
    def _defined(self) -> Distill:
        if self.map == "linear" and self.what != "features":
            raise ValueError(f"map: linear is a map of features; set what: features or map: none (what: {self.what})")
        if self.what == "logits" and self.teacher == "pretrained":
            raise ValueError("what: logits needs scores, which the frozen backbone has not; set teacher: previous")
        return self

    def acts(self, task: Task) -> bool:
        """Whether there is a term, and a teacher, in a task."""
        return self.weight > 0 and (self.teacher == "pretrained" or task.index > 0)


DistillConfig = Annotated[Distill | None, BeforeValidator(lambda raw: {"what": raw} if isinstance(raw, str) else raw)]
"""A field of this type accepts what is held, or a section."""


class Distillation:
    """The term of one training; the teacher is made before it and dropped with it.

    Args:
        config: What is held, and how strongly.
        backbone: The frozen backbone.
        tuner: The tuner that is trained, the student.
        old_scores: Features → logits, whose first ``known`` columns are those of old classes, before the training.
        known: Number of old classes.
        task: The task.
        ctx: Context of the stage.
    """

    def __init__(
        self,
        config: Distill,
        backbone: Backbone,
        tuner: Tuner,
        old_scores: nn.Module,
        known: int,
        task: Task,
        ctx: Context,
    ) -> None:
        self.config, self.backbone, self.student, self.task, self.ctx = config, backbone, tuner, task, ctx
        self.teacher: Tuner | None = None
        if config.teacher == "previous":
            self.teacher = copy.deepcopy(tuner).requires_grad_(False).eval()
        widths = [feature_width(backbone, one) for one in (tuner, self.teacher)]
        if config.what == "features" and config.map == "none" and widths[0] != widths[1]:
            raise ConfigError(
                f"distill: the tuner's features have the width {widths[0]} and the teacher's {widths[1]}; set "
                "map: linear or what: relations, or teacher: previous"
            )
        if config.what == "logits":
            self.scores, self.known = old_scores, known
            self.old_scores = copy.deepcopy(old_scores).requires_grad_(False).eval()
        if config.what == "blocks":
            self.student, self.teacher = BlockTokens(tuner, backbone), BlockTokens(self.teacher, backbone)
        self.map: AffineMap | None = None
        self.targets = self._clean(self.teacher) if config.map == "linear" else None

    @property
    def compares(self) -> bool:
        """Whether the term compares the images of a step with one another."""
        return self.config.what == "relations"

    def begin_epoch(self) -> None:
        """Fit the map of features again, from the task's images under the test transform."""
        if self.targets is not None:
            self.map = read_out(self._clean(self.student), self.targets)

    def features(self, images: Tensor) -> Tensor:
        """The student's features of images [B, 3, H, W]; call it before :meth:`term`."""
        return self.backbone(images, self.student)

    def term(self, images: Tensor, features: Tensor) -> Tensor:
        """γ times the distance, a scalar, given the student's features [B, F] of the images."""
        with torch.no_grad():
            target = self.backbone(images, self.teacher)
        return self.config.weight * self._distance(features, target)

    def _distance(self, features: Tensor, target: Tensor) -> Tensor:
        if self.config.what == "relations":
            return across_processes(relation_distance, self.ctx.accelerator, features.float(), target.float())
        if isinstance(self.student, BlockTokens) and isinstance(self.teacher, BlockTokens):
            return token_distance(self.student.tokens, self.teacher.tokens)
        if self.config.what == "logits":
            with torch.no_grad():
                old = self.old_scores(target)
            return score_distance(self.scores(features)[:, : self.known], old[:, : self.known], self.config.temperature)
        if self.map is None:
            return feature_distance(features, target)
        with without_autocast():
            return feature_distance(self.map(features.float()), target)

    def _clean(self, tuner: Tuner | None) -> Tensor:
        return clean_features(partial(self.backbone, tuner=tuner), tuner, self.task, self.ctx)


@torch.no_grad()
def clean_features(view: View, tuner: Tuner | None, task: Task, ctx: Context) -> Tensor:
    """Features [N, F] of a task's training images under the test transform, without dropout of the view's tuner."""
    mode = tuner is not None and tuner.training
    if tuner is not None:
        tuner.eval()
    found = []
    for images, _ in task.train.batches(ctx.cache.batch_size, device=ctx.device):
        with ctx.accelerator.autocast():
            found.append(view(images).float())
    if tuner is not None:
        tuner.train(mode)
    return torch.cat(found)
