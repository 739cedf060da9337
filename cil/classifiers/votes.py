"""How far the other samples of a task support a sample's label: the basis of filters against wrong labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.classifiers.leave_one_out import left_out_predictions, thin_svd

CHUNK = 1024
CERTAIN = 0.8
"""Share of the votes from which a label is corrected."""


def ridge_votes(x: Tensor, y: Tensor) -> Tensor:
    """Leave-one-out predictions of one-hot ridge regression, float64 [N, C]; the closed form of "small loss".

    Args:
        x: Features, float64 [N, F].
        y: Labels 0…C−1, int64 [N].

    Raises:
        DataError: Ridge regression interpolates at every strength, as with fewer images than classes.
    """
    return left_out_predictions(*thin_svd(x), y)[0]


def knn_votes(x: Tensor, y: Tensor, neighbours: int) -> Tensor:
    """Shares of the labels among the nearest other samples by cosine, weighted by max(0, cos); float64 [N, C].

    Args:
        x: Features, float64 [N, F].
        y: Labels 0…C−1, int64 [N].
        neighbours: Number of neighbours k; N − 1 if there are fewer.
    """
    unit, targets = F.normalize(x, dim=1), F.one_hot(y).to(x)
    shares = []
    for rows in torch.arange(len(x), device=x.device).split(CHUNK):
        cosines = unit[rows] @ unit.T
        cosines[torch.arange(len(rows)), rows] = -torch.inf
        best = cosines.topk(min(neighbours, len(x) - 1), dim=1)
        votes = (best.values.clamp(min=0)[:, :, None] * targets[best.indices]).sum(1)
        shares.append(votes / votes.sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny))
    return torch.cat(shares)


def kept(votes: Tensor, y: Tensor, keep: float | None) -> Tensor:
    """Which samples stay, bool [N]; of every class at least the one with the most votes for its label.

    Args:
        votes: Votes for each label, [N, C].
        y: Labels 0…C−1, int64 [N].
        keep: Fraction of each class that stays, rounded; the first ones of equal votes. None: those whose own label has
            the most votes.
    """
    own = votes.gather(1, y[:, None])[:, 0]
    stay = votes.argmax(1) == y if keep is None else torch.zeros_like(y, dtype=torch.bool)
    for c in y.unique():
        members = (y == c).nonzero().flatten()
        ranked = members[own[members].argsort(descending=True, stable=True)]
        count = 1 if keep is None else max(1, round(keep * len(members)))
        if keep is not None or not bool(stay[members].any()):
            stay[ranked[:count]] = True
    return stay


def corrected(votes: Tensor, y: Tensor, stay: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of which those that do not stay have the one with at least 0.8 of the votes; and which stay then.

    Args:
        votes: Votes for each label, [N, C].
        y: Labels 0…C−1, int64 [N].
        stay: Which samples stay with their own label, bool [N].
    """
    most, label = votes.max(1)
    certain = ~stay & (most >= CERTAIN)
    return torch.where(certain, label, y), stay | certain
