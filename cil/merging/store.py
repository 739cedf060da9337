"""Stores of a rule's state: the rule's buffers, or any object that can get and put the slots of one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from cil.merging.layout import Entry

State = dict[str, Tensor]
"""Slot → tensor, for one entry."""
StateSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Slot → shape and dtype, for one entry."""


class Store(Protocol):
    """A store for the slots of all entries."""

    def get(self, entry: Entry) -> State:
        """Return the slots of an entry."""

    def put(self, entry: Entry, state: State) -> None:
        """Replace the slots of an entry."""

    def commit(self) -> None:
        """Complete a task, after its last tensor has been put."""


class Buffers:
    """The default store: buffers of the rule, named ``slot:name`` with / for dots, which buffer names must not contain.

    Args:
        module: Module that owns the buffers.
        slots: Function that returns the slots of an entry, with shapes and dtypes.
    """

    def __init__(self, module: nn.Module, slots: Callable[[Entry], StateSpec]) -> None:
        self.module, self.state_spec = module, slots

    def allocate(self, entries: Iterable[Entry], device: torch.device) -> None:
        """Create slots of zeros for these entries, and remove all others."""
        for name in [name for name in self.module._buffers if ":" in name]:
            del self.module._buffers[name]
        for entry in entries:
            for slot, (shape, dtype) in self.state_spec(entry).items():
                self.module.register_buffer(slot_name(entry, slot), torch.zeros(shape, dtype=dtype, device=device))

    def get(self, entry: Entry) -> State:
        names = {slot: slot_name(entry, slot) for slot in self.state_spec(entry)}
        # a rule that grows knows the slots of the task that is being added, which are not there yet
        return {slot: self.module.get_buffer(name) for slot, name in names.items() if name in self.module._buffers}

    def put(self, entry: Entry, state: State) -> None:
        for slot, value in state.items():
            self.module._buffers[slot_name(entry, slot)] = value

    def commit(self) -> None:
        return None


def slot_name(entry: Entry, slot: str) -> str:
    """Return the name of a slot in ``state_dict()`` and in a state file."""
    return f"{slot}:{entry.name.replace('.', '/')}"
