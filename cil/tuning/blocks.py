"""Which blocks of a ViT a tuner acts on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from cil.errors import BackboneError


def chosen_blocks(model: nn.Module, blocks: Sequence[int] | None) -> tuple[int, ...]:
    """The blocks themselves, or all of the model's for None.

    Raises:
        BackboneError: A block that does not exist, one named twice, or none.
    """
    depth = len(model.blocks)  # type: ignore[arg-type]
    if blocks is None:
        return tuple(range(depth))
    for i in blocks:
        if not 0 <= i < depth:
            raise BackboneError(f"blocks: got {i}, this backbone has {depth} blocks; give some of 0 to {depth - 1}")
        if list(blocks).count(i) > 1:
            raise BackboneError(f"blocks: {i} is named twice; give each of 0 to {depth - 1} at most once")
    if not blocks:
        raise BackboneError(f"blocks: names none; give some of 0 to {depth - 1}, or leave it out for all")
    return tuple(blocks)
