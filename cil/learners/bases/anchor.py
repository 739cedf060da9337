"""The anchor of a training: a penalty or a bound on how far a tuner's weights move from earlier ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from cil.backbone import Backbone, Tuner
from cil.classifiers import LinearHead
from cil.config import Section
from cil.learner import Context
from cil.merging.statistics import diagonal_fisher
from cil.stream import Task
from cil.training import ParamGroup, Recipe, rate_factor
from cil.tuning import WeightTuner

log = logging.getLogger(__name__)

Norm = Literal["l2", "l1", "fisher", "mars"]
IMAGES = 256
"""Images of the first task from which the Fisher information is taken."""


class Anchor(Section):
    """A pull of the trained weights θ to earlier weights θ_0; see :class:`AnchoredSteps` for the norms."""

    norm: Norm = Field(
        "l2",
        description="distance to earlier weights; l2: squared; l1: absolute, which keeps many weights exactly where "
        "they were; fisher: squared, with the Fisher information of each weight; mars: a bound instead of a penalty",
    )
    to: Literal["pretrained", "previous"] = Field(
        "pretrained", description="weights to stay near: those before the first task, or those before each task"
    )
    alpha: float | None = Field(None, ge=0, description="weight α ≥ 0 of the distance; default: 0.1, for mars none")
    beta: float = Field(0.01, ge=0, description="weight β ≥ 0 of the squared norm of the trained head rows")
    bound: float | None = Field(
        None, gt=0, description="bound γ > 0 of mars on the largest absolute row sum of a change; null for other norms"
    )

    @model_validator(mode="after")
    def _norms_keys(self) -> Anchor:
        if (self.norm == "mars") != (self.bound is not None) or (self.norm == "mars" and self.alpha is not None):
            raise ValueError(
                f"norm: {self.norm} takes {'bound and no alpha' if self.norm == 'mars' else 'alpha and no bound'}"
            )
        if self.norm == "fisher" and self.to == "previous":
            raise ValueError(
                "norm: fisher with to: previous is online EWC, which is learner avalanche with strategy: {name: EWC, "
                "mode: online}; set to: pretrained"
            )
        return self

    @property
    def weight(self) -> float:
        """α; 0 for mars."""
        return 0.0 if self.norm == "mars" else 0.1 if self.alpha is None else self.alpha


AnchorConfig = Annotated[Anchor | None, BeforeValidator(lambda raw: {"norm": raw} if isinstance(raw, str) else raw)]
"""A field of this type accepts the name of a norm, or a section."""


@dataclass(frozen=True)
class Anchored:
    """A trained tensor, its start, the importance of its entries (None: 1 each), and the factor on its rate."""

    weight: nn.Parameter
    start: Tensor
    importance: Tensor | None
    lr_factor: float


class AnchoredSteps:
    """What an anchor adds to one training: :meth:`penalty` to the loss, and :meth:`after_step` after every step.

    With d = θ − θ_0 and the rate η of the step:

    * ``l2``: α/2 ‖d‖² (L2-SP; Li et al., ICML 2018, arXiv 1802.01483), in the loss.
    * ``fisher``: α/2 Σ_j F_j d_j², in the loss; the same with the diagonal Fisher information F, of mean 1.
    * ``l1``: α ‖d‖₁ by proximal steps, θ ← θ_0 + sign(d) max(|d| − η α / (1 − μ), 0) after each step. At a constant
      gradient g, SGD with momentum μ moves by η g / (1 − μ), so a weight stays at θ_0 exactly where |g| ≤ α.
    * ``mars``: after each step every matrix W becomes W_0 + (W − W_0) / max(1, ‖W − W_0‖_∞ / γ), where ‖·‖_∞ is the
      largest absolute row sum (Gouk et al., ICLR 2021, arXiv 2002.08253). A vector is one column, a tensor of three
      dimensions is a stack of matrices, and the rows of a convolution are its output channels.

    β/2 ‖W, b‖² of the head is added for every norm. AdamW would rescale the gradients of squares for each weight, so
    under AdamW they act after the step, as its weight decay does: d ← max(0, 1 − η α F) d, and W ← max(0, 1 − η β) W.

    Args:
        config: Norm and weights.
        tensors: The anchored tensors.
        head: The trained tensors of the head, each with the factor on its rate.
        recipe: Optimiser, rates and momentum.
        per_epoch: Optimiser steps per epoch.
        decoupled: Whether squares act after the step; by default under AdamW.
    """

    def __init__(
        self,
        config: Anchor,
        tensors: Sequence[Anchored],
        head: Sequence[tuple[nn.Parameter, float]],
        recipe: Recipe,
        per_epoch: int,
        decoupled: bool | None = None,
    ) -> None:
        self.config, self.tensors, self.head, self.recipe = config, tensors, head, recipe
        self.decoupled = recipe.optimizer == "adamw" if decoupled is None else decoupled
        self._factor, self._step = rate_factor(recipe, per_epoch), 0

    def penalty(self) -> Tensor | None:
        """The term of the loss, a scalar; None without one."""
        if self.decoupled:
            return None
        config, squares = self.config, self.config.norm in ("l2", "fisher")
        if not self.config.beta and not (squares and config.weight):
            return None
        distance: Any = sum(_square(part) for part in self.tensors) if squares else 0.0
        head: Any = sum(p.square().sum() for p, _ in self.head)
        return config.weight / 2 * distance + config.beta / 2 * head

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the weights as the norm says; the rate is that of the step that was just taken."""
        rate = self.recipe.lr * self._factor(self._step)
        self._step += 1
        for part in self.tensors:
            if part.weight.requires_grad:  # not while its group is frozen
                self._move(part, rate * part.lr_factor)
        if self.decoupled and self.config.beta:
            for p, lr_factor in self.head:
                p.mul_(max(0.0, 1 - rate * lr_factor * self.config.beta))

    def _move(self, part: Anchored, rate: float) -> None:
        config, start = self.config, part.start
        change = part.weight - start
        if config.norm == "mars":
            assert config.bound is not None
            moved = start + change / (_row_sums(change) / config.bound).clamp(min=1)
        elif config.norm == "l1":
            threshold = rate * config.weight / (1 - self.recipe.momentum)
            moved = torch.where(change.abs() > threshold, part.weight - change.sign() * threshold, start)
        elif self.decoupled and config.weight:
            importance = 1.0 if part.importance is None else part.importance
            kept = 1 - rate * config.weight * importance
            moved = start + (kept.clamp(min=0) if isinstance(kept, Tensor) else max(0.0, kept)) * change
        else:
            return
        part.weight.copy_(moved)

    @property
    def unmoved(self) -> float:
        """Share of the anchored weights that equal their start exactly."""
        same = sum(int((part.weight == part.start).sum()) for part in self.tensors)
        return same / sum(part.weight.numel() for part in self.tensors)


def _square(part: Anchored) -> Tensor:
    squares = (part.weight - part.start).square()
    return (squares if part.importance is None else part.importance * squares).sum()


def _row_sums(change: Tensor) -> Tensor:
    """Largest absolute row sum of each matrix in a tensor, in a shape that the tensor is divided by."""
    rows = change.abs()
    if change.ndim == 4:
        return rows.flatten(1).sum(1).max()
    return rows.max() if change.ndim < 2 else rows.sum(-1, keepdim=True).amax(-2, keepdim=True)


class AnchorState(nn.Module):
    """What an anchor needs in later tasks: the start of a tuner that has one of its own, and Fisher information.

    The start of copied backbone weights is the backbone itself and is not kept.

    Args:
        config: The anchor.
        tuner: The tuner that is trained through all tasks.
        backbone: The frozen backbone.

    Buffers:
        start\\_<i>, importance\\_<i>: Of the shape of the tuner's i-th parameter; only where they are needed.
    """

    def __init__(self, config: Anchor, tuner: Tuner, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        for i, p in enumerate(tuner.parameters()):
            if config.to == "pretrained" and not isinstance(tuner, WeightTuner):
                self.register_buffer(f"start_{i}", torch.zeros_like(p))
            if config.norm == "fisher":
                self.register_buffer(f"importance_{i}", torch.zeros_like(p))
        object.__setattr__(self, "backbone", backbone)  # as in a learner: it is shared, and not part of the state

    backbone: Backbone

    @torch.no_grad()
    def tensors(self, tuner: Tuner, groups: Sequence[ParamGroup], task: Task, ctx: Context) -> list[Anchored]:
        """The tuner's trained tensors with their starts, before a task's training. The first task sets the state."""
        known = dict(self.named_buffers())
        if task.index == 0:
            for i, p in enumerate(tuner.parameters()):
                if f"start_{i}" in known:
                    known[f"start_{i}"].copy_(p)
            if self.config.norm == "fisher":
                for i, value in enumerate(self._fisher(tuner, task, ctx)):
                    known[f"importance_{i}"].copy_(value)
        factors = {id(p): group.lr_factor for group in groups for p in group.parameters}
        found = []
        for i, (p, start) in enumerate(zip(tuner.parameters(), self._starts(tuner), strict=True)):
            if id(p) in factors:
                found.append(Anchored(p, start, known.get(f"importance_{i}"), factors[id(p)]))
        return found

    def _starts(self, tuner: Tuner) -> list[Tensor]:
        if self.config.to == "previous":
            return [p.detach().clone() for p in tuner.parameters()]
        if isinstance(tuner, WeightTuner):
            original: dict[str, Any] = dict(self.backbone.model.named_parameters())
            return [original[name] for name in tuner.weights()]
        return [value for name, value in self.named_buffers() if name.startswith("start_")]

    def _fisher(self, tuner: Tuner, task: Task, ctx: Context) -> list[Tensor]:
        """F of the tuner at its start, of mean 1, with a softmax regression of the task's classes as the head."""
        head = LinearHead(self.backbone.feature_dim).to(ctx.device)
        head.partial_fit(*ctx.features(self.backbone, task.train))
        images, _ = next(task.train.batches(IMAGES, generator=ctx.generator, device=ctx.device))
        names = [f"tuner.{name}" for name, _ in tuner.named_parameters()]
        found = diagonal_fisher(_Tuned(self.backbone, tuner), [images], names, head=head, generator=ctx.generator)
        mean = sum(float(f.sum()) for f in found.values()) / sum(f.numel() for f in found.values())
        if not mean:
            log.warning("stage 0: the Fisher information is zero, and nothing is anchored")
        return [found[name] / (mean or 1.0) for name in names]


class _Tuned(nn.Module):
    """A backbone with a tuner as a module whose parameters are the tuner's."""

    def __init__(self, backbone: Backbone, tuner: Tuner) -> None:
        super().__init__()
        self.tuner, self._backbone = tuner, (backbone,)  # a tuple, or the backbone would be a part of this module

    def forward(self, images: Tensor) -> Tensor:
        return self._backbone[0](images, self.tuner)
