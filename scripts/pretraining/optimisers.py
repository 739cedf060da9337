"""Muon for the matrices of the blocks, AdamW for everything else."""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist

from scripts.pretraining.network import Net


def make_optimisers(net: Net, args: Namespace) -> list[torch.optim.Optimizer]:
    """Optimisers that together hold every parameter once; each group keeps its unscheduled rate as ``base_lr``."""
    named = dict(net.named_parameters())
    matrices = {name for name, p in named.items() if ".blocks." in name and p.ndim == 2}
    decayed = {name for name, p in named.items() if p.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))}
    groups = [
        {"params": [named[name] for name in named if name in decayed - matrices], "weight_decay": args.wd},
        {"params": [named[name] for name in named if name not in decayed | matrices], "weight_decay": 0.0},
    ]
    found = [
        Muon([named[name] for name in named if name in matrices], lr=args.muon_lr, weight_decay=args.muon_wd),
        torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98)),
    ]
    for group in (group for optimiser in found for group in optimiser.param_groups):
        group["base_lr"] = group["lr"]
    return found


def orthogonalise(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration towards U Vᵀ for a batch of matrices [N, out, in]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz; fused qkv weights are treated as three matrices.

    torch's own treats a fused qkv as one and knows no other process. Here each of several orthogonalises its share of
    the matrices, and the updates are summed over the processes.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            buckets = defaultdict(list)
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                parts = 3 if p.shape[0] == 3 * p.shape[1] else 1
                for target, source in zip(p.chunk(parts), update.chunk(parts), strict=True):
                    buckets[source.shape].append((target, source))
            total = sum(len(pairs) * shape.numel() for shape, pairs in buckets.items())
            flat, offset, views = torch.zeros(total), 0, []
            for shape, pairs in buckets.items():
                size = len(pairs) * shape.numel()
                view = flat[offset : offset + size].view(len(pairs), *shape)
                if pairs[rank::world]:
                    view[rank::world] = orthogonalise(torch.stack([source for _, source in pairs[rank::world]]))
                views.append((shape, pairs, view))
                offset += size
            if world > 1:
                dist.all_reduce(flat)
            for shape, pairs, view in views:
                lr = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (target, _), direction in zip(pairs, view, strict=True):
                    target.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-lr)
