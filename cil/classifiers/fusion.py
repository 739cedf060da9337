"""The weights of several kinds of class scores, fitted to images that none of them has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

FOLDS = 5
"""Parts of a task's images; each is held out once."""


def folds(labels: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """(positions fitted, positions held out) of each of five parts with equal shares of every class.

    There are none if a class has fewer than five images.

    Args:
        labels: int64 [N].
        generator: Source of the split.
    """
    if int(torch.bincount(labels)[labels.unique()].min()) < FOLDS:
        return
    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    split = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for fitted, held_out in split.split(np.zeros(len(labels)), labels.cpu().numpy()):
        yield torch.from_numpy(fitted).to(labels.device), torch.from_numpy(held_out).to(labels.device)


def fusion_weights(scores: Sequence[Tensor], labels: Tensor) -> tuple[float, ...]:
    """The weights w_k ≥ 0 that minimise the mean cross-entropy of softmax(Σ_k w_k · scores_k), which is convex in w.

    Args:
        scores: Class scores of the same images, finite, [N, C] each.
        labels: int64 [N].

    Returns:
        One weight per kind of scores; 0 for scores that are the same for all classes.
    """
    kinds = np.stack([one.detach().cpu().double().numpy() for one in scores])
    kinds -= kinds.mean(2, keepdims=True)  # only differences between classes matter
    units = kinds.std((1, 2))
    says_something = units > 0
    units[~says_something] = 1
    kinds /= units[:, None, None]
    rows, truth = np.arange(len(labels)), labels.cpu().numpy()

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logs = log_softmax(np.tensordot(weights, kinds, 1), axis=1)
        slopes = (np.exp(logs) * kinds).sum(2).mean(1) - kinds[:, rows, truth].mean(1)
        return -float(logs[rows, truth].mean()), slopes

    precise = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000}
    found = minimize(
        loss, np.ones(len(kinds)), jac=True, bounds=[(0, None)] * len(kinds), method="L-BFGS-B", options=precise
    )
    return tuple(np.where(says_something, found.x / units, 0).tolist())


def held_out_weights(
    first: Tensor, second: Callable[[Tensor, Tensor], Tensor], labels: Tensor, generator: torch.Generator
) -> tuple[float, ...] | None:
    """:func:`fusion_weights` of a task's images, each scored by a model that does not know it.

    Args:
        first: Class scores [N, C] that no image of the task has changed.
        second: (positions fitted, positions held out) → scores of the latter, by a model that knows the former.
        labels: int64 [N].
        generator: Source of the split.

    Returns:
        a and b; None if there is one class only, or a class of fewer than five images.
    """
    if first.shape[1] < 2:
        return None
    found = [(first[out], second(fitted, out), labels[out]) for fitted, out in folds(labels, generator)]
    if not found:
        return None
    *scores, truth = (torch.cat(parts) for parts in zip(*found, strict=True))
    return fusion_weights(scores, truth)
