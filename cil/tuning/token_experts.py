"""Linear layers with low-rank experts: one chosen for each token by the token itself, or measured on each image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.vit import Tuner
from cil.errors import BackboneError
from cil.tuning.frozen import Frozen, shared_tree
from cil.tuning.peft_tree import uncalled
from cil.utils.precision import without_autocast


@dataclass(frozen=True)
class Experts:
    """The updates of one linear layer by T experts, Δ_t = L_t R_t.

    Attributes:
        left: L, [T, m, k]; experts of smaller rank are padded with zeros.
        right: R, [T, k, n]; its rows are orthogonal, as in R = √σ Vᵀ, in descending order of their lengths.
        bias: Changes of the layer's bias, [T, m]; None if there are none.
    """

    left: Tensor
    right: Tensor
    bias: Tensor | None = None


class SwappedLayers(Tuner):
    """A tuner that runs a copy of the module tree in which some linear layers are replaced; weights are shared.

    Args:
        backbone: The frozen backbone.
        layers: The replacements, by name of the linear layer.

    Raises:
        BackboneError: A name is no linear layer of the backbone, or the backbone only reads the layer's weight.
    """

    rides_blocks = False  # the tree is the model

    def __init__(self, backbone: Backbone, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._frozen, tree = Frozen(backbone.model), shared_tree(backbone.model)
        unused = uncalled(tree, {name: tree.get_submodule(name) for name in layers}, backbone.input_size)
        if unused:
            reader = type(backbone.model.get_submodule(unused[0].rpartition(".")[0])).__name__
            raise BackboneError(
                f"routing: {unused[0]} is read, not called, by {reader}, so tokens cannot choose its weight; tune "
                "other layers"
            )
        for name, layer in layers.items():
            path, _, last = name.rpartition(".")
            setattr(tree.get_submodule(path), last, layer)
        self._tree = [tree]  # in a list, or the frozen weights would become part of this module

    def model(self, model: nn.Module) -> nn.Module:
        if model is not self._frozen.model:
            raise BackboneError("this tuner was built on another backbone; build one on this backbone")
        return self._tree[0]


class TokenExperts(SwappedLayers):
    """SMILE (Tang et al., arXiv 2408.10174): every token of every layer takes the experts it has most energy in.

    y = W x + b + Σ_{t in top} w_t (Δ_t x + b_t − b), with ρ_t = ‖V_tᵀ x‖₂ over the first g right singular vectors V_t
    of Δ_t, the ``top`` experts with the largest ρ, and w their softmax. Nothing is trained, the order of the experts
    does not matter, and every token is routed alone.

    Args:
        backbone: The frozen backbone.
        experts: Experts by name of the linear layer; all other layers are the backbone's.
        directions: g ≥ 1; experts of smaller rank use all they have.
        top: Number of experts per token, ≥ 1.

    Raises:
        BackboneError: The backbone only reads the weight of a layer.
    """

    def __init__(self, backbone: Backbone, experts: Mapping[str, Experts], directions: int = 4, top: int = 1) -> None:
        super().__init__(
            backbone,
            {n: _Routed(backbone.model.get_submodule(n), each, directions, top) for n, each in experts.items()},
        )


class InputEnergies(SwappedLayers):
    """Measures how much of each layer's input lies in the first directions of each expert; nothing else changes.

    Args:
        backbone: The frozen backbone.
        experts: Experts by name of the linear layer.
        directions: Number g ≥ 1 of directions.

    Raises:
        BackboneError: The backbone only reads the weight of a layer.
    """

    def __init__(self, backbone: Backbone, experts: Mapping[str, Experts], directions: int = 4) -> None:
        measured: list[Tensor] = []
        super().__init__(
            backbone,
            {
                n: _Watched(backbone.model.get_submodule(n), e.right[:, :directions], measured)
                for n, e in experts.items()
            },
        )
        self.measured = measured

    def energies(self, backbone: Backbone, images: Tensor) -> Tensor | None:
        """Σ over layers of the tokens' mean ‖V_tᵀ h‖² / ‖h‖², for images [B, 3, H, W]; float32 [B, T], None without
        layers."""
        self.measured.clear()
        backbone(images, self)
        total = torch.stack(self.measured).sum(0) if self.measured else None
        self.measured.clear()
        return total


class _Routed(nn.Module):
    right: Tensor
    left: Tensor
    lengths: Tensor
    change: Tensor | None

    def __init__(self, base: nn.Module, experts: Experts, directions: int, top: int) -> None:
        super().__init__()
        self.base, (self.tasks, self.rank, _) = base, experts.right.shape
        self.top = min(top, self.tasks)
        right = experts.right.float()
        lengths = right.norm(dim=2)[:, :directions]
        self.register_buffer("right", right.flatten(0, 1), persistent=False)  # [T k, n]
        self.register_buffer("left", experts.left.float().transpose(1, 2).flatten(0, 1), persistent=False)  # [T k, m]
        self.register_buffer("lengths", torch.where(lengths > 0, lengths, 1), persistent=False)
        self.register_buffer("change", None if experts.bias is None else experts.bias.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        plain = self.base(x)
        with without_autocast():  # in bfloat16 the choice would depend on rounding
            inside = F.linear(x.float(), self.right).unflatten(-1, (self.tasks, self.rank))
            energy = (inside[..., : self.lengths.shape[1]] / self.lengths).norm(dim=-1)
            best, chosen = energy.topk(self.top, dim=-1)
            weights = torch.zeros_like(energy).scatter(-1, chosen, best.softmax(-1))
            added = (inside * weights[..., None]).flatten(-2) @ self.left
            if self.change is not None:
                added = added + weights @ self.change
        return plain + added.to(plain.dtype)


class _Watched(nn.Module):
    axes: Tensor

    def __init__(self, base: nn.Module, right: Tensor, measured: list[Tensor]) -> None:
        super().__init__()
        self.base, self.measured, self.tasks = base, measured, len(right)
        self.register_buffer("axes", F.normalize(right.float(), dim=2).flatten(0, 1), persistent=False)  # [T g, n]

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast():
            rows = F.normalize(x.float(), dim=-1).reshape(x.shape[0], -1, x.shape[-1])  # [B, N, n]
            energy = F.linear(rows, self.axes).unflatten(-1, (self.tasks, -1)).square().sum(-1).mean(1)
        self.measured.append(energy)
        return self.base(x)
