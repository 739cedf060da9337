"""CoFiMA: SLCA whose weights are averaged with those before the task, by both models' Fisher information."""

from __future__ import annotations

from collections import OrderedDict

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.classifiers import LinearHead
from cil.learner import Context
from cil.learners.bases.merged_space import some_images
from cil.learners.slca import SLCA
from cil.merging.fisher import fisher_pair
from cil.merging.statistics import diagonal_fisher
from cil.stream import Task
from cil.tuning.frozen import replaced_tree
from cil.utils.precision import exact


class CoFiMA(SLCA):
    """CoFiMA: continual Fisher-weighted model averaging (Marouf et al., arXiv 2312.08977).

    Task t is trained as in SLCA from the merged weights θ^(t−1), which gives θ_t. F_t is the diagonal Fisher
    information of all classes' scores at θ_t, on images of the task. Then per weight
    θ^(t) = (α F_t θ_t + (1 − α) F_{t−1} θ^(t−1)) / (α F_t + (1 − α) F_{t−1}), in the backbone and in the rows of old
    classes, whose θ^(t−1) are the aligned ones. New rows stay. Gaussians and alignment follow under θ^(t), as in SLCA.
    Keeps F_{t−1}, as large as all weights, beside what SLCA keeps. One forward pass per image at test.
    """

    class Config(SLCA.Config):
        alpha: float = Field(0.4, ge=0, le=1, description="weight α in [0, 1] of the new model in the average")
        statistics: PositiveInt = Field(256, description="images per task for the Fisher information")

    name = "cofima"
    summary = "SLCA, averaged with the weights before each task by Fisher information"
    paper = "Marouf et al., Weighted Ensemble Models Are Strong Continual Learners, ECCV 2024, arXiv 2312.08977"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.fisher = nn.Module()  # F_{t−1} of the backbone's weights, by name, and of the head's rows
        for name, value in self.tuner.copies.items():
            self.fisher.register_buffer(name, torch.zeros_like(value))
        self.fisher.register_buffer("head_weight", torch.zeros(0, backbone.feature_dim))
        self.fisher.register_buffer("head_bias", torch.zeros(0))

    def learn(self, task: Task, ctx: Context) -> None:
        before = {name: value.detach().clone() for name, value in self.tuner.copies.items()}
        self.head.extend(self.train_rows(task, ctx))
        fisher = self.measure(task, ctx)
        self.finish(self.merge(before, fisher, task.index > 0), task, ctx)

    def measure(self, task: Task, ctx: Context) -> dict[str, Tensor]:
        """F_t by name of the buffer that keeps it."""
        weights = {name.replace("/", "."): value for name, value in self.tuner.copies.items()}
        model = nn.Sequential(OrderedDict(vit=replaced_tree(self.backbone.model, weights), head=self.head))
        names = [*(f"vit.{name}" for name in weights), "head.weight", "head.bias"]
        images = some_images(self.backbone, task, self.config.statistics, ctx)
        found = list(diagonal_fisher(model, images, names, generator=ctx.generator).values())
        return dict(zip([*self.tuner.copies, "head_weight", "head_bias"], found, strict=True))

    @exact()
    def merge(self, before: dict[str, Tensor], fisher: dict[str, Tensor], later: bool) -> LinearHead:
        """Set the backbone to θ^(t) and F_{t−1} to F_t; returns the head to align, with merged old rows.

        Args:
            before: θ^(t−1) of the backbone, by name.
            fisher: F_t, by name.
            later: Whether there is a task before this one.
        """
        alpha, known = self.config.alpha, dict(self.fisher.named_buffers())
        head = LinearHead(self.backbone.feature_dim).to(self.head.device).extend(self.head)
        if later:
            for name, old in before.items():
                self.tuner.copies[name].copy_(
                    fisher_pair(self.tuner.copies[name], old, fisher[name], known[name], alpha)
                )
            for name, mine, old in zip(("head_weight", "head_bias"), head.rows, self.aligned.rows, strict=True):
                n = len(old)
                mine[:n] = fisher_pair(mine[:n], old, fisher[name][:n], known[name], alpha)
        for name, value in fisher.items():
            self.fisher.register_buffer(name, value)
        return head
