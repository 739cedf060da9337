"""Full-rank updates of linear layers, one task's at a time, that leave chosen directions of a layer's outputs alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.vit import Tuner, final_norms
from cil.tuning.frozen import Frozen
from cil.utils.precision import exact, without_autocast


class KeptPairs(nn.Module):
    """Σ_k U_k A_k of one layer: the directions of its outputs that old tasks keep, and what they write to them.

    Buffers:
        folded: Δ, what is added to the layer's weight, [R, D]; basis: U, orthonormal columns [R, k]; rows: A, [k, D];
        before: share of its task's energy that comes before each column, in [0, 1), float64 [k]; tasks: the task of
        each column, in order, int64 [k].
    """

    folded: Tensor
    basis: Tensor
    rows: Tensor
    before: Tensor
    tasks: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("folded", torch.zeros(rows, width))
        self.register_buffer("basis", torch.zeros(rows, 0))
        self.register_buffer("rows", torch.zeros(0, width))
        self.register_buffer("before", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("tasks", torch.zeros(0, dtype=torch.int64))

    @without_autocast()
    def outside(self, update: Tensor) -> Tensor:
        """(I − U Uᵀ) update: what an update [R, D] writes to the other directions."""
        return update - self.basis.to(update) @ (self.basis.T.to(update) @ update)

    @exact()
    def append(self, directions: Tensor, before: Tensor, update: Tensor, task: int) -> None:
        """Keep a task's directions [R, n], given its update ΔW [R, D], which Δ contains already."""
        found = self.outside(directions.double())
        self.basis = torch.cat([self.basis, found.to(self.basis)], 1)
        self.rows = torch.cat([self.rows, (found.T @ update.double()).to(self.rows)])
        self.before = torch.cat([self.before, before.to(self.before)])
        self.tasks = torch.cat([self.tasks, self.tasks.new_full((len(before),), task)])

    @exact()
    def cut(self, kept: Tensor) -> None:
        """Drop all columns but ``kept``, bool [k], and what they write: Δ = U A."""
        self.basis, self.rows = self.basis[:, kept], self.rows[kept]
        self.before, self.tasks = self.before[kept], self.tasks[kept]
        self.folded = (self.basis.double() @ self.rows.double()).to(self.folded)


class ProjectedUpdates(Tuner):
    """W = W_0 + Δ + (I − U Uᵀ) V in every chosen layer: V is the current task's update, zero at its start.

    Gradient descent on V is full fine-tuning with gradients projected by I − U Uᵀ, the weight decay being that of the
    update; it is also the training of A in W_0 + Δ + B A with B an orthonormal basis of the directions outside U.
    Alternatively the update is a product B A with both factors trained, which needs U to be empty. V, B and A exist in
    a task only. :meth:`fold` adds the update to Δ, so that a forward pass costs the same after any number of tasks.

    Args:
        backbone: The frozen backbone whose weights are updated; it is kept by reference and never modified.
        layers: Names of linear layers' weights [R, D] in the timm model.
        fresh_norm: Whether the final norm has scale 1 and shift 0 instead of the pre-trained values.

    Attributes:
        pairs: What is kept of each layer, in order of ``layers``.
    """

    rides_blocks = False  # it only replaces weights

    def __init__(self, backbone: Backbone, layers: Sequence[str], *, fresh_norm: bool = False) -> None:
        super().__init__()
        self._frozen, self.layers, self.fresh_norm = Frozen(backbone.model), list(layers), fresh_norm
        shapes = (backbone.model.get_parameter(name).shape for name in layers)
        self.pairs = nn.ModuleList(KeptPairs(*shape) for shape in shapes)
        self._current: list[tuple[nn.Parameter, ...]] = []  # (V,) or (B, A) of each layer, in a task
        self.to(backbone.device)

    def start(self, product_from: torch.Generator | None = None) -> list[nn.Parameter]:
        """Begin a task's update, which is zero, and return its parameters.

        Args:
            product_from: Generator of A [R, D] ~ U(±1/√D) (Kaiming-uniform with a = √5) of a product B A, B [R, R]
                zero; None: V.
        """
        self._current = []
        for pairs in self.kept:
            shape, device = pairs.folded.shape, pairs.folded.device
            if product_from is None:
                self._current.append((nn.Parameter(torch.zeros(shape, device=device)),))
            else:
                down = torch.empty(shape).uniform_(-1, 1, generator=product_from).to(device) / math.sqrt(shape[1])
                self._current.append((nn.Parameter(torch.zeros(shape[0], shape[0], device=device)), nn.Parameter(down)))
        return [p for parts in self._current for p in parts]

    @torch.no_grad()
    def fold(self) -> list[Tensor]:
        """Add the task's update to Δ and end it; returns ΔW [R, D] of each layer."""
        updates = [self._update(i) for i in range(len(self.pairs))]
        for pairs, update in zip(self.kept, updates, strict=True):
            pairs.folded += update
        self._current = []
        return updates

    def weights(self) -> Mapping[str, Tensor]:
        model, weights = self._frozen.model, {}
        for i, (name, pairs) in enumerate(zip(self.layers, self.kept, strict=True)):
            weights[name] = model.get_parameter(name) + pairs.folded
            if self._current:
                weights[name] = weights[name] + self._update(i)
        for norm in final_norms(model) if self.fresh_norm else []:
            weights[f"{norm}.weight"] = torch.ones_like(model.get_parameter(f"{norm}.weight"))
            weights[f"{norm}.bias"] = torch.zeros_like(model.get_parameter(f"{norm}.bias"))
        return weights

    @property
    def kept(self) -> list[KeptPairs]:
        return list(self.pairs)  # type: ignore[arg-type]

    def _update(self, i: int) -> Tensor:
        first, *second = self._current[i]
        return first @ second[0] if second else self.kept[i].outside(first)
