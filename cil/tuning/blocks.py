"""The choice of the ViT blocks that a tuner acts on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from cil.errors import BackboneError


def chosen_blocks(model: nn.Module, blocks: Sequence[int] | None) -> tuple[int, ...]:
    """Return ``blocks`` after checking them, or the indices of all blocks for None.

    Raises:
        BackboneError: A block does not exist or is listed twice, or the list is empty.
    """
    depth = len(model.blocks)  # type: ignore[arg-type]
    return chosen_of(depth, range(depth) if blocks is None else blocks)


def chosen_of(depth: int, blocks: Sequence[int], key: str = "blocks") -> tuple[int, ...]:
    """Return ``blocks`` after checking that they are some of ``depth`` blocks.

    Raises:
        BackboneError: A block does not exist or is listed twice, or the list is empty; ``key`` names the list.
    """
    for i in blocks:
        if not 0 <= i < depth:
            raise BackboneError(f"{key}: got {i}, this backbone has {depth} blocks; give some of 0 to {depth - 1}")
        if list(blocks).count(i) > 1:
            raise BackboneError(f"{key}: {i} is listed twice; give each of 0 to {depth - 1} at most once")
    if not blocks:
        raise BackboneError(f"{key}: the list is empty; give some of 0 to {depth - 1}, or leave it out for all")
    return tuple(blocks)
