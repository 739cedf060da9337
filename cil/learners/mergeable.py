"""What of a tuner is merged: the weights of the backbone that it comes to, or its own parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.errors import ConfigError
from cil.merging import HEADS, Rule
from cil.tuning import GivenWeights, Tuner, TunerConfig, build_tuner
from cil.tuning.frozen import replaced_tree


class Mergeable(ABC):
    """Where the models of all tasks lie side by side: θ_0, how a task starts from a θ, and what it moved it by.

    Attributes:
        initial: θ_0 by name, kept by reference; what is not merged may be among it, too.
        names: What is merged.
    """

    config: TunerConfig
    initial: Mapping[str, Tensor]
    names: tuple[str, ...]
    exclude: ClassVar[Sequence[str]] = HEADS

    def start(self, rule: Rule) -> Rule:
        """Begin a rule at θ_0.

        Raises:
            ConfigError: The rule is for weights of linear maps, and there are none.
        """
        rule.start(self.initial, names=self.names, exclude=self.exclude)
        if rule.matrices and not any(entry.linear for entry in rule.layout.entries):
            raise ConfigError(
                f"merge: {type(rule).__name__} is for weights of linear layers, and tuner {self.config.name} trains "
                "none; choose another rule, e.g. average, ema or magmax"
            )
        return rule

    @abstractmethod
    def tuner(self, theta: Mapping[str, Tensor], generator: torch.Generator) -> Tuner:
        """What a task trains, at θ: :attr:`initial` or what a rule merged."""

    @abstractmethod
    def update(self, tuner: Tuner, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """τ = θ_t − θ_0 of a tuner that was trained from θ, by name."""

    @abstractmethod
    def given(self, theta: Mapping[str, Tensor]) -> Tuner:
        """What sees through θ. It never trains."""

    def draw(self, generator: torch.Generator) -> None:  # noqa: B027  # pre-trained weights are not drawn
        """Draw what of θ_0 is random, before the first task."""


class Weights(Mergeable):
    """Of LoRA, SSF, full fine-tuning …: θ_0 are the pre-trained weights, and every task has a tuner of its own on θ.

    LoRA's update is formed from its factors, which are never merged one by one: the mean of two products B A is not
    the product of the means.
    """

    def __init__(self, config: TunerConfig, backbone: Backbone) -> None:
        self.config, self.backbone = config, backbone
        self.initial = dict(backbone.model.named_parameters())
        self.names = tuple(self.update(build_tuner(config, backbone), self.initial))

    def tuner(self, theta: Mapping[str, Tensor], generator: torch.Generator) -> Tuner:
        backbone = self.backbone
        if theta is not self.initial:
            tree = replaced_tree(backbone.model, {name: theta[name] for name in self.names})
            backbone = Backbone(tree, backbone.name, backbone.data_config)
        tuner = build_tuner(self.config, backbone)
        tuner.reset(generator)
        return tuner if theta is self.initial or tuner.weights() else OnOtherWeights(tuner, backbone.model)

    def update(self, tuner: Tuner, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        delta: Any = getattr(tuner, "delta", None)
        if delta is not None:
            return {name: theta[name] - self.initial[name] + change for name, change in delta().items()}
        return {name: (weight - self.initial[name]).detach() for name, weight in tuner.weights().items()}

    def given(self, theta: Mapping[str, Tensor]) -> Tuner:
        return GivenWeights({name: theta[name] for name in self.names})


class OnOtherWeights(Tuner):
    """A tuner that runs the module tree it was built on, not the backbone's; its ΔW comes on top of these weights."""

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
    """Of adapters, prefixes and prompts, which add to the network: the parameters themselves.

    All tasks start from one draw of them, as in ACMap (arXiv 2412.18219): adapters that were drawn apart have hidden
    units in no common order, and a mean of them is the mean of nothing. The draw is part of the state.
    """

    backbone: Backbone
    exclude = ()  # no name of its own is a classifier's

    def __init__(self, config: TunerConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        object.__setattr__(self, "backbone", backbone)  # not a submodule: it is shared, and not part of the state
        self.drawn = build_tuner(config, backbone).requires_grad_(False)
        self.initial = dict(self.drawn.named_parameters())
        self.names = tuple(self.initial)

    def draw(self, generator: torch.Generator) -> None:
        self.drawn.reset(generator)

    def start(self, rule: Rule) -> Rule:
        if rule.needs is not None:
            raise ConfigError(
                f"merge: {self.config.name} adds to the network, and {type(rule).__name__} needs statistics of the "
                "network's own weights; choose another rule, or a tuner that changes weights such as lora"
            )
        return super().start(rule)

    def tuner(self, theta: Mapping[str, Tensor], generator: torch.Generator) -> Tuner:
        tuner = build_tuner(self.config, self.backbone)
        tuner.load_state_dict({**self.drawn.state_dict(), **theta})  # with what else was drawn, as buffers
        return tuner

    def update(self, tuner: Tuner, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.detach() - self.initial[name] for name, value in tuner.named_parameters()}

    def given(self, theta: Mapping[str, Tensor]) -> Tuner:
        return self.tuner(theta, torch.Generator()).requires_grad_(False).eval()


def mergeable(config: TunerConfig, backbone: Backbone) -> Mergeable:
    """Of the tuner that a configuration names: the weights it comes to where it replaces or updates weights.

    Raises:
        BackboneError: The tuner changes layers in a way that is no sum (DoRA, IA³, OFT), or does not fit the backbone.
    """
    tuner = build_tuner(config, backbone)
    updates = hasattr(tuner, "delta") or bool(tuner.weights())
    return Weights(config, backbone) if updates else Parameters(config, backbone)
