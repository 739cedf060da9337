"""TUNA: the most certain of the tasks' adapters, and one fused from all of them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.classifiers import CosineHead
from cil.features import View
from cil.learner import Context
from cil.learners.bank import AdapterBank, BankRecipe, chosen
from cil.precision import exact, without_autocast
from cil.stream import Task
from cil.training import cosface


class TUNA(AdapterBank):
    """TUNA: task-specific and universal adapters (Wang et al., arXiv 2508.08165).

    Adapter t: L = CosFace over the task's own classes + λ e^(−t) Σ_{i<t} :func:`overlap` of adapters t and i, t from 1.
    Universal adapter: :func:`fused` from all so far, after every task. An image takes, by itself, the adapter whose
    softmax over all classes has the lowest entropy, and a class scores the sum of its probabilities through that
    adapter and through the universal one: t + 1 passes (1 after the first task, where the two are equal).
    """

    class Config(BankRecipe):
        epochs: int = Field(15, gt=0, description="passes over each task")
        train_batch_size: int = Field(16, gt=0, description="images an optimiser step")
        samples: int = Field(80, gt=0, description="vectors drawn per class and epoch, and per optimiser step")
        shrink_means: bool = Field(
            True, description="draw from Gaussians of older tasks around shorter means, as SLCA does"
        )
        scale: float = Field(20.0, gt=0, description="s of the softmax over s · cos, in training and prediction")
        margin: float = Field(0.0, ge=0, description="m of CosFace")
        orthogonality: float = Field(1e-3, ge=0, description="λ of the overlap with the adapters before")

    name = "tuna"
    paper = "Wang et al., Integrating Task-Specific and Universal Adapters for PTM-based CIL, ICCV 2025, 2508.08165"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone, CosineHead(backbone.feature_dim))
        self.head.get_parameter("sigma").requires_grad_(False)  # it stays 1: s is given
        self.universal = self.fresh_adapter().requires_grad_(False)

    def learn(self, task: Task, ctx: Context) -> None:
        config, first, (*old, new) = self.config, task.classes[0], self.adapters
        rows = self.new_rows(task, ctx)

        def cosines(images: Tensor) -> Tensor:
            return F.pad(rows(self.backbone(images, new)), (first, 0), value=-math.inf)

        margin_loss = cosface(cosines, config, first, config.scale, config.margin)
        weight = config.orthogonality * math.exp(-(task.index + 1))

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            value, logits = margin_loss(images, labels)
            return value + weight * overlap(upward(new), map(upward, old)), logits

        self.acquire(task, ctx, loss if old and weight else margin_loss, rows)
        self.fuse()

    @exact()
    def fuse(self) -> None:
        for weight, *members in zip(
            self.universal.parameters(), *(adapter.parameters() for adapter in self.adapters), strict=True
        ):
            weight.copy_(fused(torch.stack(members)))

    def last_view(self) -> Mapping[Hashable, View]:
        alone = len(self.adapters) == 1  # fused from one, it is that one
        return {} if alone else {("universal", self.stages): partial(self.backbone, tuner=self.universal)}

    def scores(self, features: Tensor) -> Tensor:
        return self.config.scale * self.head(features)

    @without_autocast()
    def route(self, features: Tensor) -> Tensor:
        """argmin over the adapters of −Σ_c p_c log p_c, p = softmax(s · cos) over all classes."""
        log_p = self.scores_by_view(self.split(features)[:, : len(self.adapters)]).log_softmax(dim=2)
        entropy = -(log_p.exp() * log_p).sum(2)
        return entropy.argmin(1)

    @without_autocast()
    def routed_logits(self, features: Tensor, tasks: Tensor) -> Tensor:
        """p through the given adapter + p through the universal one, [B, C]."""
        p = self.scores_by_view(self.split(features)).softmax(dim=2)
        return chosen(p, tasks) + p[:, -1]


def fused(vectors: Tensor) -> Tensor:
    """One vector from t, [t, …] → […]: per entry s = sign of the sum, then the largest magnitude among those of sign s.

    TIES-Merging (arXiv 2306.01708) without its trimming; 0 where the entries cancel exactly.
    """
    sign = vectors.sum(0).sign()
    return sign * (sign * vectors).amax(0).clamp(min=0)


@without_autocast()
def overlap(new: Sequence[Tensor], old: Iterable[Sequence[Tensor]]) -> Tensor:
    """Σ over old adapters of the mean over blocks of ‖Uᵀ U_old‖₁, the sum of magnitudes; a scalar.

    U [F, r] is a block's upward projection, so the r × r products compare every direction an adapter can add to the
    features with every one of an older adapter.

    Args:
        new: U of each block.
        old: The same of each older adapter.
    """
    olds = [torch.cat(ups, dim=1) for ups in zip(*old, strict=True)]
    return torch.stack([(up.T @ ups).abs().sum() for up, ups in zip(new, olds, strict=True)]).mean()


def upward(adapter: nn.Module) -> list[Tensor]:
    """The upward projections of an adapter's blocks, each [F, r]."""
    return [weight for name, weight in adapter.named_parameters() if name.endswith("up.weight")]
