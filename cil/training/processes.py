"""Cooperation of processes in an optimiser step, so that it equals a single-process step on the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn


def sum_gradients(parameters: Sequence[nn.Parameter], value: Tensor, accelerator: Accelerator) -> Tensor:
    """Sum gradients and loss over the processes, in one message.

    A parameter that has no gradient in any process keeps none.

    The shares are of one batch, so the sum is the gradient of the whole batch; averaging padded shares of equal size
    would count the padding.
    """
    if accelerator.num_processes == 1:
        return value
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=value.device)
    grads = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters]
    total = accelerator.reduce(torch.cat([value.reshape(1), there, *grads]), "sum")
    sizes = [1, len(there), *[p.numel() for p in parameters]]
    mean, there, *summed = total.split(sizes)
    for p, present, grad in zip(parameters, there, summed, strict=True):
        p.grad = grad.view_as(p).to(p.dtype) if present else None
    return mean.squeeze()


def across_processes(term: Callable[..., Tensor], accelerator: Accelerator, *rows: Tensor) -> Tensor:
    """Evaluate a loss term that compares a step's images with one another, over the images of all processes.

    Every process gets the same value, with the gradient with respect to its own rows; together these are the gradient
    of the term. For a loss of ``fit(…, batch_loss=True)``, which weights the result by the process's share of the step.

    Args:
        term: (all rows of the step, of each tensor) → a scalar.
        accelerator: The run's accelerator.
        rows: Rows of this process's images, in their order: float32 features [b, F], labels [b], …; b may be 0.
    """
    if accelerator.num_processes == 1:
        return term(*rows)
    own = len(rows[0])
    count = int(accelerator.reduce(torch.tensor(own, device=rows[0].device), "sum"))
    value = term(*[_everyone(part, count, accelerator) for part in rows])
    if not own:
        return value
    weight = count / own  # undoes the share: no other process has this gradient
    return value.detach() + weight * (value - value.detach())


def _everyone(own: Tensor, count: int, accelerator: Accelerator) -> Tensor:
    """All ``count`` rows in the order of the batch, of which each process took every n-th; ``own`` keeps gradients."""
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    rows = own.new_zeros(count, *own.shape[1:])
    rows[mine] = own.detach()
    rows = accelerator.reduce(rows, "sum")
    rows[mine] = own
    return rows
