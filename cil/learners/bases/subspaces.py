"""Subspaces of a layer's inputs, from their second moments: those of old tasks, and what a new task adds to them."""

from __future__ import annotations

import torch
from torch import Tensor

from cil.utils.linalg import RESOLUTION
from cil.utils.precision import exact


@exact()
def new_directions(gram: Tensor, known: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of (I − P) C, orthogonal to what P projects on: InfLoRA's A (up to its factor).

    Args:
        gram: Second moments C of the new task's inputs, [D, D].
        known: Orthogonal projector P on the inputs of old tasks, [D, D]; zero for the first task.
        rank: Number r ≤ D of directions.

    Returns:
        Rows of length 1 that are orthogonal to one another and to P, float64 [r, D]. Rows are zero where the new
        inputs have nothing beyond P: a direction from rounding errors would reach into it.
    """
    gram, known = gram.double(), known.double()
    vectors, values, _ = torch.linalg.svd(gram - known @ gram)
    found = torch.where(values[:rank] > RESOLUTION * gram.norm(), vectors[:, :rank], 0)
    return (found - known @ found).T


@exact()
def grown(known: Tensor, gram: Tensor, energy: float) -> Tensor:
    """Add to P the fewest leading left singular vectors of (I − P) C with ‖P C‖² ≥ ε ‖C‖² afterwards (GPM, DualGPM).

    GPM is arXiv 2103.09762. DualGPM keeps a basis of the complement once that is smaller; the projector is the same.

    Args:
        known: Orthogonal projector P, [D, D].
        gram: Second moments C of a task's inputs, [D, D].
        energy: Share ε in [0, 1] of the squared norm of C.

    Returns:
        The projector, of the type of ``known``.
    """
    projector, gram = known.double(), gram.double()
    vectors, values, _ = torch.linalg.svd(gram - projector @ gram)
    values = torch.where(values > RESOLUTION * gram.norm(), values, 0)
    total = gram.square().sum()
    missing = values.square().flip(0).cumsum(0).flip(0)  # without the first k new directions
    count = int(((missing > (1 - energy) * total) & (values > 0)).sum())
    added = vectors[:, :count] - projector @ vectors[:, :count]
    return (projector + added @ added.T).to(known)
