"""One learner of the same kind on each of several backbones, whose calibrated scores are averaged."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cil.backbone import FROZEN, Backbones
from cil.backbone.ensemble import ONE_ONLY
from cil.classifiers.calibration import fit_temperature, mean_logits, mean_probabilities
from cil.errors import BackboneError
from cil.features import View, Viewer
from cil.learner import Context, Learner
from cil.stream import Task, TaskData
from cil.utils.precision import without_autocast

HELD_OUT = 5
"""One of so many images of a class is held out of the copy of a head by which the head is calibrated."""
FEWEST = 20
"""Held-out images below which a head is not calibrated."""


class Heads(Learner):
    """The ensemble of heads that ``combine.heads`` asks for: head k is the learner's own run on backbone k alone.

    With ``probability`` an image's classes have the probabilities Σ_k w_k softmax(z_k / T_k), with ``logit``
    softmax(Σ_k w_k z_k / T_k); z_k are the scores of head k. Ridge scores and cosines are no logits, so T_k is fitted
    on every task (:func:`~cil.classifiers.calibration.fit_temperature`): a copy of head k learns four fifths of the
    task's images, and T_k minimises the cross-entropy of the others over all classes seen. The heads themselves learn
    all images. With fewer than 20 images held out, T_k stays. Needs one copy of a head's statistics while it learns.

    Args:
        cls: The learner's class, on frozen features.
        parameters: Its hyper-parameters.
        backbone: The backbones.

    Buffers:
        temperatures: float64 [K], T; 1 at first. The weights w are those of ``joined``.

    Raises:
        BackboneError: The learner has other features than the frozen ones.
    """

    temperatures: Tensor

    def __init__(self, cls: type[Learner], parameters: Any, backbone: Backbones) -> None:
        super().__init__(parameters, backbone)
        self.name, self.how, self.widths = cls.name, backbone.combine.heads, backbone.widths  # type: ignore[misc]
        self.heads = nn.ModuleList([cls(parameters, member) for member in backbone.members])
        if any(head.views() != {FROZEN: head.backbone} for head in self._heads):
            raise BackboneError(ONE_ONLY)
        self.register_buffer("temperatures", torch.ones(len(self.heads), dtype=torch.float64))

    @property
    def _heads(self) -> list[Any]:
        return list(self.heads)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self._contexts = [_OfHead(ctx, k) for k in range(len(self.heads))]
        for head, own in zip(self._heads, self._contexts, strict=True):
            head.begin(task, own)

    def learn(self, task: Task, ctx: Context) -> None:
        features, labels = ctx.features(self, task.train)
        held = held_out(labels, ctx.generator)
        for k, (head, own) in enumerate(zip(self._heads, features.split(self.widths, dim=1), strict=True)):
            if len(held) >= FEWEST and self.seen > 1:
                self._calibrate(k, head, task, ctx, own, labels, held)
            context = self._contexts[k]
            context.rows = own, labels
            head.learn(task, context)
            context.rows = None
            ctx.trainable_parameters += context.trainable_parameters

    def _calibrate(
        self, k: int, head: Learner, task: Task, ctx: Context, features: Tensor, labels: Tensor, held: Tensor
    ) -> None:
        """Set T_k from the images ``held`` [n] of the task's N, by a copy of the head that learns the others."""
        images, indices = task.train.source
        rest = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        rest[held] = False
        trial = copy.deepcopy(head, {id(head.backbone): head.backbone})
        part = TaskData(images, indices[rest.cpu().numpy()], task.train.labels[rest.cpu().numpy()])
        context = _OfHead(ctx, k, quiet=True)
        context.rows = features[rest], labels[rest]
        trial.learn(replace(task, train=part), context)
        trial.eval()
        with torch.no_grad():
            self.temperatures[k] = fit_temperature(trial.logits(features[held]), labels[held])
        ctx.log(f"backbone{k}/temperature", float(self.temperatures[k]))

    def views(self) -> Mapping[Hashable, View]:
        return self.backbone.views()

    def join(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """The features as they are: every head gets its backbone's own. The first task decides the weights."""
        super().join(features, labels)
        return features

    @without_autocast()
    def logits(self, features: Tensor) -> Tensor:
        """Log probabilities [B, C]."""
        assert self.joined is not None  # there are several backbones
        parts = features.split(self.widths, dim=1)
        scores = [head.logits(part) for head, part in zip(self._heads, parts, strict=True)]
        mean = mean_logits if self.how == "logit" else mean_probabilities
        return mean(scores, self.temperatures, self.joined.weights)


class _OfHead(Context):
    """The context of one head: it draws what the head's run alone would draw, and its features are given.

    Args:
        ctx: The context of the ensemble.
        index: Place of the head.
        quiet: Whether nothing is logged.

    Attributes:
        rows: Its features [N, F_k] of the task's images and their labels [N], while it learns.
    """

    def __init__(self, ctx: Context, index: int, *, quiet: bool = False) -> None:
        log = None if quiet else lambda name, value: ctx.log(f"backbone{index}/{name}", value)
        super().__init__(ctx.accelerator, ctx.cache, seed=ctx.seed, stage=ctx.stage, log=log, track=ctx.track)
        self.rows: tuple[Tensor, Tensor] | None = None

    def features(self, viewer: Viewer, data: TaskData) -> tuple[Tensor, Tensor]:
        if self.rows is None or len(data) != len(self.rows[1]):  # it looks at other images than those of its task
            raise BackboneError(ONE_ONLY)
        return self.rows


def held_out(labels: Tensor, draw: torch.Generator) -> Tensor:
    """Positions of a fifth of the images of each class, rounded down, drawn at random; int64, in order.

    Args:
        labels: int64 [N].
        draw: Source of the random numbers, on the CPU.
    """
    order = torch.randperm(len(labels), generator=draw).to(labels.device)
    chosen = [(own := order[labels[order] == c])[: len(own) // HELD_OUT] for c in labels.unique()]
    return torch.cat([labels.new_zeros(0), *chosen]).sort().values
