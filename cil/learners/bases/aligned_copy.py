"""A head that predicts after alignment on class Gaussians, beside the one that training goes on with: SLCA, +CA."""

from __future__ import annotations

import copy

from pydantic import Field

from cil.classifiers import Gaussians
from cil.classifiers.heads import Head
from cil.learner import Context
from cil.learners.bases.alignment import AlignedRecipe, align, mean_scales, normalized_softmax_of
from cil.learners.bases.new_classes import TaskOfClass
from cil.stream import Task
from cil.training import ParamGroup


class AlignedCopyRecipe(AlignedRecipe):
    temperature: float = Field(0.1, gt=0, description="temperature τ > 0 of the logit normalisation")


class OptionalAlignment(AlignedCopyRecipe):
    alignment_epochs: int = Field(
        0, ge=0, description="epochs of the alignment of the head on class Gaussians (SLCA's, 5 there); 0: none"
    )


class AlignedCopy(TaskOfClass):
    """A learner that aligns a copy of its head after each task; the copy predicts, the head is for the next task.

    Attributes:
        head: The head as trained.
        aligned: The copy.
        gaussians: One Gaussian per class, estimated after the class's task and not updated.
    """

    head: Head
    aligned: Head
    gaussians: Gaussians

    def keep_copy(self, ridge: float = 1e-4) -> None:
        """Build the copy and the Gaussians, whose variances get ``ridge`` more; call it when ``head`` is built."""
        self.aligned = copy.deepcopy(self.head)
        self.gaussians = Gaussians(self.backbone.feature_dim, ridge, self.config.covariance_rank)

    def finish(self, head: Head, task: Task, ctx: Context) -> None:
        """Estimate the new classes' Gaussians with the backbone as it is, and align a copy of ``head``."""
        self.gaussians.partial_fit(*ctx.features(self, task.train))
        self.aligned = copy.deepcopy(head)
        if task.index and self.config.alignment_epochs:
            self.align(ctx)

    def align(self, ctx: Context) -> None:
        """Minimise CE(z / (n τ), y) on vectors from N(s_c μ_c, Σ_c), with smaller s_c for older classes."""
        loss = normalized_softmax_of(self.aligned, self.task_of, self.config.temperature)
        scales = mean_scales(self.task_of)
        align(loss, ParamGroup(self.aligned.rows), self.gaussians, scales, self.config, ctx)
