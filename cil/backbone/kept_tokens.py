"""Tokens of training images below the first block that a tuner changes, computed once for all epochs of a training.

Below that block an image without augmentation gives the same tokens in every epoch. They are found by a digest of the
pixels, so a learner's loss calls the backbone as ever, whatever its data and the order of the images are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


class KeptTokens:
    """Tokens by image, in memory.

    They replace a computation only if they equal it bit for bit: the first batch of every size whose images are all
    known is computed all the same and compared. If a matrix product rounds a row otherwise beside other rows, nothing
    is kept from then on.

    Args:
        most_bytes: Nothing is kept any more once the tokens would take more than this.
    """

    def __init__(self, most_bytes: float) -> None:
        self._room = most_bytes
        self._tokens: dict[tuple[int, bool, bytes], Tensor] = {}
        self._compared: set[tuple[int, int]] = set()

    def before(self, block: int, images: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The tokens [B, N, D] that enter a block, without a graph of gradients.

        Args:
            block: Number of the block.
            images: Normalised images [B, 3, H, W].
            compute: Images → these tokens, row by row.
        """
        if self._room < 0:
            return compute(images)
        autocast = torch.is_autocast_enabled(images.device.type)
        rows = images.detach().contiguous().flatten(1).view(torch.uint8).numpy()
        keys = [(block, autocast, hashlib.blake2b(row, digest_size=16).digest()) for row in rows]
        found = [self._tokens[key] for key in keys if key in self._tokens]
        if len(found) == len(keys) and (block, len(keys)) in self._compared:
            return torch.stack(found)
        tokens = compute(images)
        if len(found) == len(keys):
            self._compared.add((block, len(keys)))
            if not torch.equal(torch.stack(found), tokens):
                self._stop()
        for key, row in zip(keys, tokens, strict=True):
            if self._room >= 0 and key not in self._tokens:
                self._tokens[key] = row
                self._room -= row.numel() * row.element_size()
        if self._room < 0:
            self._stop()
        return tokens

    def _stop(self) -> None:
        self._tokens.clear()
        self._room = -1.0
