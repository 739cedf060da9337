"""Alignment: training a head on features sampled from one Gaussian per class (SLCA, SSIAT, TUNA, MOS, LCA)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from cil.classifiers import Gaussians
from cil.errors import ConfigError
from cil.learner import Context
from cil.training import ParamGroup, Recipe, fit

log = logging.getLogger(__name__)

Alignment = Callable[..., tuple[Tensor, Tensor]]
"""(features [B, F], labels [B], reduction="mean" or "none") → (loss, a scalar or [B]; logits [B, C])."""


class AlignedRecipe(Recipe):
    """A training recipe with the hyper-parameters of the alignment."""

    alignment_epochs: NonNegativeInt = Field(5, description="epochs of the alignment; 0: no alignment")
    alignment_lr: float = Field(0.01, gt=0, description="peak learning rate of the alignment")
    samples: PositiveInt = Field(
        256, description="vectors sampled per class and epoch of the alignment, and per optimiser step"
    )
    covariance_rank: PositiveInt | None = Field(
        None,
        description="number r ≥ 1 of directions that are kept of each class's covariance, beside its diagonal: r F "
        "numbers per class in place of F²/2; null: all",
    )
    variation: float = Field(
        0.0, ge=0, description="weight λ of LCA's term, the loss difference within a class (0.1 in its paper); 0: none"
    )


def softmax_of(scores: Callable[[Tensor], Tensor]) -> Alignment:
    """CE(scores(z), y) as a loss for :func:`align`."""

    def loss(features: Tensor, labels: Tensor, reduction: str = "mean") -> tuple[Tensor, Tensor]:
        logits = scores(features)
        return F.cross_entropy(logits, labels, reduction=reduction), logits

    return loss


def normalized_softmax_of(
    scores: Callable[[Tensor], Tensor], task_of_class: Tensor, temperature: float = 0.1
) -> Alignment:
    """:func:`normalized_cross_entropy` of the scores, as a loss for :func:`align`."""

    def loss(features: Tensor, labels: Tensor, reduction: str = "mean") -> tuple[Tensor, Tensor]:
        logits = scores(features)
        return normalized_cross_entropy(logits, labels, task_of_class, temperature, reduction), logits

    return loss


def align(
    loss: Alignment, group: ParamGroup, gaussians: Gaussians, scales: Tensor | None, config: AlignedRecipe, ctx: Context
) -> None:
    """Minimise ``loss`` over vectors from N(s_c μ_c, Σ_c).

    Args:
        loss: (features, labels, reduction) → (loss, logits), see :func:`with_variation`.
        group: Parameters of the head.
        gaussians: Gaussians of all classes so far; a class without images has none and is not sampled.
        scales: Factors s on the means, [C], e.g. from :func:`mean_scales`; None: 1.
        config: Hyper-parameters of the alignment.
        ctx: Context of the stage; losses are logged with the prefix ``alignment_``.
    """
    recipe = Recipe(
        epochs=config.alignment_epochs,
        train_batch_size=config.samples,
        lr=config.alignment_lr,
        weight_decay=config.weight_decay,
        schedule_per="epoch",
    )
    samples = SampledFeatures(gaussians, config.samples, scales, pairs=config.variation > 0)
    fit(with_variation(loss, config.variation), [group], samples, recipe, ctx, prefix="alignment_")
    if gaussians.raised > 1:
        ctx.log("alignment_ridge_raised", gaussians.raised)
        log.warning(
            "stage %d: the ridge of the class Gaussians was raised %.0e-fold, because the features are so large that "
            "float64 does not resolve it; scale the features down",
            ctx.stage,
            gaussians.raised,
        )


def mean_scales(task_of_class: Tensor, current: int | None = None) -> Tensor:
    """Factors on the class means when sampling after task t: 0.9 + 0.1 · (τ(c) + 1) / (t + 1), float32 [C].

    Args:
        task_of_class: Task τ(c) of each class, counted from 0, [C].
        current: Task t; by default the newest of these tasks.
    """
    current = int(task_of_class.max()) if current is None else current
    return 0.9 + 0.1 * (task_of_class + 1).float() / (current + 1)


def normalized_cross_entropy(
    logits: Tensor, labels: Tensor, task_of_class: Tensor, temperature: float = 0.1, reduction: str = "mean"
) -> Tensor:
    """SLCA's logit normalisation: CE(logits / (n · τ), y), n = mean over tasks of (‖logits of the task‖₂ + 10⁻⁷).

    Args:
        logits: Finite scores [B, C].
        labels: int64 [B].
        task_of_class: Task of each class, counted from 0, int64 [C]; each task has a class.
        temperature: Temperature τ > 0.
        reduction: ``mean`` over the batch, or ``none``.

    Returns:
        The loss, a scalar or [B]; the gradient also flows through n.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    tasks = int(task_of_class.max()) + 1
    squares = logits.new_zeros(len(logits), tasks).index_add(1, task_of_class.to(logits.device), logits.square())
    norms = squares.clamp(min=torch.finfo(logits.dtype).tiny).sqrt() + 1e-7  # the root has no derivative at 0
    return F.cross_entropy(logits / (norms.mean(1, keepdim=True) * temperature), labels, reduction=reduction)


def with_variation(loss: Alignment, weight: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """LCA's loss E ℓ(z) + λ · E |ℓ(z) − ℓ(z')|: samples of one class should have equal losses (arXiv 2603.09888).

    z and z' are independent samples of one class. ``SampledFeatures(…, pairs=True)`` returns them as one row, so a
    pair is never split between batches, micro-batches or processes. E ℓ is the mean over both.

    Args:
        loss: Loss ℓ, e.g. around cross-entropy or :func:`normalized_cross_entropy`.
        weight: Weight λ ≥ 0; for 0 the result is ``loss`` itself, on data without pairs.

    Returns:
        (z [B, F], z' [B, F], labels [B]) → (loss, a scalar; logits of z [B, C]).
    """
    if not weight:
        return loss

    def varied(features: Tensor, others: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        values, logits = loss(features, labels, reduction="none")
        twins, _ = loss(others, labels, reduction="none")
        return (values + twins).mean() / 2 + weight * (values - twins).abs().mean(), logits

    return varied


class SampledFeatures:
    """Training data sampled from Gaussians: every epoch has ``per_class`` new vectors of each class, shuffled.

    Implements the protocol ``cil.training.Batches``.

    Args:
        gaussians: Gaussians to sample from; classes without samples are left out.
        per_class: Vectors per class and epoch (SLCA: 256).
        scale: Factor on each class's mean, [C]; None: 1.
        pairs: Whether to return a second, independent vector of the same class in each row (:func:`with_variation`).
    """

    def __init__(
        self, gaussians: Gaussians, per_class: int = 256, scale: Tensor | None = None, pairs: bool = False
    ) -> None:
        if per_class < 1:
            raise ConfigError(f"SampledFeatures: per_class is {per_class}; it must be at least 1")
        self.gaussians, self.per_class, self.scale, self.pairs = gaussians, per_class, scale, pairs

    def __len__(self) -> int:
        return self.per_class * int((self.gaussians.counts > 0).sum())

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None,
        augment: bool,
        device: torch.device | str,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, ...]]:
        """One epoch: (float32 [b, F], int64 [b]) on ``device``; with ``pairs`` (float32 [b, F] twice, int64 [b]).

        Args:
            batch_size: Vectors per batch, over all processes.
            generator: Random generator of the order and the vectors; None: a fixed one, with equal vectors every epoch.
            augment: Ignored.
            device: Device of the batches.
            part: (rank, processes): yield rows ``[rank::processes]`` of each batch, possibly none. The samples do not
                depend on it.
        """
        generator = generator or torch.Generator().manual_seed(0)
        classes = self.gaussians.counts.nonzero().flatten().cpu().repeat_interleave(self.per_class)
        labels = classes[torch.randperm(len(self), generator=generator, device=generator.device).to(classes.device)]
        scale = None if self.scale is None else self.scale.to(labels.device)[labels]
        samples = [self.gaussians.sample(labels, generator, scale) for _ in range(1 + self.pairs)]
        rank, processes = part
        for batch in zip(*(rows.split(batch_size) for rows in (*samples, labels)), strict=True):
            yield tuple(rows[rank::processes].to(device) for rows in batch)
