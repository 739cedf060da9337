"""Which of the tensors that optimisers were given had a gradient: a tensor that never had one was not trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import LBFGS
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


class Gradients:
    """The trainable parameters of all optimiser steps of a block, see :func:`watched_gradients`."""

    def __init__(self) -> None:
        # the parameters themselves are kept, so that no id is used twice
        self._seen: dict[int, nn.Parameter] = {}
        self._reached: set[int] = set()

    def before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Note the parameters that an optimiser is about to move."""
        if isinstance(optimizer, LBFGS):  # it computes gradients within its step
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and p.numel() and id(p) not in self._reached:
                    self._seen[id(p)] = p
                    if p.grad is not None:
                        self._reached.add(id(p))

    def never(self, module: nn.Module) -> list[str]:
        """What was never given a gradient: names in ``module``, and for tensors that are not in it their shapes."""
        names = {id(p): name for name, p in module.named_parameters()}
        missed = (p for key, p in self._seen.items() if key not in self._reached)
        return [names.get(id(p)) or f"a tensor of shape {tuple(p.shape)}" for p in missed]


@contextmanager
def watched_gradients() -> Iterator[Gradients]:
    """Watch every step of every optimiser in the block; a tensor that is frozen during a step is not expected to have a
    gradient in it."""
    gradients = Gradients()
    handle = register_optimizer_step_pre_hook(gradients.before_step)
    try:
        yield gradients
    finally:
        handle.remove()
