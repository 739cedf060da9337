"""The training loop: one single-threaded process per core, a budget of time or images, averaged weights.

Learning rate and resolution follow progress = max(time used / budget, images seen / budget), so that the schedule
always completes. A batch is cut into micro-batches that stay in the cache; the processes average their gradients.
"""

from __future__ import annotations

import copy
import math
import os
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import set_fused_attn

from scripts.pretraining.images import augment, cutmix, normalise
from scripts.pretraining.network import Net, initialise
from scripts.pretraining.optimisers import make_optimisers


def worker(rank: int, args: Namespace) -> None:
    """One process of the training; ``args`` are those of ``pretrain_backbone.py train``."""
    torch.set_num_threads(args.threads)
    set_fused_attn(False)  # on CPU, for short sequences in bf16, plain matmul attention trains ~45% faster
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(args.port))
    dist.init_process_group("gloo", rank=rank, world_size=args.workers)
    torch.manual_seed(args.seed)
    Training(rank, args).run()
    dist.barrier()
    dist.destroy_process_group()


class Training:
    """Net, its average and the optimisers of one process, and their progress."""

    def __init__(self, rank: int, args: Namespace) -> None:
        self.rank, self.args = rank, args
        self.generator = torch.Generator().manual_seed(args.seed * 1000 + rank)
        data = torch.load(args.data, mmap=True)
        self.images, self.labels = data["pre_train"]
        self.validation = tuple(part[::5] for part in data["pre_val"])
        self.net = Net(args, int(self.labels.max()) + 1)
        pick = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))[:4000]
        initialise(self.net.backbone, self.images[pick])
        if args.init:
            self.net.backbone.load_state_dict(load_file(args.init))
        self.optimisers = make_optimisers(self.net, args)
        self.average = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.plan = [(float(until), int(size)) for until, size in (part.split(":") for part in args.plan.split(","))]
        self.file = Path(args.out) / "last.pt"
        self.step = self.seen = 0
        self.used_before, self.started = 0.0, time.time()
        if args.resume and self.file.exists():
            self._resume()
        self.order_generator = torch.Generator().manual_seed(args.seed + self.step)
        self._shuffle()
        self.log = Log(self.seen)

    def run(self) -> None:
        """Train until the budget is used; worker 0 writes ``last.pt`` and prints the progress."""
        saved = time.time()
        while (progress := self._progress()) < 1:
            factor = lr_factor(progress, self.args.warmup)
            for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
                group["lr"] = group["base_lr"] * factor
            size = resolution(progress, self.plan)
            self._gradients(progress, size)
            norm = self._reduce()
            self._update()
            if self.rank == 0 and self.step % self.args.log_every == 0:
                epoch = self.seen / len(self.images)
                print(
                    f"{time.strftime('%H:%M:%S', time.gmtime())} step {self.step} epoch {epoch:.2f} p {progress:.4f} "
                    f"res {size} {self.log.line(self.seen)} gnorm {norm:.2f}",
                    flush=True,
                )
            if self.rank == 0 and time.time() - saved > self.args.save_minutes * 60:
                saved = time.time()
                self._save()
                raw, averaged = (accuracy(net, *self.validation) for net in (self.net, self.average))
                print(f"   val[{len(self.validation[1])}] raw {raw:.2f} ema {averaged:.2f}", flush=True)
        if self.rank == 0:
            self._save()
            print(f"done: {self.step} steps, {self.seen} images, {self._seconds() / 60:.1f} min", flush=True)

    def _seconds(self) -> float:
        return self.used_before + time.time() - self.started

    def _progress(self) -> float:
        """Progress in [0, 1), or 1 and more when done. Every process uses worker 0's clock."""
        by_images = self.seen / self.args.images if self.args.images else 0.0
        shared = torch.tensor([max(self._seconds() / (self.args.minutes * 60), by_images)])
        dist.broadcast(shared, 0)
        return float(shared)

    def _shuffle(self) -> None:
        self.order, self.cursor = torch.randperm(len(self.images), generator=self.order_generator), 0

    def _gradients(self, progress: float, size: int) -> None:
        """Forward and backward of this process' share of the next batch, at ``size`` × ``size`` pixels."""
        args, share = self.args, self.args.batch // self.args.workers
        if self.cursor + args.batch > len(self.order):
            self._shuffle()
        chosen = self.order[self.cursor + self.rank * share : self.cursor + (self.rank + 1) * share]
        self.cursor += args.batch
        x, y = augment(self.images[chosen], size, args, self.generator), self.labels[chosen]
        mixed, weight = None, 1.0
        if progress < args.cutmix_until and torch.rand((), generator=self.generator).item() < args.cutmix:
            x, mixed, weight = cutmix(x, y, self.generator)
        self.net.train()
        for start in range(0, share, args.micro):
            part = slice(start, start + args.micro)
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
                outputs = [out.float() for out in self.net(x[part])]
            losses = [self._loss(out, y[part], None if mixed is None else mixed[part], weight) for out in outputs]
            loss = losses[0] + args.aux * losses[1]
            (loss * len(outputs[0]) / share).backward()
            self.log.add(loss.item(), None if mixed is not None else (outputs[0].argmax(1) == y[part]))

    def _loss(self, out: torch.Tensor, y: torch.Tensor, mixed: torch.Tensor | None, weight: float) -> torch.Tensor:
        smoothing = self.args.smoothing
        own = F.cross_entropy(out, y, label_smoothing=smoothing)
        if mixed is None:
            return own
        return weight * own + (1 - weight) * F.cross_entropy(out, mixed, label_smoothing=smoothing)

    def _reduce(self) -> float:
        """Gradients averaged over the processes, in one message, and clipped; their norm before."""
        parameters = list(self.net.parameters())
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
        dist.all_reduce(flat)
        flat /= self.args.workers
        norm = float(flat.norm())
        flat *= min(1.0, self.args.clip / (norm + 1e-6))
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(gradient.view_as(parameter))
        return norm

    def _update(self) -> None:
        for optimiser in self.optimisers:
            optimiser.step()
        self.net.zero_grad(set_to_none=False)
        decay = min(self.args.ema, (1 + self.step) / (10 + self.step))
        for averaged, parameter in zip(self.average.parameters(), self.net.parameters(), strict=True):
            averaged.lerp_(parameter.detach(), 1 - decay)
        self.step, self.seen = self.step + 1, self.seen + self.args.batch
        if self.step % 200 == 0:  # removes differences due to rounding
            for parameter in self.net.parameters():
                dist.broadcast(parameter.data, 0)

    def _save(self) -> None:
        state = {
            "net": self.net.state_dict(),
            "ema": self.average.state_dict(),
            "opts": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
            "seen": self.seen,
            "seconds": self._seconds(),
            "args": vars(self.args),
        }
        temporary = self.file.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.file)

    def _resume(self) -> None:
        state = torch.load(self.file)
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["ema"])
        for optimiser, own in zip(self.optimisers, state["opts"], strict=True):
            optimiser.load_state_dict(own)
        self.step, self.seen, self.used_before = state["step"], state["seen"], state["seconds"]
        self.generator.manual_seed(self.args.seed * 1000 + self.rank + 7919 * self.step)


class Log:
    """Running loss, and accuracy and speed since the last line."""

    def __init__(self, seen: int) -> None:
        self.loss = 0.0
        self._restart(seen)

    def _restart(self, seen: int) -> None:
        self.hits, self.count, self.seen, self.since = 0.0, 0, seen, time.time()

    def add(self, loss: float, hits: torch.Tensor | None) -> None:
        """One micro-batch; ``hits`` [B] are None where the labels are mixed."""
        self.loss = 0.99 * self.loss + 0.01 * loss if self.loss else loss
        if hits is not None:
            self.hits, self.count = self.hits + hits.sum().item(), self.count + len(hits)

    def line(self, seen: int) -> str:
        speed = (seen - self.seen) / (time.time() - self.since)
        text = f"loss {self.loss:.3f} acc {100 * self.hits / max(1, self.count):.1f} {speed:.0f} img/s"
        self._restart(seen)
        return text


def lr_factor(progress: float, warmup: float) -> float:
    """Linear warm-up, then half-cosine blended with linear, to zero at progress 1."""
    if progress < warmup:
        return progress / warmup
    rest = (progress - warmup) / (1 - warmup)
    return max(0.0, 0.5 * (1 - rest) + 0.25 * (1 + math.cos(math.pi * rest)))


def resolution(progress: float, plan: list[tuple[float, int]]) -> int:
    """Side length in pixels: that of the first step of the plan that ends after ``progress``."""
    return next((size for until, size in plan if progress < until), plan[-1][1])


@torch.no_grad()
def accuracy(net: Net, x: torch.Tensor, y: torch.Tensor, batch: int = 250) -> float:
    """Accuracy of the class token's head in %; x: uint8 [N, 3, H, W]."""
    net.eval()
    hits = 0
    for i in range(0, len(x), batch):
        with torch.autocast("cpu", torch.bfloat16):
            hits += (net(normalise(x[i : i + batch]))[0].argmax(1) == y[i : i + batch]).sum().item()
    return 100 * hits / len(x)
