"""CaRE's bank: one small adapter, router and class guess per task in every block, chosen for each image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.views import require_views
from cil.backbone.vit import Tuner, mlp_half


class GatedAdapter(nn.Module):
    """g ⊙ Up(Dropout(ReLU(Down(LN(x))))) in every block; zero at the start, because g is.

    Args:
        depth: Number of blocks L.
        width: D.
        bottleneck: Width r of the bottleneck.
        dropout: Dropout probability in training mode, in [0, 1).

    Parameters:
        scale, shift: LN, [L, D]; down: [L, r, D]; down_bias: [L, r]; up: [L, D, r]; up_bias, gate: [L, D].
    """

    def __init__(self, depth: int, width: int, bottleneck: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.scale, self.shift = nn.Parameter(torch.ones(depth, width)), nn.Parameter(torch.zeros(depth, width))
        self.down, self.down_bias = weights(depth, bottleneck, width)
        self.up, self.up_bias = weights(depth, width, bottleneck)
        self.gate = nn.Parameter(torch.zeros(depth, width))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw Down and Up from Kaiming's uniform distribution with a = √5."""
        for weight in (self.down, self.up):
            bound = 1 / math.sqrt(weight.shape[2])
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, i: int, x: Tensor) -> Tensor:
        z = F.layer_norm(x, x.shape[-1:], self.scale[i], self.shift[i])
        z = F.dropout(F.linear(z, self.down[i], self.down_bias[i]).relu(), self.dropout, self.training)
        return self.gate[i] * F.linear(z, self.up[i], self.up_bias[i])


class TaskPart(nn.Module):
    """What a task adds: an expert, a router over the experts so far, and a guess of the task's classes, per block.

    The router and the guess read u, the class token of the expert's output.
    """

    def __init__(self, depth: int, width: int, bottleneck: int, dropout: float, experts: int, classes: int) -> None:
        super().__init__()
        self.expert = GatedAdapter(depth, width, bottleneck, dropout)
        self.route, self.route_bias = weights(depth, experts, width)
        self.scale, self.shift = nn.Parameter(torch.ones(depth, width)), nn.Parameter(torch.zeros(depth, width))
        self.guess, self.guess_bias = weights(depth, classes, width)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw the expert; the router and the guess from N(0, 0.02²) truncated at 0.04."""
        self.expert.reset(generator)
        for weight in (self.route, self.guess):
            fresh = torch.empty(weight.shape)
            nn.init.trunc_normal_(fresh, std=0.02, a=-0.04, b=0.04, generator=generator)
            weight.copy_(fresh)

    def routed(self, i: int, u: Tensor, top: int) -> Tensor:
        """Softmax over the ``top`` largest of the router's scores, 0 for the others; [B, D] → [B, experts]."""
        scores = F.linear(u, self.route[i], self.route_bias[i]).float()
        least = scores.topk(min(top, scores.shape[1]), dim=1).values[:, -1:]
        return scores.masked_fill(scores < least, -math.inf).softmax(1)

    def guessed(self, i: int, u: Tensor) -> Tensor:
        """Scores of the task's classes, [B, D] → float32 [B, C_t]."""
        z = F.layer_norm(u, u.shape[-1:], self.scale[i], self.shift[i])
        return F.linear(z, self.guess[i], self.guess_bias[i]).float()


class RoutedBank(nn.Module):
    """A shared adapter, and the parts of all tasks; :meth:`under` gives the tuner.

    Args:
        backbone: The frozen backbone; only its sizes are read.
        shared: Bottleneck of the shared adapter.
        bottleneck: Bottleneck of each expert.
        dropout: Dropout probability of all adapters.
        routers: M, the number of tasks whose routers act on an image.
        top: K, the number of experts that a router mixes.

    Raises:
        BackboneError: The backbone's blocks have no views.
    """

    def __init__(
        self,
        backbone: Backbone,
        shared: int = 64,
        bottleneck: int = 16,
        dropout: float = 0.1,
        routers: int = 2,
        top: int = 3,
    ) -> None:
        super().__init__()
        require_views(backbone.model)
        depth, width = len(backbone.model.blocks), int(backbone.model.embed_dim)  # type: ignore[arg-type]
        self.sizes, self.routers, self.top = (depth, width, bottleneck, dropout), routers, top
        self.shared = GatedAdapter(depth, width, shared, dropout)
        self.parts = nn.ModuleList()
        self.to(backbone.device)

    @torch.no_grad()
    def grow(self, classes: int, generator: torch.Generator) -> None:
        """Add a task's part. From the third task on its expert starts as the mean of the others."""
        part = TaskPart(*self.sizes, len(self.parts) + 1, classes)
        part.reset(generator)
        if len(self.parts) > 1:
            old = [one.expert.parameters() for one in self.parts]  # type: ignore[union-attr]
            for mean, *values in zip(part.expert.parameters(), *old, strict=True):
                mean.copy_(torch.stack(values).mean(0))
        self.parts.append(part.to(self.shared.gate.device))

    def under(self, task: int | None) -> Routed:
        """The tuner with task ``task``'s routing in its training, or with that for any image."""
        return Routed(self, task)

    def change(self, i: int, x: Tensor, task: int | None) -> tuple[Tensor, list[Tensor]]:
        """What block i adds, [B, N, D] → [B, N, D], and every task's class guess, [B, C_t] each.

        Args:
            i: Index of the block.
            x: Tokens behind the attention.
            task: With a task t: the routers of t and of the earlier task with the surest guess, among the experts
                up to t. None: the M tasks with the surest guesses among all.
        """
        out = self.shared(i, x)
        parts = list(self.parts) if task is None else list(self.parts)[: task + 1]
        if not parts:
            return out, []
        outputs = [part.expert(i, x) for part in parts]  # type: ignore[operator]
        tokens = [output[:, 0] for output in outputs]
        guesses = [part.guessed(i, u) for part, u in zip(parts, tokens, strict=True)]  # type: ignore[operator]
        shares = [
            F.pad(part.routed(i, u, self.top), (0, len(parts) - 1 - k))  # type: ignore[operator]
            for k, (part, u) in enumerate(zip(parts, tokens, strict=True))
        ]
        acting = chosen(torch.stack([entropy(guess.detach()) for guess in guesses], 1), self.routers, task is not None)
        mixed = torch.einsum("br,bre->be", acting.float(), torch.stack(shares, 1)).to(out.dtype)
        return out + sum(mixed[:, e, None, None] * output for e, output in enumerate(outputs)), guesses


class Routed(Tuner):
    """A bank with a routing; its parameters stay the bank's.

    Attributes:
        guesses: Class guesses of the newest task at every block, [B, C_t] each, of the last forward pass.
    """

    def __init__(self, bank: RoutedBank, task: int | None) -> None:
        super().__init__()
        self._bank, self.task = (bank,), task  # a tuple, or the bank would be a part of this module
        self.guesses: list[Tensor] = []

    def embed(self, tokens: Tensor) -> Tensor:
        self.guesses = []
        return tokens

    def mlp(self, i: int, block: nn.Module, tokens: Tensor) -> Tensor:
        change, guesses = self._bank[0].change(i, tokens, self.task)
        self.guesses += guesses[-1:]
        return mlp_half(block, tokens) + change


def chosen(entropies: Tensor, routers: int, newest: bool) -> Tensor:
    """Which tasks' routers act on each image, bool [B, T], given the entropies of their guesses [B, T].

    The ``routers`` with the lowest entropy; with ``newest`` always the last one, and the lowest of the others.
    """
    if newest:
        entropies = torch.cat([entropies[:, :-1], torch.full_like(entropies[:, -1:], -math.inf)], 1)
    lowest = entropies.topk(min(routers, entropies.shape[1]), dim=1, largest=False).indices
    return torch.zeros_like(entropies, dtype=torch.bool).scatter(1, lowest, True)


def entropy(scores: Tensor) -> Tensor:
    """Entropy of softmax(scores), [B, C] → [B]."""
    log_p = scores.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def weights(depth: int, rows: int, columns: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A weight [L, rows, columns] and a bias [L, rows] of zeros."""
    return nn.Parameter(torch.zeros(depth, rows, columns)), nn.Parameter(torch.zeros(depth, rows))
