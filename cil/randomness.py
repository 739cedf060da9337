"""Randomness that depends on (seed, stage) alone.

A learner draws from the generator it is handed; the process's global random states are never used, so a run that
resumes at stage 7 draws what an uninterrupted one would have drawn. Library code that insists on global state (timm's
and torchvision's random transforms) runs inside :func:`isolated`, which puts everything back afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*parts: int) -> int:
    """A 63-bit seed from a tuple of integers, e.g. (seed, stage); well mixed, stable across versions of numpy."""
    low, high = np.random.SeedSequence(parts).generate_state(2, np.uint32).tolist()
    return (high << 31 ^ low) & (2**63 - 1)


def generator(*parts: int) -> torch.Generator:
    """A CPU generator seeded by :func:`derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(*parts))


def seed_everything(seed: int) -> None:
    """Set the global states; only ever called inside :func:`isolated`."""
    torch.random.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def isolated(seed: int | None = None) -> Iterator[None]:
    """Give the block global random states of its own (seeded if ``seed`` is given), and restore the caller's after it.

    Covers Python's, numpy's and torch's states, of CPU and CUDA: what image transforms, layer constructors and dropout
    draw from.
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
