"""TUNA: one adapter per task; each image uses the most confident one together with an adapter fused from all."""

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
from cil.learners.bases.adapter_bank import AdapterBank, BankRecipe, select_adapter
from cil.learners.bases.new_classes import task_head
from cil.stream import Task
from cil.training import cosface
from cil.utils.precision import exact, without_autocast


class TUNA(AdapterBank):
    """TUNA: task-specific and universal adapters (Wang et al., arXiv 2508.08165).

    Adapter t: L = CosFace over the task's own classes + λ e^(−t) Σ_{i<t} :func:`overlap` of adapters t and i, with t
    from 1. The universal adapter is recomputed after every task from all adapters so far (:func:`fused`). Each image
    uses the adapter whose softmax over all classes has the lowest entropy; the score of a class is the sum of its
    probabilities with that adapter and with the universal one. Keeps all adapters, the head and one Gaussian per class.
    t + 1 passes per image (1 after the first task, when the two adapters are equal).
    """

    class Config(BankRecipe):
        epochs: int = Field(15, gt=0, description="epochs per task")
        train_batch_size: int = Field(16, gt=0, description="images per optimiser step")
        samples: int = Field(
            80, gt=0, description="vectors sampled per class and epoch of the alignment, and per optimiser step"
        )
        shrink_means: bool = Field(
            True, description="scale the means of older tasks' Gaussians down before sampling, as SLCA does"
        )
        scale: float = Field(20.0, gt=0, description="factor s > 0 on the cosines in every softmax")
        margin: float = Field(0.0, ge=0, description="margin m ≥ 0 of CosFace, a cosine")
        orthogonality: float = Field(1e-3, ge=0, description="weight λ ≥ 0 of the overlap with earlier adapters")

    name = "tuna"
    summary = "for each image the most confident task's adapter, with one fused from all"
    trains = "one adapter per task, head"
    paper = "Wang et al., Integrating Task-Specific and Universal Adapters for PTM-based CIL, ICCV 2025, 2508.08165"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone, CosineHead(backbone.feature_dim))
        self.head.get_parameter("sigma").requires_grad_(False)  # it stays 1: the factor s is in the configuration
        self.universal = self.fresh_adapter().requires_grad_(False)

    def learn(self, task: Task, ctx: Context) -> None:
        config, first, (*old, new) = self.config, task.classes[0], self.adapters
        rows = task_head(CosineHead(self.backbone.feature_dim), task, ctx)

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
        """Recompute the universal adapter."""
        for weight, *members in zip(
            self.universal.parameters(), *(adapter.parameters() for adapter in self.adapters), strict=True
        ):
            weight.copy_(fused(torch.stack(members)))

    def last_view(self) -> Mapping[Hashable, View]:
        single = len(self.adapters) == 1  # the adapter fused from one is that one
        return {} if single else {("universal", self.stages): partial(self.backbone, tuner=self.universal)}

    def scores(self, features: Tensor) -> Tensor:
        return self.config.scale * self.head(features)

    @without_autocast()
    def route(self, features: Tensor) -> Tensor:
        """argmin over the adapters of −Σ_c p_c log p_c, with p = softmax(s · cos) over all classes."""
        log_p = self.scores_by_view(self.split(features)[:, : len(self.adapters)]).log_softmax(dim=2)
        entropy = -(log_p.exp() * log_p).sum(2)
        return entropy.argmin(1)

    @without_autocast()
    def routed_logits(self, features: Tensor, tasks: Tensor) -> Tensor:
        """p with the adapters of ``tasks`` + p with the universal one, [B, C]."""
        p = self.scores_by_view(self.split(features)).softmax(dim=2)
        return select_adapter(p, tasks) + p[:, -1]


def fused(vectors: Tensor) -> Tensor:
    """Fuse t vectors into one, [t, …] → […]: per entry, the largest magnitude among values with the sign of the sum.

    This is TIES-Merging (arXiv 2306.01708) without trimming; an entry whose values cancel exactly is 0.
    """
    sign = vectors.sum(0).sign()
    return sign * (sign * vectors).amax(0).clamp(min=0)


@without_autocast()
def overlap(new: Sequence[Tensor], old: Iterable[Sequence[Tensor]]) -> Tensor:
    """Σ over old adapters of the mean over blocks of ‖Uᵀ U_old‖₁ (sum of absolute values); a scalar.

    U [F, r] is the up-projection of a block, so the r × r product compares every direction that the new adapter can add
    to the features with every direction of an old one.

    Args:
        new: Up-projections U of the new adapter, one per block.
        old: Up-projections of each old adapter.
    """
    olds = [torch.cat(ups, dim=1) for ups in zip(*old, strict=True)]
    return torch.stack([(up.T @ ups).abs().sum() for up, ups in zip(new, olds, strict=True)]).mean()


def upward(adapter: nn.Module) -> list[Tensor]:
    """The up-projections of an adapter's blocks, each [F, r]."""
    return [weight for name, weight in adapter.named_parameters() if name.endswith("up.weight")]
