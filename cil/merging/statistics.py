"""Statistics of a task that some rules need in addition to its weights: Fisher information, Gram matrices of inputs.

Both are sums over a task's own training images, computed when the task is merged; no image is kept. A few hundred
images are usual (256 in the references).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from cil.errors import ConfigError, DataError, nearest
from cil.merging.files import Checkpoint
from cil.merging.regmean import blocks
from cil.utils.files import replacing
from cil.utils.precision import exact


@dataclass(frozen=True)
class Statistics:
    """Statistics of one task, by the weight's name; the names must be those of the merged state dict.

    Attributes:
        fisher: Diagonal Fisher information, of the weight's shape.
        grams: Gram matrices of a linear layer's inputs, [in, in] or diagonal blocks [k, in/k, in/k].
    """

    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    grams: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically."""
        tensors = {f"fisher.{name}": value for name, value in self.fisher.items()}
        tensors |= {f"grams.{name}": value for name, value in self.grams.items()}
        with replacing(Path(path)) as temporary:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Open a file that :meth:`save` wrote; each tensor is read from disk at every access.

        Raises:
            BackboneError: The file does not exist or is damaged.
            DataError: The file has no statistics.
        """
        opened = Checkpoint(path)
        statistics = cls(opened.below("fisher."), opened.below("grams."))
        if not statistics.fisher and not statistics.grams:
            raise DataError(f"{path}: has no statistics; Statistics.save writes them")
        return statistics


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Tensor],
    names: Iterable[str] | None = None,
    *,
    head: nn.Module | None = None,
    classes: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Compute F_j = E_x E_{y ~ p(y|x)} (∂ log p(y|x) / ∂θ_j)², the diagonal of the Fisher information.

    It is the true Fisher information, at the model's own predictions. Gradients are squared per image and class: the
    square of a batch's summed gradient would include products of different images. Each image costs one forward pass
    and one backward pass per class. The model is in evaluation mode.

    Args:
        model: Module that returns logits [B, C], or features if there is a ``head``; it is not changed.
        batches: Images [B, 3, H, W] on the model's device.
        names: Names of the parameters to measure; None: all of the model's.
        head: Classifier of the task, features → logits; its own parameters are not measured.
        classes: Number of most probable classes to sum over, weighted by p(y|x), which is exact from C on; None: draw
            one y ~ p(y|x) per image.
        generator: CPU generator of the draws; seed 0 by default.

    Returns:
        Fisher information by name of the parameter, float32 ≥ 0 of its shape.

    Raises:
        ConfigError: A parameter is unknown, or ``classes`` is below 1.
        DataError: There is no image.
    """
    if classes is not None and classes < 1:
        raise ConfigError(f"diagonal_fisher: classes is {classes}; it must be at least 1, or None to draw one")
    parameters = dict(model.named_parameters())
    chosen = list(parameters) if names is None else list(names)
    for name in chosen:
        if name not in parameters:
            raise ConfigError(f"diagonal_fisher: the model has no parameter {name!r}{nearest(name, parameters)}")
    generator = generator or torch.Generator().manual_seed(0)
    images = 0
    with exact(), torch.enable_grad(), _evaluating(model, head):
        weights = {name: parameters[name].detach().requires_grad_() for name in chosen}
        total = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in weights.items()}
        for batch in batches:
            for image in batch.split(1):
                answer = functional_call(model, weights, (image,))
                log_p = (answer if head is None else head(answer)).float().log_softmax(1)[0]
                p = log_p.detach().exp()
                if classes is None:
                    labels = [(int(torch.multinomial(p.cpu(), 1, generator=generator)), 1.0)]
                else:
                    top = p.topk(min(classes, len(p)))
                    labels = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
                for i, (label, share) in enumerate(labels):
                    gradients = torch.autograd.grad(
                        log_p[label], list(weights.values()), retain_graph=i + 1 < len(labels), allow_unused=True
                    )
                    for name, gradient in zip(chosen, gradients, strict=True):
                        if gradient is not None:
                            total[name] += share * gradient.detach().float().square()
                images += 1
    if not images:
        raise DataError("diagonal_fisher: there are no images")
    return {name: value / images for name, value in total.items()}


def input_grams(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    block: int | None = None,
    layers: Container[str] | None = None,
    forward: Callable[[Tensor], Any] | None = None,
    centred: bool = False,
) -> dict[str, Tensor]:
    """Compute G = XᵀX / N of the inputs X [N, in] of every ``nn.Linear`` of a model; each token of an image is a row.

    Layers that are never called have no Gram matrix: those whose weights a model uses without calling them (BEiT's
    qkv), and those that the forward pass does not reach. The model is in evaluation mode, in full precision and without
    gradients.

    Args:
        model: Model whose layers are observed; it is not changed.
        batches: Images [B, 3, H, W] on the model's device.
        block: Width above which only the diagonal blocks of a Gram matrix are computed, as
            :class:`cil.merging.RegMean` uses them; None: no limit.
        layers: Names of the weights whose layers are observed; None: all.
        forward: Function that is called with the images; by default the model itself.
        centred: Whether the mean of X is subtracted from its rows, so that G is their covariance.

    Returns:
        Gram matrices by name of the layer's weight, float64 [k, in/k, in/k], k = 1 unless in blocks; exactly symmetric.

    Raises:
        DataError: There is no image, or an input is not finite.
    """
    sums: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().float()
            k = blocks(x.shape[-1], block)
            x = x.reshape(-1, k, x.shape[-1] // k).transpose(0, 1)  # [k, N, in/k]
            product = (x.mT @ x).double()
            sums[name] = sums.get(name, 0) + (product + product.mT) / 2
            if centred:
                means[name] = means.get(name, 0) + x.double().sum(1)
            rows[name] = rows.get(name, 0) + x.shape[1]

        return hook

    hooks = [
        layer.register_forward_pre_hook(watch(f"{name}.weight" if name else "weight"))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and (layers is None or f"{name}.weight" in layers)
    ]
    try:
        with exact(), _evaluating(model):
            for batch in batches:
                (forward or model)(batch)
    finally:
        for handle in hooks:
            handle.remove()
    if not sums:
        raise DataError("input_grams: no linear layer was called; are there images, and does the model have nn.Linear?")
    for name, value in sums.items():
        if not bool(torch.isfinite(value).all()):
            raise DataError(f"input_grams: inputs of {name} are NaN or infinite")
    grams = {name: value / rows[name] for name, value in sums.items()}
    for name, total in means.items():
        mean = total / rows[name]  # [k, in/k]
        grams[name] -= mean[:, :, None] * mean[:, None]
    return grams


@contextmanager
def _evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Set evaluation mode in the block; afterwards every submodule has its previous mode."""
    with ExitStack() as stack:
        for model in models:
            for module in model.modules() if model is not None else ():
                stack.callback(setattr, module, "training", module.training)
                module.training = False
        yield
