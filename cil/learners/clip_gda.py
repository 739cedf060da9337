"""CLIP's text scores and a Gaussian discriminant of the images, with weights that held-out images decide."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor
from typing_extensions import Self

from cil.classifiers import LDA
from cil.classifiers.fusion import held_out_weights
from cil.classifiers.text_prior import TextLDA
from cil.learner import Context
from cil.learners.bases.texts import NamesClasses
from cil.stream import Task

Positive = Annotated[float, Field(gt=0)]


class ClipGDA(NamesClasses):
    """Gaussian discriminant analysis beside CLIP's texts (Wang et al., ICLR 2024, arXiv 2402.04087), for streams.

    With u = f/‖f‖, logits are a · z + b · g: z_c as in ``zero_shot``, and g the logits of LDA on u with uniform priors
    and shrinkage ς = F / (N − 1 + F), N the images so far. All its statistics are sums. The paper's precision matrix is
    ς times that of this LDA; with ``published`` g is multiplied by this factor, which falls as N grows.

    The weights (a, b) minimise the cross-entropy of the current task's images, held out in five folds: z and g are
    computed for each fold over all classes seen, g from the sums of old tasks and the other four folds. Old images are
    not needed. If a class has fewer than five images, the weights stay as they are; at first a = 1 and b = ς, or 0 if
    no class has two images. Keeps F² numbers, and F + d + 1 per class. One forward pass per image.
    """

    class Config(NamesClasses.Config):
        space: Literal["pooled", "joint"] = Field(
            "pooled", description="features of the Gaussians: the backbone's own, or those in the space of the texts"
        )
        weight: Literal["each_task", "first_task"] | Positive = Field(
            "each_task",
            description="weights of texts and Gaussians: fitted on held-out images of each task, or of the first one; "
            "a number: that of the Gaussians, with 1 for the texts",
        )
        text_prior: NonNegativeFloat = Field(
            0.0, description="number of images that a class name is worth in the mean of its class; needs space: joint"
        )
        published: bool = Field(False, description="whether Gaussian scores are scaled as in the paper's code")

        @model_validator(mode="after")
        def _in_one_space(self) -> Self:
            if self.text_prior and self.space != "joint":
                raise ValueError("text_prior compares images with texts; set space: joint, or text_prior: 0")
            return self

    name = "clip_gda"
    summary = "texts and linear discriminant analysis of images, weighted on held-out images"
    trains = "nothing"
    paper = "Wang et al., A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation, ICLR 2024, arXiv 2402.04087"
    weights: Tensor

    def make_parts(self, joint: int) -> None:
        width = joint if self.config.space == "joint" else self.backbone.feature_dim
        # a closure, because copies of a bound method copy the learner with its backbone
        self.classifier = TextLDA(width, lambda: self.text.prototypes, self.config.text_prior)
        self.register_buffer("weights", torch.zeros(2, dtype=torch.float64))  # (a, b)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.classifier.grow(len(task.seen))

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        features, labels = ctx.features(self, task.train)
        known = task.index > 0
        if self.config.weight == "each_task" or (self.config.weight == "first_task" and not known):
            self._weigh(features, labels, ctx)
        self.classifier.partial_fit(self.gaussian_features(features), labels)
        if not bool(self.weights.any()):
            # single images say nothing of the variance, and so nothing of the size of g
            usual = self.classifier.shrinkages[0] if bool((self.classifier.counts > 1).any()) else 0.0
            chosen = self.config.weight if isinstance(self.config.weight, float) else usual
            self.weights = self.weights.new_tensor([1.0, chosen])
        ctx.log("weight_of_texts", float(self.weights[0]))
        ctx.log("weight_of_gaussians", float(self.weights[1]))

    def _weigh(self, features: Tensor, labels: Tensor, ctx: Context) -> None:
        """Fit the weights to the task's images, each scored by statistics without it."""
        u = self.gaussian_features(features)

        def gaussians(fitted: Tensor, held_out: Tensor) -> Tensor:
            without = deepcopy(self.classifier).partial_fit(u[fitted], labels[fitted])
            return self._gaussians(without, u[held_out])

        found = held_out_weights(self.text.logits(features), gaussians, labels, ctx.generator)
        if found is not None:
            self.weights = self.weights.new_tensor(found)

    def gaussian_features(self, features: Tensor) -> Tensor:
        """Features [B, F] as the Gaussians get them, of length 1."""
        return F.normalize(self.text.project(features) if self.config.space == "joint" else features, dim=1)

    def _gaussians(self, classifier: LDA, u: Tensor) -> Tensor:
        """g, [B, C]."""
        scores = classifier.logits(u)
        if not self.config.published:
            return scores
        return scores * classifier.cached("published", lambda: _factor(classifier))

    def logits(self, features: Tensor) -> Tensor:
        a, b = self.weights.to(features.dtype)
        return a * self.text.logits(features) + b * self._gaussians(self.classifier, self.gaussian_features(features))


def _factor(classifier: LDA) -> float:
    """ς · (N − 1) / N; the covariance of LDA divides by N, that of the paper by N − 1."""
    images = int(classifier.counts.sum())
    return classifier.shrinkages[0] * max(images - 1, 1) / images
