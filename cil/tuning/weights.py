"""Tuners that train copies of backbone weights; the backbone itself is not modified."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.vit import Tuner, final_norms, first_changed_block, last_blocks
from cil.errors import BackboneError
from cil.utils.precision import without_autocast


class ExternalWeights(Tuner):
    """Weights that the caller supplies in place of the backbone's; the tuner has no parameters.

    Args:
        replaced: Weights by name in the timm model, on the backbone's device.
    """

    rides_blocks = False  # it only replaces weights, so it fits any timm model

    def __init__(self, replaced: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.replaced = dict(replaced)

    def weights(self) -> Mapping[str, Tensor]:
        return self.replaced


class AddedWeights(Tuner):
    """The backbone's weights plus updates, which stay products of factors until a forward pass needs them.

    Args:
        frozen: The backbone's weights by name, kept by reference.
        updates: For each changed weight, tensors whose product is its update: two factors [m, r] and [r, n], or one
            tensor of the weight's shape.
    """

    rides_blocks = False  # it only replaces weights, so it fits any timm model

    def __init__(self, frozen: Mapping[str, Tensor], updates: Mapping[str, tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.frozen, self.updates = frozen, dict(updates)

    def weights(self) -> Mapping[str, Tensor]:
        return {name: self.frozen[name].detach() + update for name, update in self.products().items()}

    @without_autocast()
    def products(self) -> dict[str, Tensor]:
        """The updates as matrices, by name."""
        return {
            name: parts[0].float() if len(parts) == 1 else parts[0].float() @ parts[1].float()
            for name, parts in self.updates.items()
        }


class WeightTuner(Tuner):
    """Trainable copies of selected backbone weights, which replace the originals during a forward pass.

    Full fine-tuning selects every weight; a subset (biases, norms, the last blocks) costs only its own size. Before
    training, the features equal the frozen ones. The state dict contains only the copies. Nothing is random, so
    ``reset`` does nothing: build a new tuner to start over.

    Args:
        backbone: The frozen backbone, from which the initial values are copied.
        select: Function that says for a name in the timm model whether the weight is trained; by default all are.
    """

    rides_blocks = False  # it only replaces weights, so it fits any timm model

    def __init__(self, backbone: Backbone, select: Callable[[str], bool] = lambda name: True) -> None:
        super().__init__()
        self.copies = nn.ParameterDict()
        for name, value in backbone.model.named_parameters():
            if select(name):
                self.copies[name.replace(".", "/")] = nn.Parameter(value.detach().clone())  # keys must not contain dots
        self.first_block = first_changed_block(backbone.model, self.weights())

    def weights(self) -> Mapping[str, Tensor]:
        return {name.replace("/", "."): value for name, value in self.copies.items()}

    def refresh_final_norm(self, backbone: Backbone) -> None:
        """Set the final norm to scale 1 and shift 0, as in a newly built model, in place of the pre-trained values."""
        for norm in final_norms(backbone.model):
            nn.init.ones_(self.copies[f"{norm}/weight"])
            nn.init.zeros_(self.copies[f"{norm}/bias"])


def full(backbone: Backbone) -> WeightTuner:
    """Train every weight."""
    return WeightTuner(backbone)


def bitfit(backbone: Backbone) -> WeightTuner:
    """Train every bias, those of the norms included: BitFit (Ben Zaken et al. 2022, arXiv 2106.10199).

    Raises:
        BackboneError: The backbone has no bias.
    """
    tuner = WeightTuner(backbone, lambda name: name.rsplit(".", 1)[-1] == "bias")
    if not len(tuner.copies):
        raise BackboneError(f"bitfit: {type(backbone.model).__name__} has no bias to train; try lora or full")
    return tuner


def layernorm(backbone: Backbone) -> WeightTuner:
    """Train weight and bias of every LayerNorm, recognised by the module's type.

    Raises:
        BackboneError: The backbone has no LayerNorm.
    """
    norms = {name for name, module in backbone.model.named_modules() if isinstance(module, nn.LayerNorm)}
    tuner = WeightTuner(backbone, lambda name: name.rpartition(".")[0] in norms)
    if not len(tuner.copies):
        raise BackboneError(f"layernorm: {type(backbone.model).__name__} has no LayerNorm to train; try bitfit")
    return tuner


def partial(backbone: Backbone, blocks: int = 1) -> WeightTuner:
    """Train the last ``blocks`` transformer blocks and the final norm.

    Raises:
        BackboneError: ``blocks`` is not in 1 … number of blocks, or the model has no list of blocks.
    """
    chosen = last_blocks(backbone.model, blocks)
    return WeightTuner(backbone, lambda name: name.startswith(chosen))
