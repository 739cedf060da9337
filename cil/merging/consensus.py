"""Consensus merging: the sum of the updates where at least a number of tasks agree with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cil.errors import ConfigError
from cil.merging.bank import ExpertBank, StoredDtype
from cil.merging.finalisers import Finaliser
from cil.merging.layout import Entry
from cil.merging.numerics import require_finite


class Consensus(ExpertBank):
    """Consensus task arithmetic (Wang et al., ICML 2024, arXiv 2405.07813), exact from a bank.

    With τ = Σ τ_t, an entry belongs to task t if |τ_t| > λ |τ − τ_t|, τ − τ_t being the other tasks' sum. The merged
    update is s · τ where the entry belongs to at least k tasks, and 0 elsewhere. As long as there are fewer than k
    tasks, k is their number. Masks of earlier tasks change with every task, therefore a bank is needed. Masks of single
    entries say little about low-rank updates: the rule is meant for full fine-tuning.

    Args:
        scale: Factor s, finite; tuned on validation data in the paper.
        threshold: λ ≥ 0; 0.2 to 0.6 in the paper, tuned per task.
        masks: Number k of tasks, ≥ 1.
        max_rank, dtype: See :class:`ExpertBank`.

    Raises:
        ConfigError: An argument is out of range.
    """

    summary = "sum of the updates, only where several tasks agree with it"
    paper = "arXiv 2405.07813"

    def __init__(
        self,
        scale: float = 0.3,
        threshold: float = 0.4,
        masks: int = 2,
        max_rank: int | None = None,
        dtype: StoredDtype | None = None,
        *,
        finalisers: Sequence[Finaliser] = (),
    ) -> None:
        super().__init__(max_rank, dtype, finalisers=finalisers)
        require_finite("Consensus", scale)
        check_threshold("Consensus", threshold)
        if masks < 1:
            raise ConfigError(f"Consensus: masks is {masks}; it must be positive")
        self.scale, self.threshold, self.masks = scale, threshold, masks

    def merge(self, entry: Entry, updates: Sequence[Tensor]) -> Tensor:
        total = sum(updates[1:], updates[0])
        agreeing = torch.stack([belongs(update, total, self.threshold) for update in updates]).sum(0)
        return self.scale * total * (agreeing >= min(self.masks, len(updates)))


def belongs(update: Tensor, total: Tensor, threshold: float) -> Tensor:
    """The mask |τ_t| > λ |τ − τ_t| of a task's update τ_t and the sum τ, both of one shape; bool."""
    return update.abs() > threshold * (total - update).abs()


def check_threshold(name: str, threshold: float) -> None:
    """Refuse a λ that is negative or not finite.

    Raises:
        ConfigError: It is.
    """
    if not 0 <= threshold < math.inf:
        raise ConfigError(f"{name}: threshold is {threshold}; it must be at least 0 and finite")
