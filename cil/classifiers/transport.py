"""Entropic optimal transport between classes, and the weights that it carries over."""

from __future__ import annotations

import torch
from torch import Tensor

from cil.utils.precision import exact


@exact()
def barycentric(cost: Tensor, entropy: float, iterations: int = 1000) -> Tensor:
    """The rows with which targets are averages of sources, [m, n], under the entropic transport plan.

    The plan T [n, m] minimises Σ T_ij (c_ij + ε log T_ij) with uniform marginals 1/n and 1/m (Sinkhorn's algorithm, in
    the logarithmic domain, where costs far above ε do not underflow). The result is m Tᵀ, whose rows sum to 1: Tᵀ alone
    would carry only 1/m of a weight. It is a permutation for ε → 0, and all entries are 1/n for equal costs.

    Args:
        cost: Costs c, [n, m].
        entropy: ε > 0, in units of the costs.
        iterations: Largest number of iterations; the rows sum to 1 after any number.
    """
    scaled = -cost.double() / entropy
    rows = scaled.new_zeros(len(cost))
    for _ in range(iterations):
        columns = -torch.logsumexp(scaled + rows[:, None], 0)  # each column of m T sums to 1
        new = -torch.logsumexp(scaled + columns, 1) + torch.log(scaled.new_tensor(cost.shape[1] / cost.shape[0]))
        done = bool((new - rows).abs().max() < 1e-9)
        rows = new
        if done:
            break
    columns = -torch.logsumexp(scaled + rows[:, None], 0)
    return (scaled + rows[:, None] + columns).exp().T
