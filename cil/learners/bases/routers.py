"""Routers that tell the task of an image: what each learns from its task's own images, and how it scores tasks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cil.utils.precision import exact, without_autocast

RIDGE = 0.1
"""Ridge penalty of a gate, as a multiple of the mean diagonal of its Gram matrix."""


class OwnScale(nn.Module):
    """Scores of tasks, each relative to its mean and deviation over the task's own training images.

    Buffers:
        means, deviations: float32 [T].
    """

    means: Tensor
    deviations: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(0))
        self.register_buffer("deviations", torch.zeros(0))

    def fit(self, scores: Tensor) -> None:
        """Add a task by its own images' scores for it, [N]."""
        deviation = float(scores.std(correction=0)) or 1.0  # of one image, or of equal scores
        self.means = torch.cat([self.means, self.means.new_tensor([float(scores.mean())])])
        self.deviations = torch.cat([self.deviations, self.deviations.new_tensor([deviation])])

    def forward(self, scores: Tensor) -> Tensor:
        """[B, T] → [B, T]."""
        return (scores - self.means) / self.deviations


class Gates(nn.Module):
    """One linear gate per task on frozen features, fitted to the task's own images alone.

    It is the legal form of MINGLE's gates (arXiv 2505.11883) for a choice per image: gate t is the ridge regression
    w_t of the value 1 on the unit features u of task t's images, w_t in the complement of the directions that earlier
    tasks protect. After that the first ``directions`` eigenvectors of task t's Σ u uᵀ in the complement are protected,
    too. So earlier tasks' images have small values in later gates, and no gate changes any more.

    Args:
        width: Feature width F.
        directions: Number of directions that each task protects.

    Buffers:
        weights: float32 [T, F]. protected: float32 [F, P], orthonormal columns.
    """

    weights: Tensor
    protected: Tensor

    def __init__(self, width: int, directions: int) -> None:
        super().__init__()
        self.directions = directions
        self.register_buffer("weights", torch.zeros(0, width))
        self.register_buffer("protected", torch.zeros(width, 0))

    @exact()
    def fit(self, features: Tensor) -> None:
        """Add a task by the frozen features of its images, [N, F]."""
        basis = self.protected.double()
        u = F.normalize(features.double(), dim=1)
        rest = u - u @ basis @ basis.T
        gram = rest.T @ rest
        values, vectors = torch.linalg.eigh(gram)
        known = values > len(gram) * torch.finfo(self.protected.dtype).eps * len(u)  # else no direction is left
        values, vectors = values[known].flip(0), vectors[:, known].flip(1)
        gate = vectors / (values + RIDGE * gram.diagonal().mean()) @ (vectors.T @ rest.sum(0))
        new = vectors[:, : self.directions]
        self.weights = torch.cat([self.weights, gate[None].to(self.weights)])
        self.protected = torch.cat([self.protected, new.to(self.protected)], dim=1)

    @without_autocast()
    def forward(self, features: Tensor) -> Tensor:
        """Values of all gates, [B, F] → [B, T]."""
        return F.normalize(features.float(), dim=1) @ self.weights.T


def of_tasks(log_p: Tensor, task_of: Tensor, tasks: int) -> Tensor:
    """Probabilities of tasks, from log-probabilities of classes up to a constant: [B, C], int64 [C] → [B, T]."""
    p = log_p.double().softmax(1)
    return p.new_zeros(p.shape[0], tasks).index_add(1, task_of, p)  # len() would fix the batch size of a program


def certainty(log_p: Tensor) -> Tensor:
    """−entropy of the softmax over the last dimension, [B, T, C] → [B, T]; −∞ counts as probability 0."""
    log_p = log_p.double().log_softmax(-1)
    return torch.where(log_p.isinf(), 0, log_p.exp() * log_p).sum(-1)
