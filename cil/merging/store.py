"""Where a rule's state lies: in buffers of the rule, or anywhere else that can get and put one tensor's slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from cil.merging.layout import Entry

State = dict[str, Tensor]
"""Slot → tensor, for one entry."""
Slots = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Slot → shape and dtype, for one entry."""


class Store(Protocol):
    """Where the slots of all entries lie."""

    def get(self, entry: Entry) -> State: ...

    def put(self, entry: Entry, state: State) -> None: ...

    def commit(self) -> None:
        """A task's last tensor has been put."""


class Buffers:
    """The default store: buffers of the rule, named slot:name with / for the dots, which buffers may not have.

    Args:
        module: Whose buffers.
        slots: What is kept of an entry.
    """

    def __init__(self, module: nn.Module, slots: Callable[[Entry], Slots]) -> None:
        self.module, self.slots = module, slots

    def allocate(self, entries: Iterable[Entry], device: torch.device) -> None:
        """Zeros for these entries, and nothing else."""
        for name in [name for name in self.module._buffers if ":" in name]:
            del self.module._buffers[name]
        for entry in entries:
            for slot, (shape, dtype) in self.slots(entry).items():
                self.module.register_buffer(slot_name(entry, slot), torch.zeros(shape, dtype=dtype, device=device))

    def get(self, entry: Entry) -> State:
        return {slot: self.module.get_buffer(slot_name(entry, slot)) for slot in self.slots(entry)}

    def put(self, entry: Entry, state: State) -> None:
        for slot, value in state.items():
            self.module._buffers[slot_name(entry, slot)] = value

    def commit(self) -> None:
        return None


def slot_name(entry: Entry, slot: str) -> str:
    """How a slot is called in ``state_dict()`` and in a state file."""
    return f"{slot}:{entry.name.replace('.', '/')}"
