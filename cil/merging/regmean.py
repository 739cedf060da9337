"""RegMean, which preserves the outputs of linear layers on their tasks' inputs, and GramMerge, which extends it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cil.errors import ConfigError, DataError
from cil.merging.base import Rule, TaskNorms, TaskStatistics
from cil.merging.finalisers import Finaliser, LiNeS, NormMatching
from cil.merging.layout import Entry
from cil.merging.numerics import norm
from cil.merging.store import State, StateSpec
from cil.utils.linalg import ridge_solve


class RegMean(Rule):
    """RegMean (arXiv 2212.09849): each linear weight is the least squares fit to its outputs on all tasks,

        W = W_0 + (Σ_t Δ_t G̃_t) (Σ_t G̃_t + γ I)⁻¹,   G_t = X_tᵀX_t / N_t,   G̃ = ρ G + (1 − ρ) diag(G),

    with X_t [N, in] the layer's inputs on task t's images. All other tensors are averaged. Both factors are sums, so
    the rule is exact and order-free in constant memory. For a fixed γ it equals the recursion (our observation)

        Δ^(t) = Δ^(t−1) + (Δ_t − Δ^(t−1)) G̃_t H_t⁻¹,   H_t = Σ G̃ + γ I:

    the result follows the new model on inputs that the new task uses more than the old tasks did.

    The ridge penalty is on W − W_0, so directions that no task's inputs excite keep their pre-trained weights. The
    system is solved in float64 by Cholesky from float64 sums, since Gram matrices of real layers are ill-conditioned.

    ``add`` needs ``stats.grams``: G_t of every linear weight that was trained, as blocks [k, in/k, in/k] or whole
    [in, in]. If a weight was not changed by the task and has no Gram matrix, the task does not count for it. Gram
    matrices are second moments of activations on a task's images. They are statistics, not samples, but need thought
    where images are private.

    For ViT-B/16 the state is 85 M (products) and 134.5 M (Gram matrices, of which fc2's are 113 M) float64 numbers, the
    latter 49.5 M with ``block=768``.

    Args:
        rho: Factor ρ in [0, 1] on the off-diagonal entries of Gram matrices.
        ridge: Penalty γ as a multiple of the mean diagonal of Σ G̃, > 0. A penalty below float64's resolution of Σ G̃ is
            raised tenfold until the sum is numerically positive definite.
        block: Largest width of a Gram matrix; wider ones are kept as equal diagonal blocks of at most this width, as if
            the inputs of different blocks were uncorrelated. None: no limit.

    State:
        Linear weights: gram: float64 [k, in/k, in/k], Σ G̃; product: float64 [out, in], Σ Δ G̃. Others: sum.

    Raises:
        ConfigError: An argument is out of range.
    """

    summary = "least squares fit to the layer outputs of all tasks"
    paper = "arXiv 2212.09849"
    state_size = "P and Gram matrices, float64"
    needs = "grams"
    matrices = True

    def __init__(
        self,
        rho: float = 0.95,
        ridge: float = 1e-3,
        block: int | None = None,
        *,
        finalisers: Sequence[Finaliser] = (),
    ) -> None:
        super().__init__(finalisers)
        name = type(self).__name__
        if not 0 <= rho <= 1:
            raise ConfigError(f"{name}: rho is {rho}; it must be in [0, 1]")
        if not 0 < ridge < math.inf:
            raise ConfigError(f"{name}: ridge is {ridge}; it must be positive and finite")
        if block is not None and block < 1:
            raise ConfigError(f"{name}: block is {block}; it must be at least 1, or None")
        self.rho, self.ridge, self.block = rho, ridge, block

    def state_spec(self, entry: Entry) -> StateSpec:
        if not entry.linear:
            return {"sum": (entry.shape, self.layout.dtype)}
        k = blocks(entry.shape[1], self.block)
        width = entry.shape[1] // k
        return {"gram": ((k, width, width), torch.float64), "product": (entry.shape, torch.float64)}

    def inspect(self, entry: Entry, tau: Tensor, stats: TaskStatistics | None) -> None:
        if not entry.linear:
            return
        gram = None if stats is None else stats.grams.get(entry.name)
        if gram is None:
            if bool(tau.any()):
                raise DataError(
                    f"{type(self).__name__}: the statistics have no Gram matrix of {entry.name}, which was trained; if "
                    "no nn.Linear computes with this weight, limit linear weights by start(…, linear=stats.grams)"
                )
            return
        if gram.ndim not in (2, 3) or gram.shape[-1] != gram.shape[-2] or gram[..., 0].numel() != entry.shape[1]:
            width = entry.shape[1]
            raise DataError(
                f"{type(self).__name__}: the Gram matrix of {entry.name} has shape {list(gram.shape)}; expected "
                f"[{width}, {width}], or as diagonal blocks [k, {width}/k, {width}/k]"
            )
        if not math.isfinite(norm(gram)):
            raise DataError(f"{type(self).__name__}: the Gram matrix of {entry.name} has NaN or infinite entries")
        self._blocked(entry, gram)

    def update(self, entry: Entry, state: State, tau: Tensor, task: TaskNorms, stats: TaskStatistics | None) -> State:
        if not entry.linear:
            return {"sum": state["sum"] + tau}
        gram = None if stats is None else stats.grams.get(entry.name)
        if gram is None:
            return state
        gram = self._blocked(entry, gram).to(state["gram"])
        gram = self.rho * gram + (1 - self.rho) * torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
        product = state["product"] + times(tau.double(), gram)
        return {"gram": state["gram"] + gram, "product": product}

    def read(self, entry: Entry, state: State, statistic: float) -> Tensor:
        if not entry.linear:
            return state["sum"] / int(self.count)
        k, width, _ = state["gram"].shape
        strength = self.ridge * float(state["gram"].diagonal(dim1=1, dim2=2).mean())
        if strength == 0:  # all inputs so far were zero
            return torch.zeros_like(state["product"])
        right = state["product"].reshape(-1, k, width).permute(1, 2, 0)  # [k, in/k, out]
        return ridge_solve(state["gram"], right, strength).permute(2, 0, 1).reshape(entry.shape)

    def _blocked(self, entry: Entry, gram: Tensor) -> Tensor:
        """The Gram matrix as the diagonal blocks [k, w, w] that the state has."""
        (k, width, _), _ = self.state_spec(entry)["gram"]
        if gram.ndim == 2:
            gram = gram[None]
        if len(gram) == k:
            return gram
        if len(gram) != 1:
            raise DataError(
                f"{type(self).__name__}: the Gram matrix of {entry.name} comes in {len(gram)} blocks; "
                f"expected {k if k == 1 else f'{k}, or 1'}"
            )
        return torch.stack([gram[0, i * width : (i + 1) * width, i * width : (i + 1) * width] for i in range(k)])


class GramMerge(RegMean):
    """RegMean, followed by a scale that grows with depth and a cap at the tasks' mean norm; this is our own proposal.

    RegMean's recursive form is a soft filter on the input side: on inputs like those of old tasks a layer keeps its old
    output, which reduces interference as well as the drift of old features. The update is then scaled by depth
    (:class:`LiNeS` with α = ``slope``, β = 1 − α) and capped at the mean norm n̄ (:class:`NormMatching`). There are no
    published results for this combination or its defaults.

    Args:
        slope: Scale α in [0, 1] of the first block and of all tensors outside blocks; with 1 depth has no effect.
        cap: Whether to cap the norm.
        rho, ridge, block: Arguments of :class:`RegMean`; wide Gram matrices are kept block-diagonal by default.
    """

    summary = "RegMean with a slope over depth and a capped norm"
    paper = ""

    def __init__(
        self,
        slope: float = 0.5,
        cap: bool = True,
        rho: float = 0.95,
        ridge: float = 1e-3,
        block: int | None = 1024,
        *,
        finalisers: Sequence[Finaliser] = (),
    ) -> None:
        if not 0 <= slope <= 1:
            raise ConfigError(f"GramMerge: slope is {slope}; it must be in [0, 1]")
        own = ([LiNeS(slope)] if slope < 1 else []) + ([NormMatching(cap=True)] if cap else [])
        super().__init__(rho, ridge, block, finalisers=[*own, *finalisers])
        self.slope, self.cap = slope, cap


def blocks(width: int, limit: int | None) -> int:
    """Return the number of equal diagonal blocks, none wider than ``limit``, of a Gram matrix [width, width]."""
    if limit is None or width <= limit:
        return 1
    return next(k for k in range(-(-width // limit), width + 1) if width % k == 0)


def times(left: Tensor, gram: Tensor) -> Tensor:
    """Multiply left [out, in] by a block-diagonal matrix [k, in/k, in/k]."""
    k, width, _ = gram.shape
    parts = left.reshape(-1, k, width).transpose(0, 1) @ gram  # [k, out, in/k]
    return parts.transpose(0, 1).reshape(left.shape)
