"""Randomness that depends only on (seed, stage).

A learner draws from the generator it receives and never from the global random states of the process, so a run that is
resumed at stage 7 draws the same numbers as an uninterrupted one. Library code that requires global states (timm's and
torchvision's random transforms) runs inside :func:`isolated`, which restores them afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*parts: int) -> int:
    """Derive a 63-bit seed from integers, e.g. (seed, stage); it is well mixed and the same in all numpy versions."""
    low, high = np.random.SeedSequence(parts).generate_state(2, np.uint32).tolist()
    return (high << 31 ^ low) & (2**63 - 1)


def generator(*parts: int) -> torch.Generator:
    """Create a CPU generator seeded by :func:`derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(*parts))


def seed_everything(seed: int) -> None:
    """Seed the global random states of Python, numpy and torch. Call it only inside :func:`isolated`."""
    torch.random.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def isolated(seed: int | None = None) -> Iterator[None]:
    """Isolate the block's global random states: seed them if ``seed`` is given, and restore the caller's afterwards.

    These are the states of Python, numpy and torch, on CPU and CUDA. Image transforms, layer constructors and dropout
    draw from them.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        if seed is not None:
            seed_everything(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
