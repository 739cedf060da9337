"""Training real backbone weights without touching the backbone: a tuner that owns copies of the weights it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from cil.backbone import Backbone
from cil.errors import BackboneError
from cil.vit import Tuner, final_norms, last_blocks


class GivenWeights(Tuner):
    """Weights given from outside in place of the backbone's, by their name in the timm model; it owns no parameter.

    Args:
        replaced: Name → weight, on the backbone's device.
    """

    rides_blocks = False  # replaces weights only, so any timm family will do

    def __init__(self, replaced: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.replaced = dict(replaced)

    def weights(self) -> Mapping[str, Tensor]:
        return self.replaced


class WeightTuner(Tuner):
    """Copies of selected backbone weights, swapped in for the time of a forward pass.

    Full fine-tuning selects every weight; a subset (biases, norms, the last blocks) costs only its own size. At step 0
    the tuned forward equals the frozen one. Its state dict is the changed weights and nothing else. Nothing about it is
    random, so ``reset`` does nothing: build another one to start over.

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

    def refresh_final_norm(self, backbone: Backbone) -> None:
        """Start the final norm from scale 1 and shift 0, as a newly built one, instead of the pre-trained values."""
        for norm in final_norms(backbone.model):
            nn.init.ones_(self.copies[f"{norm}/weight"])
            nn.init.zeros_(self.copies[f"{norm}/bias"])


def full(backbone: Backbone) -> WeightTuner:
    """Every weight."""
    return WeightTuner(backbone)


def bitfit(backbone: Backbone) -> WeightTuner:
    """BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): every bias, those of the norms included."""
    return WeightTuner(backbone, lambda name: name.rsplit(".", 1)[-1] == "bias")


def layernorm(backbone: Backbone) -> WeightTuner:
    """Weight and bias of every LayerNorm, recognised by the module's type.

    Raises:
        BackboneError: The backbone has none.
    """
    norms = {name for name, module in backbone.model.named_modules() if isinstance(module, nn.LayerNorm)}
    tuner = WeightTuner(backbone, lambda name: name.rpartition(".")[0] in norms)
    if not len(tuner.copies):
        raise BackboneError(f"layernorm: {type(backbone.model).__name__} has no LayerNorm to train; try bitfit")
    return tuner


def partial(backbone: Backbone, blocks: int = 1) -> WeightTuner:
    """The last ``blocks`` transformer blocks and the final norm.

    Raises:
        BackboneError: ``blocks`` is not in 1 … number of blocks, or the model has no list of blocks.
    """
    chosen = last_blocks(backbone.model, blocks)
    return WeightTuner(backbone, lambda name: name.startswith(chosen))
