"""Texts that tell each class from each other one, and scores among the most likely classes by them (ENGINE)."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cil.learner import Context
from cil.learners.bases.texts import MapsTexts
from cil.prompts import Descriptors, phrase
from cil.stream import Task

RIVALS = 5
"""Classes with the best text scores, among which descriptors decide."""


class TellsApart(MapsTexts):
    """A learner with raw text vectors of classes, and with vectors of what tells a class from another one.

    Buffers:
        contrasts: R, float32 [C, C, d], mean of the texts that tell c from c'; 0 for c' = c. Empty without a file.
    """

    class Config(MapsTexts.Config):
        descriptors: Descriptors | None = Field(
            None,
            description="file with texts that tell each class from each other one, class: {other: [text, …]}; "
            "knowledge from outside the stream",
        )

    contrasts: Tensor

    def make_parts(self, joint: int) -> None:
        super().make_parts(joint)
        self.register_buffer("contrasts", torch.zeros(0, 0, joint))

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if self.config.descriptors is not None:
            new = len(task.seen) - len(self.contrasts)
            self.contrasts = F.pad(self.contrasts, (0, 0, 0, new, 0, new))

    def described(self, task: Task, ctx: Context) -> list[Tensor]:
        """Vectors of sentences about each class seen, with all that tells it from another one; updates R."""
        described: list[list[Tensor]] = [[] for _ in task.seen]
        pairs = [(c, other) for c, other in product(task.seen, task.seen) if c != other]
        if self.config.descriptors is not None:
            names = [(task.names[c], task.names[other]) for c, other in pairs]
            for (c, other), texts in zip(pairs, self.config.descriptors.contrasts(names), strict=True):
                words = phrase(task.names[c], self.config.phrases)
                vectors = ctx.texts(self.backbone, [f"{words} with {text.lower()}" for text in texts])
                described[c].append(vectors)
                self.contrasts[c, other] = F.normalize(vectors, dim=1).mean(0)
        return [torch.cat(found) if found else self.raw[c : c + 1] for c, found in enumerate(described)]

    def reranked(self, joint: Tensor, z: Tensor) -> Tensor:
        """r, [B, C], of features in the joint space; z without descriptors, or with a single class."""
        if len(self.contrasts) < 2:
            return z
        best = z.topk(min(RIVALS, z.shape[1]), dim=1).indices
        told = self.contrasts[best[:, :, None], best[:, None, :]].sum(2).to(joint.dtype)  # R_cc is 0
        cosines = (F.normalize(told, dim=2) * F.normalize(joint, dim=1)[:, None]).sum(2)
        return torch.zeros_like(z).scatter(1, best, cosines)
