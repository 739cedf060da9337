"""Subspaces of a layer's inputs, from their second moments, and of its outputs: of old tasks, and of a new one."""

from __future__ import annotations

import torch
from torch import Tensor

from cil.utils.linalg import RESOLUTION, shifted_cholesky
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


@exact()
def shared_directions(gram: Tensor, past: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of C + P, which new and old inputs excite: LoDA's A_S (up to its factor), [r, D].

    Args:
        gram: Second moments C of the new task's inputs, [D, D].
        past: Sum P of those of old tasks, [D, D]; zero for the first task.
        rank: Number r ≤ D of directions.
    """
    return torch.linalg.eigh(gram.double() + past.double())[1].flip(1)[:, :rank].T


@exact()
def isolated_directions(gram: Tensor, past: Tensor, rank: int) -> Tensor:
    """An orthonormal basis of the r leading solutions of C u = λ P u, which new inputs excite far more than old ones.

    The arguments are those of :func:`shared_directions`, with P not zero. P gets 10⁻¹² of its mean diagonal more on the
    diagonal if it is singular, or more where that does not suffice. The rows are LoDA's A_P up to its factor, [r, D].
    """
    past = past.double()
    factor, _ = shifted_cholesky(past, 1e-12 * float(past.diagonal().mean()))
    half = torch.linalg.solve_triangular(factor, gram.double(), upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
    vectors = torch.linalg.eigh((whitened + whitened.T) / 2)[1].flip(1)[:, :rank]
    return torch.linalg.qr(torch.linalg.solve_triangular(factor.T, vectors, upper=True))[0].T


@exact()
def compromise(directions: Tensor, gram: Tensor, past: Tensor, weight: float) -> Tensor:
    """γ e_C / (e_P + γ e_C) for each direction a, with e_P = a P aᵀ and e_C = a C aᵀ; it is 1 if both are 0, [r].

    It is the factor κ that minimises e_P κ² + γ e_C (1 − κ)²: what an update keeps between old and new inputs.

    Args:
        directions: Rows a, [r, D].
        gram: Second moments C of the new task's inputs, [D, D].
        past: Sum P of those of old tasks, [D, D].
        weight: γ > 0.
    """
    a = directions.double()
    new, old = (torch.einsum("rd,de,re->r", a, moment.double(), a).clamp(min=0) for moment in (gram, past))
    return torch.where(new + old > 0, weight * new / (old + weight * new), 1.0)


@exact()
def output_directions(update: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Principal directions of what an update adds to a layer's outputs, ΔW x: E²-LoRA's U, without an arbitrary column.

    They are the left singular vectors of ΔW L with L Lᵀ = Cov(x), and lie in the range of ΔW.

    Args:
        update: ΔW, [R, D].
        covariance: Cov(x) of the layer's inputs, [D, D].

    Returns:
        Orthonormal columns in order of falling energy, float64 [R, n], n ≤ D: those whose energy (squared singular
        value) is not rounding error; and the share of the energy that comes before each of them, float64 [n].
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    left, found, _ = torch.linalg.svd(update.double() @ (vectors * values.clamp(min=0).sqrt()), full_matrices=False)
    energy = found.square()
    energy = energy[energy > RESOLUTION * energy[:1]]
    return left[:, : len(energy)], (energy.cumsum(0) - energy) / energy.sum()


def within_budget(before: Tensor, budget: int) -> Tensor:
    """Which directions stay: those with less than a share θ of their task's energy before them, at most ``budget``.

    θ is the largest of 0.99999, 0.99998, … that leaves ``budget`` directions or fewer. With more tasks than that, the
    first directions of the first tasks stay.

    Args:
        before: Share of its task's energy before each direction, tasks in order, float64 [k].
        budget: Largest number of directions, ≥ 0.

    Returns:
        bool [k].
    """
    shares = torch.arange(99_999, -1, -1, dtype=torch.float64, device=before.device) / 100_000
    fits = torch.searchsorted(before.sort().values, shares, right=True) <= budget
    if bool(fits.any()):
        return before <= shares[fits][0]
    first = before == 0
    return first & (first.cumsum(0) <= budget)
