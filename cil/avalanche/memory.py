"""What a strategy keeps between tasks, in a learner's state: tensors as buffers, everything else as JSON."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Memory(nn.Module):
    """A tree of plain values that names tensors by key, and the tensors.

    Attributes:
        tree: JSON.
        images: Images of old tasks the tree refers to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tree: Any = {}
        self.images = 0

    def put(self, tree: Any, tensors: dict[str, Tensor], images: int) -> None:
        """Replace everything."""
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
