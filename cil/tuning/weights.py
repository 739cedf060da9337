"""Training real backbone weights without touching the backbone: a tuner that owns copies of the weights it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from cil.backbone import Backbone
from cil.vit import Tuner


class WeightTuner(Tuner):
    """Copies of selected backbone weights, swapped in for the time of a forward pass.

    Full fine-tuning selects every weight; a subset (biases, norms, the last blocks) costs only its own size. At step 0
    the tuned forward equals the frozen one. Its state dict is the changed weights and nothing else.

    Args:
        backbone: Where the starting values come from; it stays frozen.
        select: Which weights to train, by their name in the timm model; all by default.
    """

    rides_blocks = False  # replaces weights only, so any timm family will do

    def __init__(self, backbone: Backbone, select: Callable[[str], bool] = lambda name: True) -> None:
        super().__init__()
        self.copies = nn.ParameterDict()
        for name, value in backbone.model.named_parameters():
            if select(name):
                self.copies[name.replace(".", "/")] = nn.Parameter(value.detach().clone())  # keys may hold no dot

    def weights(self) -> Mapping[str, Tensor]:
        return {name.replace("/", "."): value for name, value in self.copies.items()}
