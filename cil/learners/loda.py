"""LoDA: low-rank updates in two subspaces, one that old and new inputs share and one that only new inputs excite."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers import CosineHead
from cil.learner import Context
from cil.learners.bases.aligned_copy import OptionalAlignment
from cil.learners.bases.low_rank import LowRankUpdates, require_called
from cil.learners.bases.new_classes import task_head
from cil.learners.bases.subspaces import compromise, isolated_directions, shared_directions
from cil.stream import Task
from cil.training import Loss, ParamGroup, cosface, fit
from cil.tuning import LowRankBank


class LoDA(LowRankUpdates):
    """LoDA: task-driven low-rank subspace decomposition and adaptation (ICML 2026, arXiv 2603.00191).

    Queries, keys and values of block l get W ← W + g_S B_S A_S + g_P B_P A_P. With C = mean x xᵀ of the inputs of the
    attention over the task's images and P the sum of earlier tasks' C, the rows of A_S √3 are the leading eigenvectors
    of C + P, and those of A_P √3 an orthonormal basis of the leading solutions of C u = λ P u. B starts at zero. From
    the second task on only B is trained; the first task has no A_P and trains A_S, too. Loss: CosFace over the task's
    own rows, by a look-ahead (:meth:`ahead`). Afterwards column i of B_S is multiplied by γ e_C / (e_P + γ e_C), where
    e_P and e_C are a P aᵀ and a C aᵀ of row a of A_S, C measured again; the updates are added to the weights, and P
    gets C, and C once more with these weights. ``alignment_epochs`` as in InfLoRA. Keeps the updated weights, P and the
    head. One pass per image at test.
    """

    class Config(OptionalAlignment):
        rank: PositiveInt = Field(32, description="rank r of each of the two updates, at most half the width")
        epochs: int = Field(20, gt=0, description="epochs per task")
        train_batch_size: int = Field(48, gt=0, description="images per optimiser step")
        weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")
        scale: float = Field(20.0, gt=0, description="factor s > 0 on the cosines in every softmax")
        margin: float = Field(0.1, ge=0, lt=2, description="margin m of CosFace, a cosine in [0, 2)")
        shared_scale: float = Field(0.25, gt=0, description="factor g_S > 0 on the update in the shared subspace")
        isolated_scale: float = Field(0.5, gt=0, description="factor g_P > 0 on the update in the isolated subspace")
        radius: float = Field(0.3, ge=0, description="largest length ρ ≥ 0 of the look-ahead; 0: none")
        compromise: float = Field(3.0, gt=0, description="weight γ > 0 of new inputs against old ones in B_S")
        counts: int = Field(2, ge=1, le=2, description="number of times that a task's C is added to P")

    name = "loda"
    summary = "low-rank updates, folded, in a shared subspace and in one that only new inputs excite"
    trains = "queries, keys and values by low-rank updates, head"
    paper = "LoDA: task-driven low-rank subspace decomposition and adaptation, ICML 2026, arXiv 2603.00191"

    past: Tensor

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        scales = [config.shared_scale] * config.rank + [config.isolated_scale] * config.rank
        self.tuner = LowRankBank(backbone, 2 * config.rank, "qkv", scales)
        require_called(backbone, self.tuner.inputs)
        self.head = CosineHead(backbone.feature_dim, config.scale)
        self.head.sigma.requires_grad_(False)  # it stays at s
        if config.alignment_epochs:
            self.keep_copy(ridge=1e-3)
        blocks, _, width = self.tuner.down.shape
        self.register_buffer("past", torch.zeros(blocks, width, width))  # P of each block

    def learn(self, task: Task, ctx: Context) -> None:
        self.choose(self.grams(task, ctx), first=task.index == 0)
        config, start = self.config, task.classes[0]
        rows = task_head(CosineHead(self.backbone.feature_dim), task, ctx)
        plain = cosface(
            lambda images: F.pad(rows(self.tuned(images)), (start, 0), value=-math.inf),
            config,
            start,
            config.scale,
            config.margin,
        )
        parameters = [p for p in self.tuner.parameters() if p.requires_grad]
        groups = [ParamGroup([*parameters, rows.weight])]
        fit(self.ahead(plain, parameters, ctx) if config.radius else plain, groups, task.train, config, ctx)
        self.head.extend(rows)
        gram = self.grams(task, ctx)
        self.recalibrate(gram)
        self.tuner.fold()
        self.past += gram
        if config.counts == 2:
            self.past += self.grams(task, ctx)
        if config.alignment_epochs:
            self.finish(self.head, task, ctx)

    def choose(self, grams: Tensor, first: bool) -> None:
        """Give the tuner A_S and A_P for a task's C [L, D, D]; the first task has A_S alone, and trains it."""
        rank, pairs = self.config.rank, list(zip(grams, self.past, strict=True))
        shared = torch.stack([shared_directions(gram, past, rank) for gram, past in pairs])
        if first:
            isolated = torch.zeros_like(shared)
        else:
            isolated = torch.stack([isolated_directions(gram, past, rank) for gram, past in pairs])
        self.tuner.give(torch.cat([shared, isolated], dim=1) / 3**0.5)
        self.tuner.down.requires_grad_(first)
        self.tuner.up.requires_grad_(True)

    def ahead(self, plain: Loss, parameters: list[torch.nn.Parameter], ctx: Context) -> Loss:
        """Let each half of a batch's classes learn at the weights that descend on the other half.

        L(half 2; θ − ρ u g_1/‖g_1‖) + L(half 1; θ − ρ u g_2/‖g_2‖) with g_i = ∇L(half i; θ), normalised per block and
        subspace, and u ~ U(0, 1) per step. The displacements are constants. A batch of one class has the plain loss.
        """
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=ctx.generator)))

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            classes = labels.unique()
            length = self.config.radius * float(torch.rand((), generator=generator))
            chosen = classes[torch.randperm(len(classes), generator=generator)[: len(classes) // 2].to(labels.device)]
            if len(classes) == 1:
                return plain(images, labels)
            first = torch.isin(labels, chosen)
            total, order, scores = torch.zeros((), device=labels.device), [], []
            for half in (first, ~first):
                slopes = torch.autograd.grad(plain(images[half], labels[half])[0], parameters)
                self.tuner.ahead = self.displacement(dict(zip(parameters, slopes, strict=True)), length)
                value, logits = plain(images[~half], labels[~half])
                self.tuner.ahead = None
                total = total + value
                order.append((~half).nonzero().flatten())
                scores.append(logits.detach())
            return total, torch.cat(scores)[torch.cat(order).argsort()]

        return loss

    def displacement(self, slopes: dict[torch.nn.Parameter, Tensor], length: float) -> tuple[Tensor, Tensor]:
        """−``length`` · g/‖g‖ per block and subspace, for A and B; zero for what is not trained."""

        def unit(parameter: torch.nn.Parameter, dim: int) -> Tensor:
            if parameter not in slopes:
                return torch.zeros_like(parameter)
            parts = slopes[parameter].split(self.config.rank, dim)
            return torch.cat([-length * F.normalize(part.flatten(1), dim=1).view_as(part) for part in parts], dim)

        return unit(self.tuner.down, 1), unit(self.tuner.up, 2)

    @torch.no_grad()
    def recalibrate(self, grams: Tensor) -> None:
        """Multiply the columns of B_S by what is kept between old and new inputs, given C [L, D, D] of now."""
        shared = self.tuner.down[:, : self.config.rank]
        for up, directions, gram, past in zip(self.tuner.up, shared, grams, self.past, strict=True):
            up[:, : len(directions)] *= compromise(directions, gram, past, self.config.compromise).to(up)

    def logits(self, features: Tensor) -> Tensor:
        return self.predictor.logits(features)
