"""ENGINE: linear maps of CLIP's images and texts, Gaussians of images, and texts that tell similar classes apart."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from cil.classifiers import LDA, NCM, Classifier
from cil.classifiers.averaged import AveragedPrecision
from cil.classifiers.fusion import folds, fusion_weights
from cil.learner import Context
from cil.learners.bases.contrasts import TellsApart
from cil.learners.bases.linear_maps import add_map, info_nce, mapped, new_map, zero_map
from cil.learners.bases.old_vectors import WithMeans
from cil.stream import Task
from cil.training import ParamGroup, Recipe, Schedule, fit
from cil.training.processes import across_processes
from cil.training.recipe import Per

PIXEL_NOISE = 0.25
"""Standard deviation of the noise on normalised pixels."""


class Engine(TellsApart):
    """ENGINE (Zhou et al., arXiv 2503.08510).

    Each task adds a linear map of images A_i and one of texts B_i; with v = Σ_i A_i f and w_c = Σ_i B_i e_c of raw
    vectors in the joint space, z_c = cos(v, w_c). Scores are σ g/‖g‖ + (1 − σ) (ρ r + (1 − ρ) z), with g the logits of
    LDA on normalised features, as in ``clip_gda``, and r_c = cos(f, Σ_c' R_cc') for the five classes of largest z, 0
    for others: R_cc' is the mean of the texts that tell c from c', and c' are the other four. ``published`` replaces
    LDA's covariance by the authors' recursion (:class:`~cil.classifiers.averaged.AveragedPrecision`).

    With ``weight: each_task`` the scores are a g/‖g‖ + b r + c z: (a, b, c) ≥ 0 minimise the cross-entropy of the
    task's images, held out in five folds, and for each fold maps and Gaussians learn from the other four.

    A_t and B_t minimise, over the rows of a step (images and one noisy mean per old class), the symmetric InfoNCE of v
    and w with the temperature log s, 2 × that of w and a sentence with a random descriptor of the row's class, and λ ×
    that of v and the frozen feature of a noisy view of the image. Descriptors are those between classes seen. Without a
    file of descriptors their loss is left out, and r = z. Keeps F² + 2 d² numbers, F + 3 d per class, d per pair.
    """

    class Config(TellsApart.Config, Recipe):
        epochs: PositiveInt = Field(10, description="epochs per task")
        lr: float = Field(0.05, gt=0, description="peak learning rate")
        weight_decay: float = Field(0.05, ge=0, description="L2 penalty")
        schedule: Schedule = Field("cosine", description="learning-rate schedule")
        schedule_per: Per = Field("epoch", description="interval at which the rate changes")
        noise: NonNegativeFloat = Field(0.25, description="standard deviation of the noise on means of old classes")
        image_weight: NonNegativeFloat = Field(0.5, description="weight λ of the loss of noisy views")
        image_noise_views: NonNegativeInt = Field(
            1, description="number of noisy views per image, one more pass of the images each; 0: without their loss"
        )
        rerank: float = Field(0.5, ge=0, le=1, description="share ρ of descriptors among the scores of texts")
        gaussians: float = Field(0.8, ge=0, le=1, description="share σ of the Gaussians in the scores")
        weight: Literal["given", "each_task"] = Field(
            "given",
            description="weights of Gaussians, descriptors and texts; given: σ and ρ; each_task: fitted on held-out "
            "images of each task, for which its maps are trained five more times",
        )
        published: bool = Field(
            False, description="whether the Gaussians have the precision matrix of the authors' recursion"
        )

    name = "engine"
    summary = "linear maps of CLIP's images and texts, LDA, and descriptors of similar classes (ENGINE)"
    trains = "two linear maps per task"
    paper = "Zhou et al., External Knowledge Injection for CLIP-Based CIL, ICCV 2025, arXiv 2503.08510"
    needs_new_classes = True
    weights: Tensor

    def make_parts(self, joint: int) -> None:
        super().make_parts(joint)
        config, width = self.config, self.backbone.feature_dim
        self.image_map, self.text_map = zero_map(joint), zero_map(joint)
        self.classifier = AveragedPrecision(width) if config.published else LDA(width, "samples", "uniform")
        self.prototypes = NCM(joint)
        if config.weight == "each_task":
            sigma, rho = config.gaussians, config.rerank  # until a task has images to hold out
            self.register_buffer("weights", torch.tensor([sigma, (1 - sigma) * rho, (1 - sigma) * (1 - rho)]))

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        for part in (self.classifier, self.prototypes):
            part.grow(len(task.seen))

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        features, labels = ctx.features(self, task.train)
        joint = self.text.project(features)
        views = self._noisy_views(task, ctx) if self.config.image_weight else joint.new_zeros(0, *joint.shape)
        sentences = self.described(task, ctx)
        if self.config.weight == "each_task":
            self._weigh(features, labels, views, sentences, ctx)
        maps = self._trained(joint, labels, views, sentences, ctx)
        add_map(self.image_map, maps[0])
        add_map(self.text_map, maps[1])
        self.classifier.partial_fit(F.normalize(features, dim=1), labels)
        self.prototypes.partial_fit(joint, labels)

    def _trained(
        self, joint: Tensor, labels: Tensor, views: Tensor, sentences: list[Tensor], ctx: Context, prefix: str = ""
    ) -> tuple[nn.Linear, nn.Linear]:
        """A_t and B_t for images of the task: joint features [N, d], labels, views [K, N, d], sentences per class."""
        config, old = self.config, self.prototypes.means[self.prototypes.counts > 0].float()
        size = config.train_batch_size
        data = WithMeans(joint, labels, old, config.noise, sentences, views, size)
        maps = new_map(self.image_map, ctx.generator), new_map(self.text_map, ctx.generator)

        def loss(joint: Tensor, texts: Tensor, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            image = F.normalize(self.image_map(joint) + maps[0](joint), dim=1)
            names = F.normalize(self.text_map(self.raw) + maps[1](self.raw), dim=1)
            rows = image, names[labels], F.normalize(texts, dim=1), F.normalize(views, dim=1)
            return across_processes(self._loss, ctx.accelerator, *rows), image @ names.T

        recipe = config.model_copy(update={"train_batch_size": size + len(old)})
        groups = [ParamGroup([p for one in maps for p in one.parameters()])]
        fit(loss, groups, data, recipe, ctx, prefix=prefix, batch_loss=True)
        return maps

    def _loss(self, image: Tensor, names: Tensor, texts: Tensor, views: Tensor) -> Tensor:
        """The three losses of all rows of a step, [b, d] each, of length 1; ``views`` are NaN for means."""
        logits = math.log(float(self.text.scale)) * image @ names.T
        total = (info_nce(logits) + info_nce(logits.T)) / 2
        if self.config.descriptors is not None:
            total = total + 2 * info_nce(names @ texts.T)
        seen = views.isfinite().all(1)
        if bool(seen.any()):
            total = total + self.config.image_weight * info_nce(image[seen] @ views[seen].T)
        return total

    def _weigh(self, features: Tensor, labels: Tensor, views: Tensor, sentences: list[Tensor], ctx: Context) -> None:
        """Fit the weights to the task's images, each scored by maps and Gaussians that do not know it."""
        if len(self.raw) < 2:
            return
        joint, found = self.text.project(features), []
        for fitted, held_out in folds(labels, ctx.generator):
            image_map, text_map = deepcopy(self.image_map), deepcopy(self.text_map)
            maps = self._trained(joint[fitted], labels[fitted], views[:, fitted], sentences, ctx, "held_out_")
            add_map(image_map, maps[0])
            add_map(text_map, maps[1])
            classifier = deepcopy(self.classifier).partial_fit(F.normalize(features[fitted], dim=1), labels[fitted])
            found.append((*self._parts(features[held_out], image_map, text_map, classifier), labels[held_out]))
        if found:
            *scores, truth = (torch.cat(part) for part in zip(*found, strict=True))
            self.weights = self.weights.new_tensor(fusion_weights(scores, truth))
        for name, weight in zip(("gaussians", "descriptors", "texts"), self.weights.tolist(), strict=True):
            ctx.log(f"weight_of_{name}", weight)

    @torch.no_grad()
    def _noisy_views(self, task: Task, ctx: Context) -> Tensor:
        """Joint features of noisy views, [K, N, d]; pixels are cut to 0…1 after normalisation, as in their code."""
        found = []
        for _ in range(self.config.image_noise_views):
            for images, _ in task.train.batches(self.config.train_batch_size, device=ctx.device):
                noise = torch.randn(images.shape, generator=ctx.generator, device=ctx.generator.device)
                noisy = (images + PIXEL_NOISE * noise.to(images)).clamp(0, 1)
                found.append(self.text.project(self.backbone(noisy)))
        return torch.cat([self.raw[:0], *found]).view(self.config.image_noise_views, len(task.train), self.text.width)

    def _parts(
        self, features: Tensor, image_map: nn.Linear, text_map: nn.Linear, classifier: Classifier
    ) -> tuple[Tensor, Tensor, Tensor]:
        """g/‖g‖, r and z, [B, C] each."""
        joint = self.text.project(features)
        names = F.normalize(mapped(text_map, self.raw.to(features.dtype)), dim=1)
        z = F.normalize(mapped(image_map, joint), dim=1) @ names.T
        g = F.normalize(classifier.logits(F.normalize(features, dim=1)), dim=1)
        return g, self.reranked(joint, z), z

    def logits(self, features: Tensor) -> Tensor:
        config = self.config
        g, r, z = self._parts(features, self.image_map, self.text_map, self.classifier)
        if config.weight == "each_task":
            a, b, c = self.weights.to(features.dtype)
            return a * g + b * r + c * z
        return config.gaussians * g + (1 - config.gaussians) * (config.rerank * r + (1 - config.rerank) * z)
