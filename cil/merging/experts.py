"""Rules that compute one model per task from the updates of all tasks in a bank: TSV-C, TALL, EMR and Twin."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cil.errors import BackboneError, ConfigError
from cil.merging.bank import ExpertBank
from cil.merging.base import Rule
from cil.merging.consensus import belongs, check_threshold
from cil.merging.layout import Entry
from cil.merging.numerics import rank, row_blocks, thin_svd
from cil.utils.precision import exact


class ExpertRule(ABC):
    """Computes the update of one task's model from the updates of all tasks::

        model = EMR().read(bank, task=3)  # name → update, of the model for task 3

    The updates are functions of all tasks in the bank, so they change with every new task. A rule does not say which of
    the models an image needs.
    """

    summary: ClassVar[str] = ""
    """What the rule does, in a phrase for lists."""
    paper: ClassVar[str] = ""
    """Where the rule comes from."""

    @abstractmethod
    def expert(self, entry: Entry, updates: Sequence[Tensor], task: int, context: Any) -> Tensor:
        """Return a tensor's update in the model of ``task``, given the updates of all tasks and :meth:`context`."""

    def context(self, bank: ExpertBank, task: int) -> Any:
        """Return what :meth:`expert` must know of the whole model."""
        return None

    @exact()
    def read(self, bank: ExpertBank, task: int) -> dict[str, Tensor]:
        """Return the update of the model of a task, counted from 0, by name, in the bank's computing dtype.

        Raises:
            ConfigError: There is no such task.
            BackboneError: The rule cannot be computed for as many tasks.
        """
        bank.require(task)
        context = self.context(bank, task)
        return {e.name: self.expert(e, bank.vectors(e), task, context) for e in bank.layout.entries}


class Own(ExpertRule):
    """The task's own update, as it was added."""

    summary = "the task's own update"

    def expert(self, entry: Entry, updates: Sequence[Tensor], task: int, context: Any) -> Tensor:
        return updates[task]


class TSVC(ExpertRule):
    """Compressed task singular vectors (TSV-C, Gargiulo et al., CVPR 2025, arXiv 2412.00081).

    A linear weight's update keeps its first ⌊q/T⌋ directions, q = min(m, n), so that all T together have the size of
    one. All other tensors are the task's own.

    Args:
        split_qkv: Whether the three row blocks of a fused query, key and value weight are separate matrices.
    """

    summary = "the task's own update, cut to its share of the directions"
    paper = "arXiv 2412.00081"

    def __init__(self, split_qkv: bool = True) -> None:
        self.split_qkv = split_qkv

    def expert(self, entry: Entry, updates: Sequence[Tensor], task: int, context: Any) -> Tensor:
        if not entry.linear:
            return updates[task]
        blocks = row_blocks(entry, updates[task], self.split_qkv)
        q = min(blocks[0].shape)
        if len(updates) > q:
            raise BackboneError(
                f"TSVC: {entry.name} has {q} singular directions, so {q} tasks can share them; there are {len(updates)}"
            )
        return torch.cat([leading(block, q // len(updates)) for block in blocks])


class TALL(ExpertRule):
    """TALL masks (Wang et al., ICML 2024, arXiv 2405.07813): the sum of all updates where it belongs to the task.

    The update is τ = Σ τ_t where |τ_t| > λ |τ − τ_t|, and 0 elsewhere. It is meant for full fine-tuning.

    Args:
        threshold: λ ≥ 0; 0.2 to 0.6 in the paper, tuned per task.

    Raises:
        ConfigError: ``threshold`` is negative or not finite.
    """

    summary = "the sum of the updates where it belongs to the task"
    paper = "arXiv 2405.07813"

    def __init__(self, threshold: float = 0.4) -> None:
        check_threshold("TALL", threshold)
        self.threshold = threshold

    def expert(self, entry: Entry, updates: Sequence[Tensor], task: int, context: Any) -> Tensor:
        total = sum(updates[1:], updates[0])
        return total * belongs(updates[task], total, self.threshold)


class EMR(ExpertRule):
    """EMR merging (Huang et al., NeurIPS 2024, arXiv 2405.17461): elect, mask and rescale.

    With signs γ = sign(Σ τ_t), −1 where the sum is 0, the unified update is u = γ max{|τ_t| : sign(τ_t) = γ}. That of
    task t is r_t u where τ_t u > 0, and 0 elsewhere. It is meant for full fine-tuning.

    Args:
        pooling: Means of |·| whose ratio is the rescaler r_t = |τ_t| / |masked u|: ``tensors``, the sum of the means
            over each tensor, as in the authors' code, or ``entries``, over all entries, as in the paper.

    Raises:
        ConfigError: ``pooling`` is unknown.
    """

    summary = "the largest changes of the elected signs, masked and rescaled for the task"
    paper = "arXiv 2405.17461"

    def __init__(self, pooling: Literal["tensors", "entries"] = "tensors") -> None:
        if pooling not in ("tensors", "entries"):
            raise ConfigError(f"EMR: pooling is {pooling!r}; it must be 'tensors' or 'entries'")
        self.pooling = pooling

    def context(self, bank: ExpertBank, task: int) -> float:
        """The rescaler r_t."""
        own, masked = [], []
        for entry in bank.layout.entries:
            updates = bank.vectors(entry)
            size = updates[task].numel() if self.pooling == "tensors" else 1
            own.append(float(updates[task].double().abs().sum()) / size)
            masked.append(float(self.masked(updates, task).double().abs().sum()) / size)
        return math.fsum(own) / math.fsum(masked) if any(masked) else 0.0

    def expert(self, entry: Entry, updates: Sequence[Tensor], task: int, context: Any) -> Tensor:
        return context * self.masked(updates, task)

    def masked(self, updates: Sequence[Tensor], task: int) -> Tensor:
        """The unified update where it has the sign of the task's."""
        positive = sum(updates[1:], updates[0]) > 0
        high, low = updates[0].clamp(min=0), updates[0].clamp(max=0)
        for update in updates[1:]:
            high, low = torch.maximum(high, update), torch.minimum(low, update)
        unified = torch.where(positive, high, low)
        return unified * (updates[task] * unified > 0)


class Twin(ExpertRule):
    """Twin merging (Lu et al., NeurIPS 2024, arXiv 2406.15479): a merged model and what a task adds to it.

    With the update Δ of a merged model, the update of task t is Δ + compress(τ_t − Δ): a linear weight's difference
    keeps its first directions, and all other tensors are the task's own. The paper's router, trained on all tasks, is
    not part of it.

    Args:
        base: Rule that merges the tasks, not started; it must need no statistics.
        share: Share of the q = min(m, n) directions that are kept, in [0, 1]; at least one is kept unless it is 0.

    Raises:
        ConfigError: ``share`` is not in [0, 1].
    """

    summary = "a merged update, and the leading directions of the task's difference to it"
    paper = "arXiv 2406.15479"

    def __init__(self, base: Rule, share: float = 0.1) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"Twin: share is {share}; it must be in [0, 1]")
        self.base, self.share = base, share

    def context(self, bank: ExpertBank, task: int) -> Mapping[str, Tensor]:
        """The update of the merged model, by name."""
        return {entry.name: delta for entry, delta in bank.given_to(self.base).deltas()}

    def expert(self, entry: Entry, updates: Sequence[Tensor], task: int, context: Any) -> Tensor:
        if not entry.linear:
            return updates[task]
        merged = context[entry.name]
        return merged + leading(updates[task] - merged, math.ceil(self.share * min(entry.shape)))


def leading(matrix: Tensor, k: int) -> Tensor:
    """The first k singular directions of a matrix [m, n], within its numerical rank."""
    if not bool(matrix.any()):
        return matrix
    u, sigma, v = thin_svd(matrix)
    k = min(k, rank(sigma, matrix.shape))
    return u[:, :k] * sigma[:k] @ v[:, :k].T
