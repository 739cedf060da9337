"""Tip-Adapter without stored images: texts, and one key per class that is the mean of its images."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from cil.classifiers import NCM
from cil.classifiers.fusion import folds
from cil.learner import Context
from cil.learners.bases.texts import NamesClasses
from cil.stream import Task

GRID = np.geomspace(0.1, 50, 12).tolist()
"""Candidates for α and β; those of the authors' code lie in the same range."""
PUBLISHED = (1.17, 1.0)
"""The authors' initial α for most of their data sets, and β."""


class TipAdapter(NamesClasses):
    """Tip-Adapter (Zhang et al., ECCV 2022, arXiv 2207.09519) with class means as keys.

    logits_c = z_c + α exp(−β (1 − f̂ · k_c)), with z_c of ``zero_shot``, f̂ the normalised feature in the joint space,
    and the key k_c the normalised mean of f̂ over images of class c, at most ``shots``, the first ones. The paper has
    one key per image; means keep no image's feature. α and β have the most correct held-out images of the first task,
    in five folds, and then stay. Keeps 2 d + 1 numbers per class. One forward pass per image.
    """

    class Config(NamesClasses.Config):
        shots: PositiveInt | None = Field(
            16, description="number of images of a class in its key, the first ones; null: all"
        )
        alpha: Annotated[float, Field(ge=0)] | None = Field(
            None, description="weight α ≥ 0 of the keys; null: chosen on held-out images of the first task"
        )
        beta: Annotated[float, Field(gt=0)] | None = Field(
            None, description="sharpness β > 0 of the keys; null: chosen on held-out images of the first task"
        )

    name = "tip_adapter"
    summary = "texts, and a key per class from the mean of its images (Tip-Adapter without images)"
    trains = "nothing"
    paper = "Zhang et al., Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification, ECCV 2022"
    chosen: Tensor

    def make_parts(self, joint: int) -> None:
        self.keys = NCM(joint)
        given = zip((self.config.alpha, self.config.beta), PUBLISHED, strict=True)
        # (α, β)
        self.register_buffer("chosen", torch.tensor([usual if own is None else own for own, usual in given]))

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.keys.grow(len(task.seen))

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        features, labels = ctx.features(self, task.train)
        kept = self._first(labels)
        features, labels = features[kept], labels[kept]
        if task.index == 0 and None in (self.config.alpha, self.config.beta):
            self._choose(features, labels, ctx)
        self.keys.partial_fit(self.normalised(features), labels)
        ctx.log("alpha", float(self.chosen[0]))
        ctx.log("beta", float(self.chosen[1]))

    def _first(self, labels: Tensor) -> Tensor:
        """Positions of the images that enter the keys, in order."""
        if self.config.shots is None:
            return torch.arange(len(labels), device=labels.device)
        left = (self.config.shots - self.keys.counts).clamp(min=0).tolist()
        found = [(labels == c).nonzero().flatten()[: left[c]] for c in labels.unique().tolist()]
        return torch.cat(found).sort().values

    def _choose(self, features: Tensor, labels: Tensor, ctx: Context) -> None:
        """α and β with the most correct images that their keys do not hold; of equals those of the least loss."""
        config = self.config
        alphas = GRID if config.alpha is None else [config.alpha]
        betas = GRID if config.beta is None else [config.beta]
        scores = {(alpha, beta): np.zeros(2) for alpha in alphas for beta in betas}  # correct images, minus the loss
        f, z, tried = self.normalised(features), self.text.logits(features), False
        for fitted, held_out in folds(labels, ctx.generator):
            keys, tried = deepcopy(self.keys).partial_fit(f[fitted], labels[fitted]), True
            near, truth = keys.logits(f[held_out]), labels[held_out]
            for (alpha, beta), score in scores.items():
                logits = z[held_out] + alpha * torch.exp(-beta * (1 - near))
                loss = float(F.cross_entropy(logits, truth, reduction="sum"))
                score += [int((logits.argmax(1) == truth).sum()), -loss]
        if tried:
            self.chosen = self.chosen.new_tensor(max(scores, key=lambda pair: tuple(scores[pair])))

    def normalised(self, features: Tensor) -> Tensor:
        """f̂, [B, d]."""
        return F.normalize(self.text.project(features), dim=1)

    def logits(self, features: Tensor) -> Tensor:
        alpha, beta = self.chosen.to(features.dtype)
        near = self.keys.logits(self.normalised(features))  # −∞ for a class without images: no key, and 0 here
        return self.text.logits(features) + alpha * torch.exp(-beta * (1 - near))
