"""Several frozen backbones as teachers of one student: what their features add to the loss of a training."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Literal

import torch
from torch import Tensor

from cil.backbone import Backbones
from cil.classifiers.drift import AffineMap, read_out
from cil.classifiers.joined import Joined
from cil.classifiers.leave_one_out import posterior_means, scorable
from cil.classifiers.scales import BlockScales
from cil.config import CombineConfig
from cil.errors import ConfigError, DataError
from cil.features import View
from cil.learner import Context, Learner
from cil.learners.bases.distilling import clean_features
from cil.learners.bases.some_views import SomeViews
from cil.stream import Task
from cil.training.distillation import feature_distance, relation_distance
from cil.training.processes import across_processes
from cil.tuning import Tuner
from cil.utils.precision import without_autocast

Targets = Literal["features", "relations", "logme"]
"""What a student takes from a teacher: features, through an affine map, relations between the images of a step, or the
scores of LogME's linear maps."""


class Teachers:
    """The term Σ_k w_k d_k of the loss of a student f, with teachers t_k of any width.

    With x = f/r and z_k = t_k/r_k, where r and r_k bring features to mean square 1 on the task's images before the
    training (or as ``combine.scale`` says), and weights w_k with sum 1 (``combine.weights``, of the teachers alone):

    * ``features``: d_k = ‖M_k x + m_k − z_k‖² / F_k, a mean over the images. The maps are fitted in closed form to the
      task's images under the test transform (:func:`cil.classifiers.drift.read_out`), again at the start of every
      epoch, and held through it.
    * ``relations``: d_k compares distances and angles between the images of a step
      (:func:`cil.training.distillation.relation_distance`).
    * ``logme``: the term is ‖M_0 x − Σ_k w_k M_k z_k‖² / C, a mean over the images. M are the linear maps to the
      task's C classes with most evidence on features from before the training
      (:func:`cil.classifiers.leave_one_out.posterior_means`), and are held. With ``combine.weights: logme`` this is
      B-Tuning (You et al., JMLR 2022).

    The backbones of the learner after the first are the teachers; a single one is its own teacher, by its frozen
    features. The teachers see the images of a step as the student does, each through its own transforms.

    Args:
        learner: The learner on the backbones.
        tuner: The tuner of the student.
        targets: See :data:`Targets`.
        shrinkage: Shrinkage ≥ 0 of the maps.
        task: The task.
        ctx: Context of the stage.

    Attributes:
        maps: (M_k, m_k) of every teacher; with ``logme`` (M_k, 0), of the student first.
        weights: w, float64 [K].

    Raises:
        ConfigError: ``combine.weights`` leaves no teacher.
        DataError: ``combine.weights`` or ``logme`` cannot be computed on the task.
    """

    maps: list[AffineMap]

    def __init__(
        self, learner: Learner, tuner: Tuner, targets: Targets, shrinkage: float, task: Task, ctx: Context
    ) -> None:
        backbone = learner.backbone
        views, combine, widths = dict(backbone.views()), CombineConfig(), [backbone.feature_dim]
        if isinstance(backbone, Backbones):
            views, combine, widths = dict([*views.items()][1:]), backbone.combine, [*backbone.widths[1:]]
        weights = combine.weights if isinstance(combine.weights, str) else list(combine.weights)[1:]
        if not any(weights):
            raise ConfigError("combine.weights: those of the backbones after the first, the teachers, are all 0")
        self.views: Mapping[Hashable, View] = views
        self.tuner, self.targets, self.shrinkage, self.task, self.ctx = tuner, targets, shrinkage, task, ctx
        [self.student] = learner.views().values()
        clean, labels = ctx.features(SomeViews(learner, lambda: self.views), task.train)
        self.weights = Joined(widths, combine.scale, weights).to(ctx.device).fit(clean, labels).weights
        self.scales = BlockScales(widths, combine.scale).to(ctx.device).fit(clean)
        self.clean = self._scaled(clean)
        own = self._student_features()
        self.own_scale = BlockScales([own.shape[1]], combine.scale).to(ctx.device).fit(own)
        if targets == "logme":
            self.maps = [evident_map(part, labels) for part in (self.own_scale(own), *self.clean)]
        self.begin_epoch()

    @property
    def compares(self) -> bool:
        """Whether the term compares the images of a step with one another."""
        return self.targets == "relations"

    def begin_epoch(self) -> None:
        """Fit the maps to what the student is now."""
        if self.targets == "features":
            x = self.own_scale(self._student_features())
            self.maps = [read_out(x, z, self.shrinkage) for z in self.clean]

    @without_autocast()
    def term(self, features: Tensor, images: Tensor) -> Tensor:
        """Σ_k w_k d_k, a scalar, given the student's features [B, F] of images as the backbones take them."""
        with torch.no_grad(), self.ctx.accelerator.autocast():
            taught = torch.cat([view(images) for view in self.views.values()], dim=1)
        x, z = self.own_scale(features.float()), self._scaled(taught.float())
        weights = self.weights.to(x)
        if self.targets == "logme":
            scores, *theirs = [map_(part) for map_, part in zip(self.maps, (x, *z), strict=True)]
            return feature_distance(scores, torch.einsum("k,kbc->bc", weights, torch.stack(theirs)))
        if self.targets == "relations":
            accelerator = self.ctx.accelerator
            distances = [across_processes(relation_distance, accelerator, x, target) for target in z]
        else:
            distances = [feature_distance(map_(x), target) for map_, target in zip(self.maps, z, strict=True)]
        return (weights * torch.stack(distances)).sum()

    def _scaled(self, features: Tensor) -> tuple[Tensor, ...]:
        """z_k of the features [B, ΣF_k] of all teachers."""
        return self.scales(features).split(self.scales.widths, dim=1)

    def _student_features(self) -> Tensor:
        return clean_features(self.student, self.tuner, self.task, self.ctx)


def evident_map(features: Tensor, labels: Tensor) -> AffineMap:
    """The linear map with most evidence from features [N, F] to the indicators of their C classes; its offset is 0."""
    try:
        x, y = scorable(features, labels)
    except DataError as error:
        raise DataError(f"targets: logme cannot be computed on the first task: {error}; take features") from None
    means = posterior_means(x, y)
    return AffineMap(means, means.new_zeros(len(means)))
