"""The state of a strategy between tasks, as part of a learner's state: tensors as buffers, everything else as JSON."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Memory(nn.Module):
    """A tree of plain values that refers to tensors by key, and these tensors as buffers.

    Attributes:
        tree: Tree of values that JSON can represent.
        images: Number of images of old tasks that the tree refers to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tree: Any = {}
        self.images = 0

    def put(self, tree: Any, tensors: dict[str, Tensor], images: int) -> None:
        """Replace the tree, the tensors and the number of images."""
        self.tree, self.images = tree, images
        self._buffers.clear()
        for key, value in tensors.items():
            self.register_buffer(key, value)

    def __getitem__(self, key: str) -> Tensor:
        return self.get_buffer(key)

    def get_extra_state(self) -> Any:
        return {"tree": self.tree, "images": self.images}

    def set_extra_state(self, state: Any) -> None:
        self.tree, self.images = state["tree"], state["images"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._buffers.clear()
        for key, value in state_dict.items():
            if key.startswith(prefix) and isinstance(value, Tensor):
                self.register_buffer(key.removeprefix(prefix), torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *args)
