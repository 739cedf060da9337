"""Memories of exemplars that herding chooses, in place of Avalanche's random ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.training.storage_policy import BalancedExemplarsBuffer, ReservoirSamplingBuffer
from torch import Tensor
from torch.utils.data import DataLoader

from cil.learners.bases.exemplars import herding

Extract = Callable[[AvalancheDataset], Tensor]


class Herded(ReservoirSamplingBuffer):
    """Exemplars of one class in the order of herding, of which :meth:`resize` keeps the first ones.

    An image's place in this order has the part of Avalanche's random weight. If the class returns, its new images are
    herded among themselves, and both orders are merged place by place.

    Args:
        max_size: Largest number of exemplars.
        extract: Computes what herding compares, [N, d], of a data set.
        old: Exemplars of earlier tasks in their order; None: none.
    """

    def __init__(self, max_size: int, extract: Extract, old: ReservoirSamplingBuffer | None = None) -> None:
        super().__init__(max_size)
        self.extract = extract
        if old is not None:
            self.buffer, self._buffer_weights = old.buffer, old._buffer_weights

    def update_from_dataset(self, new_data: AvalancheDataset) -> None:
        order = herding(self.extract(new_data), self.max_size)
        weights = torch.cat([-torch.arange(len(order), dtype=torch.float32), self._buffer_weights])
        rows = weights.argsort(descending=True, stable=True)[: self.max_size]
        self.buffer = new_data.subset(order.tolist()).concat(self.buffer).subset(rows.tolist())
        self._buffer_weights = weights[rows]


def choose_by_herding(policy: BalancedExemplarsBuffer[Any], classes: Iterable[int], extract: Extract) -> None:
    """Let herding choose the exemplars of ``classes`` when ``policy``, which groups by class, is updated next.

    Args:
        policy: The strategy's memory, with what it keeps of earlier tasks.
        classes: Classes of the images of the update.
        extract: As for :class:`Herded`.
    """
    for c in classes:
        policy.buffer_groups[c] = Herded(policy.max_size, extract, policy.buffer_groups.get(c))


def directions(strategy: Any) -> Extract:
    """(data set) → features of length 1 of its images under the test transform, by the strategy's model as it is then.

    The model is a :class:`cil.avalanche.model.Model`.
    """

    @torch.no_grad()
    def extract(dataset: AvalancheDataset) -> Tensor:
        features, training = strategy.model.features, strategy.model.training
        features.eval()
        batches = DataLoader(dataset.eval(), batch_size=strategy.eval_mb_size)
        found = torch.cat([features(images.to(strategy.device)) for images, *_ in batches])
        features.train(training)
        return F.normalize(found, dim=1).cpu()

    return extract
