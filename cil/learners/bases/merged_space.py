"""The space in which tuners are merged: the effective backbone weights, or the tuner's own parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from cil.backbone import Backbone, feature_width
from cil.errors import ConfigError
from cil.learner import Context
from cil.merging import HEADS, Rule
from cil.stream import Task
from cil.tuning import AddedWeights, ExternalWeights, Tuner, TunerConfig, build_tuner
from cil.tuning.frozen import replaced_tree

R = TypeVar("R", bound=Rule)


class Mergeable(ABC):
    """The parameter space of a merging learner: its start θ_0, tuners at any θ, and the update a task has made.

    Attributes:
        initial: θ_0 by name, kept by reference; it may contain tensors that are not merged.
        names: Names of the tensors that are merged.
        width: Width of the features with a tuner.
    """

    config: TunerConfig
    initial: Mapping[str, Tensor]
    names: tuple[str, ...]
    width: int
    exclude: ClassVar[Sequence[str]] = HEADS

    def start(self, rule: R) -> R:
        """Start a rule at θ_0.

        Raises:
            ConfigError: The rule needs weights of linear layers, and there are none.
        """
        rule.start(self.initial, names=self.names, exclude=self.exclude)
        if rule.matrices and not any(entry.linear for entry in rule.layout.entries):
            raise ConfigError(
                f"merge: {type(rule).__name__} merges weights of linear layers, and tuner {self.config.name} trains "
                "none; choose another rule, e.g. average, ema or magmax"
            )
        return rule

    @abstractmethod
    def tuner(self, theta: Mapping[str, Tensor], generator: torch.Generator) -> Tuner:
        """A tuner to train on one task, starting at θ: :attr:`initial` or the merged weights."""

    @abstractmethod
    def update(self, tuner: Tuner, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """τ = θ_t − θ_0 of a tuner that was trained starting at θ, by name."""

    @abstractmethod
    def tuner_at(self, theta: Mapping[str, Tensor]) -> Tuner:
        """A tuner that computes features at θ. It is not for training."""

    def draw(self, generator: torch.Generator) -> None:  # noqa: B027  # pre-trained weights are not random
        """Draw the random part of θ_0, before the first task."""


class Weights(Mergeable):
    """Space of LoRA, SSF, full fine-tuning …: θ_0 are the pre-trained weights; each task trains a new tuner on θ.

    LoRA's update is the product of its factors. The factors are not merged themselves: the mean of two products B A is
    not the product of the means.
    """

    def __init__(self, config: TunerConfig, backbone: Backbone) -> None:
        self.config, self.backbone = config, backbone
        tuner = build_tuner(config, backbone)
        self.initial = dict(backbone.model.named_parameters())
        for name, value in tuner.weights().items():  # SSF gives a bias to layers that have none, which is one of zeros
            self.initial.setdefault(name, torch.zeros_like(value))
        self.names, self.width = tuple(self.update(tuner, self.initial)), backbone.feature_dim

    def tuner(self, theta: Mapping[str, Tensor], generator: torch.Generator) -> Tuner:
        backbone = self.backbone
        if theta is not self.initial:
            tree = replaced_tree(backbone.model, {name: theta[name] for name in self.names})
            backbone = Backbone(tree, backbone.name, backbone.data_config)
        tuner = build_tuner(self.config, backbone)
        tuner.reset(generator)
        return tuner if theta is self.initial or tuner.weights() else OnOtherWeights(tuner, backbone.model)

    def update(self, tuner: Tuner, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(tuner, AddedWeights):
            return tuner.products()
        delta: Any = getattr(tuner, "delta", None)
        if delta is not None:
            return {name: theta[name] - self.initial[name] + change for name, change in delta().items()}
        return {name: (weight - self.initial[name]).detach() for name, weight in tuner.weights().items()}

    def tuner_at(self, theta: Mapping[str, Tensor]) -> Tuner:
        return ExternalWeights({name: theta[name] for name in self.names})


class OnOtherWeights(Tuner):
    """A tuner that runs the module tree it was built on instead of the backbone's; its ΔW is added to these weights."""

    rides_blocks = False

    def __init__(self, tuner: Tuner, tree: nn.Module) -> None:
        super().__init__()
        self.tuner, self._tree = tuner, (tree,)  # a tuple, or the weights would become part of this module

    def model(self, model: nn.Module) -> nn.Module:
        return self.tuner.model(*self._tree)

    def delta(self) -> Mapping[str, Tensor]:
        tuner: Any = self.tuner
        return tuner.delta()


class Parameters(Mergeable, nn.Module):
    """Space of adapters, prefixes and prompts, which add modules to the network: the tuner's own parameters.

    All tasks start from the same random values, as in ACMap (arXiv 2412.18219): adapters with different random starts
    have hidden units in no common order, so that their mean is meaningless. The start is part of the state.
    """

    backbone: Backbone
    exclude = ()  # none of a tuner's parameters belongs to a classifier

    def __init__(self, config: TunerConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        object.__setattr__(self, "backbone", backbone)  # not a submodule: it is shared, and not part of the state
        self.drawn = build_tuner(config, backbone).requires_grad_(False)
        self.initial = dict(self.drawn.named_parameters())
        self.names, self.width = tuple(self.initial), feature_width(backbone, self.drawn)

    def draw(self, generator: torch.Generator) -> None:
        self.drawn.reset(generator)

    def start(self, rule: R) -> R:
        if rule.needs is not None:
            raise ConfigError(
                f"merge: tuner {self.config.name} adds modules to the network, and {type(rule).__name__} needs "
                "statistics of the network's own weights; choose another rule, or a tuner of weights such as lora"
            )
        return super().start(rule)

    def tuner(self, theta: Mapping[str, Tensor], generator: torch.Generator) -> Tuner:
        tuner = build_tuner(self.config, self.backbone)
        tuner.load_state_dict({**self.drawn.state_dict(), **theta})  # including random buffers
        return tuner

    def update(self, tuner: Tuner, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.detach() - self.initial[name] for name, value in tuner.named_parameters()}

    def tuner_at(self, theta: Mapping[str, Tensor]) -> Tuner:
        return self.tuner(theta, torch.Generator()).requires_grad_(False).eval()


def mergeable(config: TunerConfig, backbone: Backbone) -> Mergeable:
    """The space of a configured tuner: backbone weights if it replaces or updates them, else its own parameters.

    Raises:
        BackboneError: The tuner changes weights in another way than by addition (DoRA, IA³, OFT), or does not fit the
            backbone.
    """
    tuner = build_tuner(config, backbone)
    updates = hasattr(tuner, "delta") or bool(tuner.weights())
    return Weights(config, backbone) if updates else Parameters(config, backbone)


def require_weights(name: str, models: Mergeable, why: str) -> Weights:
    """Return the space if it is that of the backbone's weights.

    Args:
        name: The learner's name, for the message.
        models: The space of its tuner.
        why: The need for weights, a main clause for the message.

    Raises:
        ConfigError: The tuner has parameters of its own.
    """
    if not isinstance(models, Weights):
        raise ConfigError(
            f"{name}: tuner {models.config.name} adds modules to the network, and {why}; choose a tuner of weights "
            "such as lora or full"
        )
    return models


def some_images(backbone: Backbone, task: Task, count: int, ctx: Context) -> Iterator[Tensor]:
    """Batches of ``count`` random training images of a task, counted as forward passes."""
    left = count
    for images, _ in task.train.batches(min(64, left), generator=ctx.generator, device=ctx.device):
        images = images[:left]
        backbone.passes += len(images)
        yield images
        left -= len(images)
        if left == 0:
            return
