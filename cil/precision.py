"""Where rounding would change a result: contexts, and decorators, that compute in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Full precision inside: a mean, an inverse or a merge computed in bfloat16 is another one."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def exact() -> Iterator[None]:
    """For sums and solves: full precision, no gradients, and ordinary tensors even within ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.no_grad(), without_autocast():
        yield
