"""Features in memory with vectors of old classes in every step, drawn from Gaussians or around means (RAPF, ENGINE)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cil.classifiers import Gaussians


class WithOldClasses:
    """A task's features with vectors of old classes in every step: rows (feature, rival, weight, label).

    Args:
        joint: Features of the task's images, [N, d].
        labels: Their labels.
        gaussians: Gaussians of all old classes.
        pairs: (old class, similar new class).
        amount: β: a step has 10 β vectors of each sampled class, and 20 β of each pair.
        per_step: Number m of old classes in a step, besides those of pairs.
        size: Images in a step.

    Attributes:
        sampled: Number of sampled vectors in a step.
    """

    def __init__(
        self,
        joint: Tensor,
        labels: Tensor,
        gaussians: Gaussians,
        pairs: Sequence[tuple[int, int]],
        *,
        amount: float,
        per_step: int,
        size: int,
    ) -> None:
        self.joint, self.labels, self.gaussians, self.pairs = joint.cpu(), labels.cpu(), gaussians, pairs
        self.size, self.own, self.paired = size, int(10 * amount), int(20 * amount)
        self.old = gaussians.counts.nonzero().flatten().cpu()
        self.per_step = min(per_step, len(self.old))
        self.sampled = self.per_step * self.own + len(pairs) * self.paired

    def __len__(self) -> int:
        return len(self.labels) + self.sampled * math.ceil(len(self.labels) / self.size)

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, ...]]:
        """One epoch of steps; old classes come in a random order, m per step, again and again."""
        generator = generator or torch.Generator().manual_seed(0)
        order, turn = shuffled(len(self.labels), generator), shuffled(len(self.old), generator)
        for step, rows in enumerate(order.split(self.size)):
            places = (torch.arange(self.per_step) + step * self.per_step) % max(1, len(turn))
            own = self.old[turn[places]].repeat_interleave(self.own)
            paired = torch.tensor(self.pairs, dtype=torch.int64).view(-1, 2).repeat_interleave(self.paired, 0)
            labels = torch.cat([self.labels[rows], own, paired[:, 0]])
            drawn = self.gaussians.sample(labels[len(rows) :], generator).cpu() if len(labels) > len(rows) else None
            joint = self.joint[rows] if drawn is None else torch.cat([self.joint[rows], drawn])
            classified, compared = len(rows) + len(own), len(paired)
            rivals = torch.cat([torch.full((classified,), -1), paired[:, 1]])
            # the loss is a mean over both kinds of rows, so each kind weighs as if it were alone
            weights = torch.where(rivals < 0, len(labels) / classified, len(labels) / max(1, compared))
            yield tuple(one[part[0] :: part[1]].to(device) for one in (joint, rivals, weights, labels))


class WithMeans:
    """A task's features with one noisy mean of every old class in every step: rows (feature, sentence, view, label).

    The views are other features of the task's images; a mean has none, and NaN in its place.

    Args:
        joint: Features of the task's images, [N, d].
        labels: Their labels.
        means: Class means of old classes 0…, [C', d].
        noise: Standard deviation of the noise on the means.
        sentences: Vectors of sentences about each class seen, [n_c, d] each, n_c > 0; a row gets a random one.
        views: Other features of the images, [K, N, d]; an image gets a random one. K may be 0.
        size: Images in a step.
    """

    def __init__(
        self,
        joint: Tensor,
        labels: Tensor,
        means: Tensor,
        noise: float,
        sentences: Sequence[Tensor],
        views: Tensor,
        size: int,
    ) -> None:
        self.joint, self.labels, self.means, self.views = joint.cpu(), labels.cpu(), means.cpu(), views.cpu()
        self.noise, self.size = noise, size
        self.sentences = torch.cat(list(sentences)).cpu()
        self.counts = torch.tensor([len(one) for one in sentences])
        self.starts = self.counts.cumsum(0) - self.counts

    def __len__(self) -> int:
        return len(self.labels) + len(self.means) * math.ceil(len(self.labels) / self.size)

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, ...]]:
        """One epoch of steps."""
        generator = generator or torch.Generator().manual_seed(0)
        old = torch.arange(len(self.means))
        for rows in shuffled(len(self.labels), generator).split(self.size):
            noisy = self.means + self.noise * torch.randn(self.means.shape, generator=generator)
            joint, labels = torch.cat([self.joint[rows], noisy]), torch.cat([self.labels[rows], old])
            chosen = self.starts[labels] + (torch.rand(len(labels), generator=generator) * self.counts[labels]).long()
            views = torch.full_like(joint, torch.nan)
            if len(self.views):
                views[: len(rows)] = self.views[torch.randint(len(self.views), rows.shape, generator=generator), rows]
            parts = (joint, self.sentences[chosen], views, labels)
            yield tuple(one[part[0] :: part[1]].to(device) for one in parts)


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """The positions 0…count−1 in a random order, int64 on the CPU."""
    return torch.randperm(count, generator=generator, device=generator.device).cpu()
