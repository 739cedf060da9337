"""SSF: features are scaled and shifted, by changing the weights of the layers that compute them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.vit import Tuner, affine_layers
from cil.errors import BackboneError
from cil.tuning.frozen import Frozen

STD = 0.02


class SSF(Tuner):
    """SSF (Lian et al. 2022, arXiv 2210.08823): y = x ⊙ γ + β after every affine layer of a ViT.

    The output of such a layer is linear in its weight and bias, so the scale and shift are applied to these:
    W' = γ ⊙ W (by output channel), b' = γ ⊙ b + β. The forward pass costs as much as the frozen one. Initially
    γ ~ N(1, 0.02²) and β ~ N(0, 0.02²): the network is slightly perturbed before training, as in the authors' code.
    There are 205,824 parameters on ViT-B/16.

    Args:
        backbone: The frozen backbone whose weights are scaled; it is kept by reference and never modified.

    Raises:
        BackboneError: The backbone's blocks have no views, or one of its norms has no weight and bias (RMSNorm).
    """

    rides_blocks = False

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self._frozen = Frozen(backbone.model)
        self.gamma, self.beta = nn.ParameterDict(), nn.ParameterDict()
        self.biases = affine_layers(backbone.model)
        for name in self.biases:
            layer = backbone.model.get_submodule(name)
            # a linear layer without bias still has the entry that functional_call fills; RMSNorm does not
            weight = layer._parameters.get("weight")
            if weight is None or "bias" not in layer._parameters:
                raise BackboneError(f"SSF needs layers with weight and bias; {name} is {type(layer).__name__}")
            width, key = len(weight), name.replace(".", "/")  # keys must not contain dots
            self.gamma[key], self.beta[key] = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.reset(torch.Generator().manual_seed(0))
        self.to(backbone.device)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw γ ~ N(1, 0.02²) and β ~ N(0, 0.02²)."""
        for name in self.gamma:
            for value, mean in ((self.gamma[name], 1.0), (self.beta[name], 0.0)):
                value.copy_(torch.empty(value.shape).normal_(mean, STD, generator=generator))

    def weights(self) -> Mapping[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for key, gamma in self.gamma.items():
            name, beta = key.replace("/", "."), self.beta[key]
            layer = self._frozen.model.get_submodule(name)
            weight = layer._parameters["weight"]
            weights[f"{name}.weight"] = weight * gamma.view(-1, *[1] * (weight.ndim - 1))  # type: ignore[union-attr]
            parts = self.biases[name]  # three beside a fused qkv of some families, one of which is a buffer of zeros
            for entry, scale, shift in zip(parts, gamma.chunk(len(parts)), beta.chunk(len(parts)), strict=True):
                owner, _, key = entry.rpartition(".")
                bias = getattr(self._frozen.model.get_submodule(owner), key)
                weights[entry] = shift if bias is None else bias * scale + shift
        return weights
