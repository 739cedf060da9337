"""Estimates of a classifier's memory, and the refusal of one that does not fit the machine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cil.errors import ConfigError
from cil.utils.hardware import memory_bytes

GIB = 2**30
DOUBLE = 8
"""Bytes of a float64."""


def require_memory(
    name: str, peak: Callable[[int], float], width: int, remedy: str, device: torch.device | str = "cpu"
) -> None:
    """Refuse statistics that cannot fit, before a matrix is allocated or an image is read.

    The limit is the whole memory of the machine, or of the GPU: other programs may end, but no run fits more.

    Args:
        name: Name of the classifier, for the message.
        peak: Estimate of the largest memory in bytes for a width.
        width: Width that is wanted.
        remedy: What to change; ``{width}`` stands for the largest width that fits.
        device: Device that holds the statistics.

    Raises:
        ConfigError: The estimate for ``width`` is above the memory of the device.
    """
    limit = memory_bytes(torch.device(device))
    if peak(width) <= limit:
        return
    fits, too_wide = 0, width
    while too_wide - fits > 1:
        middle = (fits + too_wide) // 2
        fits, too_wide = (middle, too_wide) if peak(middle) <= limit else (fits, middle)
    raise ConfigError(
        f"{name}: statistics of width {width} take about {peak(width) / GIB:,.1f} GiB with their solution, and this "
        f"{'machine' if torch.device(device).type == 'cpu' else 'GPU'} has {limit / GIB:,.1f} GiB; "
        + (remedy.format(width=fits) if fits else "not even one feature fits: use fewer classes")
    )
