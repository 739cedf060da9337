"""ENGINE: linear maps of CLIP's images and texts, Gaussians of images, and texts that tell similar classes apart."""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from cil.classifiers import LDA, NCM
from cil.learner import Context
from cil.learners.bases.linear_maps import add_map, info_nce, mapped, new_map, zero_map
from cil.learners.bases.old_vectors import WithMeans
from cil.learners.bases.texts import NamesClasses
from cil.prompts import Descriptors, phrase, sentences
from cil.stream import Task
from cil.training import ParamGroup, Recipe, Schedule, fit
from cil.training.processes import across_processes
from cil.training.recipe import Per

RIVALS = 5
"""Classes with the best text scores, among which descriptors decide."""
PIXEL_NOISE = 0.25
"""Standard deviation of the noise on normalised pixels."""


class Engine(NamesClasses):
    """ENGINE (Zhou et al., arXiv 2503.08510).

    Each task adds a linear map of images A_i and one of texts B_i; with v = Σ_i A_i f and w_c = Σ_i B_i e_c of raw
    vectors in the joint space, z_c = cos(v, w_c). Scores are σ g/‖g‖ + (1 − σ) (ρ r + (1 − ρ) z), with g the logits of
    LDA on normalised features, as in ``clip_gda``, and r_c = cos(f, Σ_c' R_cc') for the five classes of largest z, 0
    for others: R_cc' is the mean of the texts that tell c from c', and c' are the other four.

    A_t and B_t minimise, over the rows of a step (images and one noisy mean per old class), the symmetric InfoNCE of v
    and w with the temperature log s, 2 × that of w and a sentence with a random descriptor of the row's class, and λ ×
    that of v and the frozen feature of a noisy view of the image. Descriptors are those between classes seen. Without a
    file of descriptors their loss is left out, and r = z. Keeps F² + 2 d² numbers, F + 3 d per class, d per pair.
    """

    class Config(NamesClasses.Config, Recipe):
        epochs: PositiveInt = Field(10, description="epochs per task")
        lr: float = Field(0.05, gt=0, description="peak learning rate")
        weight_decay: float = Field(0.05, ge=0, description="L2 penalty")
        schedule: Schedule = Field("cosine", description="learning-rate schedule")
        schedule_per: Per = Field("epoch", description="interval at which the rate changes")
        descriptors: Descriptors | None = Field(
            None,
            description="file with texts that tell each class from each other one, class: {other: [text, …]}; "
            "knowledge from outside the stream",
        )
        noise: NonNegativeFloat = Field(0.25, description="standard deviation of the noise on means of old classes")
        image_weight: NonNegativeFloat = Field(0.5, description="weight λ of the loss of noisy views")
        image_noise_views: NonNegativeInt = Field(
            1, description="number of noisy views per image, one more pass of the images each; 0: without their loss"
        )
        rerank: float = Field(0.5, ge=0, le=1, description="share ρ of descriptors among the scores of texts")
        gaussians: float = Field(0.8, ge=0, le=1, description="share σ of the Gaussians in the scores")

    name = "engine"
    summary = "linear maps of CLIP's images and texts, LDA, and descriptors of similar classes (ENGINE)"
    trains = "two linear maps per task"
    paper = "Zhou et al., External Knowledge Injection for CLIP-Based CIL, ICCV 2025, arXiv 2503.08510"
    needs_new_classes = True
    raw: Tensor
    contrasts: Tensor

    def make_parts(self, joint: int) -> None:
        self.image_map, self.text_map = zero_map(joint), zero_map(joint)
        self.classifier, self.prototypes = LDA(self.backbone.feature_dim, "samples", "uniform"), NCM(joint)
        self.register_buffer("raw", torch.zeros(0, joint))  # mean of a class's sentences, not normalised
        self.register_buffer("contrasts", torch.zeros(0, 0, joint))  # R

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        classes = len(task.seen)
        for part in (self.classifier, self.prototypes):
            part.grow(classes)
        new = classes - len(self.raw)
        self.raw = F.pad(self.raw, (0, 0, 0, new))
        if self.config.descriptors is not None:
            self.contrasts = F.pad(self.contrasts, (0, 0, 0, new, 0, new))

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        config, first = self.config, task.classes[0]
        features, labels = ctx.features(self, task.train)
        joint = self.text.project(features)
        for c in task.classes:
            texts = sentences(task.names[c], config.templates, config.phrases)
            self.raw[c] = ctx.texts(self.backbone, texts).mean(0)
        old = self.prototypes.sums[:first] / self.prototypes.counts[:first, None]
        views = self._noisy_views(task, ctx) if config.image_weight else joint.new_zeros(0, *joint.shape)
        size = config.train_batch_size
        data = WithMeans(joint, labels, old.float(), config.noise, self._described(task, ctx), views, size)
        maps = [new_map(self.image_map, ctx.generator), new_map(self.text_map, ctx.generator)]

        def loss(joint: Tensor, texts: Tensor, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            image = F.normalize(self.image_map(joint) + maps[0](joint), dim=1)
            names = F.normalize(self.text_map(self.raw) + maps[1](self.raw), dim=1)
            rows = image, names[labels], F.normalize(texts, dim=1), F.normalize(views, dim=1)
            return across_processes(self._loss, ctx.accelerator, *rows), image @ names.T

        recipe = config.model_copy(update={"train_batch_size": size + first})
        fit(loss, [ParamGroup([p for one in maps for p in one.parameters()])], data, recipe, ctx, batch_loss=True)
        for total, new in zip((self.image_map, self.text_map), maps, strict=True):
            add_map(total, new)
        self.classifier.partial_fit(F.normalize(features, dim=1), labels)
        self.prototypes.partial_fit(joint, labels)

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

    def _described(self, task: Task, ctx: Context) -> list[Tensor]:
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

    def logits(self, features: Tensor) -> Tensor:
        config, joint = self.config, self.text.project(features)
        names = F.normalize(mapped(self.text_map, self.raw.to(features.dtype)), dim=1)
        z = F.normalize(mapped(self.image_map, joint), dim=1) @ names.T
        g = F.normalize(self.classifier.logits(F.normalize(features, dim=1)), dim=1)
        text = config.rerank * self.reranked(joint, z) + (1 - config.rerank) * z
        return config.gaussians * g + (1 - config.gaussians) * text

    def reranked(self, joint: Tensor, z: Tensor) -> Tensor:
        """r, [B, C], of features in the joint space; z without descriptors, or with a single class."""
        if len(self.contrasts) < 2:
            return z
        best = z.topk(min(RIVALS, z.shape[1]), dim=1).indices
        told = self.contrasts[best[:, :, None], best[:, None, :]].sum(2).to(joint.dtype)  # R_cc is 0
        cosines = (F.normalize(told, dim=2) * F.normalize(joint, dim=1)[:, None]).sum(2)
        return torch.zeros_like(z).scatter(1, best, cosines)
