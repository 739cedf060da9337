"""Co-Tuning: the classifier that a backbone was pre-trained with is trained beside the new one, on related classes."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.backbone import Backbone, source_head
from cil.learner import Context
from cil.stream import Task
from cil.training import ParamGroup
from cil.utils.precision import without_autocast

RATE = 0.1
"""Factor on the learning rate for the backbone's classifier."""


class CoTuning:
    """The term of one training: λ CE(softmax(h(f_θ(x))), R_y), with the backbone's own classifier h (You et al., 2020).

    R_c [C_s] is the relation of class c to the C_s classes of the backbone: the mean of softmax(h(f_0(x))) over the
    class's images, with the frozen backbone f_0. It is computed when the class comes, so no old image is needed. In
    every task h starts from its pre-trained weights and is trained, too, at :data:`RATE` of the learning rate.

    Args:
        weight: λ.
        backbone: The frozen backbone, with its classifier.
        task: The task.
        ctx: Context of the stage.

    Raises:
        BackboneError: The backbone's classifier was not kept.
    """

    def __init__(self, weight: float, backbone: Backbone, task: Task, ctx: Context) -> None:
        self.weight, self.head = weight, copy.deepcopy(source_head(backbone)).to(ctx.device)
        features, labels = ctx.features(backbone, task.train)
        with torch.no_grad():
            self.relation = relation(self.head(features.float()), labels)

    @property
    def group(self) -> ParamGroup:
        """The classifier's parameters."""
        return ParamGroup(self.head.parameters(), RATE)

    def term(self, features: Tensor, labels: Tensor) -> Tensor:
        """A scalar, given the tuner's features [B, F] and labels [B]."""
        with without_autocast():
            return self.weight * F.cross_entropy(self.head(features.float()), self.relation[labels])


def relation(scores: Tensor, labels: Tensor) -> Tensor:
    """R [C, C_s]: the mean of softmax(scores) over the images of each class; 0 for classes without an image.

    Args:
        scores: [N, C_s].
        labels: int [N].
    """
    members = F.one_hot(labels.to(scores.device)).to(scores)
    return members.T @ scores.softmax(1) / members.sum(0).clamp(min=1)[:, None]
