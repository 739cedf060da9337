"""PROOF: linear maps of CLIP's images and texts per task, and attention over texts, class means and prompts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from cil.classifiers import NCM
from cil.classifiers.attention import SharedAttention
from cil.learner import Context
from cil.learners.bases.exemplars import KeepsExemplars
from cil.learners.bases.linear_maps import add_map, info_nce, new_map, zero_map
from cil.learners.bases.texts import MapsTexts
from cil.stream import Task
from cil.training import ParamGroup, Recipe, TensorData, fit
from cil.training.processes import across_processes
from cil.training.recipe import Per


class Proof(KeepsExemplars, MapsTexts):
    """PROOF (Zhou et al., TPAMI 2025, arXiv 2305.19270), which keeps images of old classes.

    Each task adds a linear map of images and one of texts: v = Σ_i A_i f and w_c = Σ_i B_i e_c, and three prompts. An
    image's tokens are v̂, all ŵ_c, all v̂(p_c) of class means p_c, and the prompts. One attention block
    (:class:`~cil.classifiers.attention.SharedAttention`) turns them into ĩ, T̃_c and P̃_c, and the score of class c is
    v · ŵ_c + ĩ · T̃_c + ĩ · P̃_c. A task minimises CE(ĩ · T̃) + CE(ĩ · P̃) plus the symmetric InfoNCE of v̂ and ŵ of each
    row's class, over its images and the exemplars; maps and prompts of earlier tasks stay. Exemplars are chosen by
    herding. Keeps 6 d² numbers, 3 d per class, 3 d per task, and ``memory`` images.
    """

    class Config(MapsTexts.Config, Recipe):
        lr: float = Field(1e-3, gt=0, description="peak learning rate")
        weight_decay: float = Field(0.05, ge=0, description="L2 penalty")
        schedule_per: Per = Field("epoch", description="interval at which the rate changes")
        memory: PositiveInt = Field(2000, description="number of images kept in all, equally many per class seen")
        prompts: NonNegativeInt = Field(3, description="number of prompts per task")

    name = "proof"
    summary = "linear maps of CLIP's images and texts, fused by attention; keeps exemplars (PROOF)"
    trains = "two linear maps and prompts per task, one attention block"
    paper = "Zhou et al., Learning without Forgetting for Vision-Language Models, TPAMI 2025, arXiv 2305.19270"
    prompts: Tensor

    def make_parts(self, joint: int) -> None:
        super().make_parts(joint)
        self.image_map, self.text_map = zero_map(joint), zero_map(joint)
        self.attention, self.prototypes = SharedAttention(joint), NCM(joint)
        self.log_scale = nn.Parameter(self.text.scale.log(), requires_grad=False)
        self.register_buffer("prompts", torch.zeros(0, joint))

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index == 0:
            self.attention.draw(ctx.generator)
        self.prototypes.grow(len(task.seen))
        self.prompts = F.pad(self.prompts, (0, 0, 0, self.config.prompts))

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        config = self.config
        features, new = ctx.features(self, task.train)
        own = F.normalize(self.text.project(features), dim=1)
        self.prototypes.partial_fit(own, new)
        features, labels = ctx.features(self, self.with_exemplars(task))
        maps = [new_map(self.image_map, ctx.generator), new_map(self.text_map, ctx.generator)]
        drawn = torch.randn(config.prompts, self.text.width, generator=ctx.generator, device=ctx.generator.device)
        prompts, old = nn.Parameter(drawn.to(self.prompts)), self.prompts[: len(self.prompts) - config.prompts]

        def loss(joint: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            image = F.normalize(self.image_map(joint) + maps[0](joint), dim=1)
            names = F.normalize(self.text_map(self.raw) + maps[1](self.raw), dim=1)
            means = F.normalize(self.image_map(self.means) + maps[0](self.means), dim=1)
            by_text, by_mean = self._fused(image, names, means, torch.cat([old, prompts]))
            scaled = self.log_scale.exp() * image
            paired = across_processes(_symmetric, ctx.accelerator, scaled, names[labels])
            entropy = F.cross_entropy(by_text, labels) + F.cross_entropy(by_mean, labels) if len(labels) else 0
            return entropy + paired, by_text + by_mean

        trained = [p for part in (*maps, self.attention) for p in part.parameters()]
        self.attention.train()
        data = TensorData(self.text.project(features), labels)
        fit(loss, [ParamGroup([*trained, prompts, self.log_scale])], data, config, ctx, batch_loss=True)
        self.attention.eval()
        add_map(self.image_map, maps[0])
        add_map(self.text_map, maps[1])
        self.prompts[len(old) :] = prompts.detach()
        self.keep(own, new, task)

    @property
    def means(self) -> Tensor:
        """p, mean normalised feature of each class in the joint space, float32 [C, d]."""
        return self.prototypes.means.float()

    def _fused(self, image: Tensor, names: Tensor, means: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """ĩ · T̃_c and ĩ · P̃_c, [B, C] each."""
        classes = len(names)
        fused, others = self.attention(image, torch.cat([names, means, prompts]), 2 * classes)
        scores = torch.einsum("bd,bcd->bc", fused, others)
        return scores[:, :classes], scores[:, classes:]

    def logits(self, features: Tensor) -> Tensor:
        image = self.image_map(self.text.project(features).float())
        names = F.normalize(self.text_map(self.raw), dim=1)
        means = F.normalize(self.image_map(self.means), dim=1)
        by_text, by_mean = self._fused(F.normalize(image, dim=1), names, means, self.prompts)
        return image @ names.T + by_text + by_mean


def _symmetric(image: Tensor, names: Tensor) -> Tensor:
    """InfoNCE of rows [b, d] in both directions."""
    scores = image @ names.T
    return (info_nce(scores) + info_nce(scores.T)) / 2
