"""A bank of the tasks' updates in a learner: its keys, and its updates as experts of linear layers."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveInt
from torch.nn.functional import pad

from cil.learners.bases.task_training import TaskRecipe
from cil.merging import ExpertBank
from cil.merging.bank import StoredDtype
from cil.tuning.token_experts import Experts
from cil.utils.precision import exact


class BankedRecipe(TaskRecipe):
    """How every task's tuner is trained, and how its update is kept."""

    max_rank: PositiveInt | None = Field(None, description="largest rank that is kept of an update; null: all of it")
    dtype: StoredDtype | None = Field(None, description="dtype in which updates are kept; null: float32")


@exact()
def experts_of(bank: ExpertBank) -> dict[str, Experts]:
    """The linear layers that tasks changed, by name, with the factors of all T tasks."""
    entries = {entry.name: entry for entry in bank.layout.entries}
    found = {}
    for entry in (entry for entry in bank.layout.entries if entry.linear):
        pairs = [bank.factors(entry, task) for task in range(int(bank.count))]
        rank = max((len(right) for _, right in pairs), default=0)
        if not rank or not entry.name.endswith(".weight"):
            continue
        layer = entry.name.removesuffix(".weight")
        bias = entries.get(f"{layer}.bias")
        found[layer] = Experts(
            torch.stack([pad(left, (0, rank - left.shape[1])) for left, _ in pairs]),
            torch.stack([pad(right, (0, 0, 0, rank - len(right))) for _, right in pairs]),
            None if bias is None else torch.stack(bank.vectors(bias)),
        )
    return found
