"""What SLCA, SSIAT, TUNA, MOS and LCA share: re-balancing a head on vectors drawn from a Gaussian per class."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from cil.classifiers import Gaussians, SampledFeatures, with_variation
from cil.classifiers.alignment import Alignment
from cil.learner import Context
from cil.training import Group, Recipe, fit


class AlignedRecipe(Recipe):
    """A recipe with the keys of the alignment."""

    alignment_epochs: NonNegativeInt = Field(5, description="passes over drawn vectors; 0: no alignment")
    alignment_lr: float = Field(0.01, gt=0, description="peak learning rate of the alignment")
    samples: PositiveInt = Field(256, description="vectors drawn per class and epoch, and per optimiser step")
    variation: float = Field(
        0.0, ge=0, description="λ of LCA's term, which makes all vectors of a class lose alike (0.1 in its paper)"
    )


def softmax_of(scores: Callable[[Tensor], Tensor]) -> Alignment:
    """CE(scores(z), y) as a loss for :func:`align`."""

    def loss(features: Tensor, labels: Tensor, reduction: str = "mean") -> tuple[Tensor, Tensor]:
        logits = scores(features)
        return F.cross_entropy(logits, labels, reduction=reduction), logits

    return loss


def align(
    loss: Alignment, group: Group, gaussians: Gaussians, scales: Tensor | None, config: AlignedRecipe, ctx: Context
) -> None:
    """Minimise ``loss`` over vectors from N(s_c μ_c, Σ_c).

    Args:
        loss: (features, labels, reduction) → (loss, logits), see :func:`cil.classifiers.with_variation`.
        group: The head's parameters.
        gaussians: Of all classes so far.
        scales: s, [C], e.g. :func:`cil.classifiers.mean_scales`; None: 1.
        config: Epochs, rates and numbers of the alignment.
        ctx: Logs under ``alignment_``.
    """
    recipe = Recipe(
        epochs=config.alignment_epochs,
        train_batch_size=config.samples,
        lr=config.alignment_lr,
        weight_decay=config.weight_decay,
        schedule_per="epoch",
    )
    drawn = SampledFeatures(gaussians, config.samples, scales, pairs=config.variation > 0)
    fit(with_variation(loss, config.variation), [group], drawn, recipe, ctx, prefix="alignment_")
