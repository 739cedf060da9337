"""Contexts, also usable as decorators, for computations that need full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in full precision: bfloat16 would change the result of a mean, an inverse or a merge."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def exact() -> Iterator[None]:
    """Compute in full precision, without gradients, and with ordinary tensors even within ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.no_grad(), without_autocast():
        yield
