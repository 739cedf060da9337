"""CODA-Prompt: prefixes that are sums of components, weighted by the similarity of their keys to the query."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.views import require_views
from cil.backbone.vit import attention_width
from cil.classifiers import LinearHead
from cil.classifiers.heads import HeadStart
from cil.learner import Context
from cil.learners.bases.prompting import PromptLearner, PromptRecipe
from cil.stream import Task
from cil.training import Per, Schedule
from cil.tuning import ExternalPrefix
from cil.tuning.blocks import chosen_blocks
from cil.utils.precision import without_autocast


class CODAPrompt(PromptLearner):
    """CODA-Prompt (Smith et al., arXiv 2211.13218).

    Selected blocks have components P_j ∈ [L, A], each with a key K_j and an attention vector A_j ∈ [F]. The weight of
    a component is α_j = cos(q ⊙ A_j, K_j), without softmax, and the prompt is p = Σ_j α_j P_j; its first half are the
    keys of a prefix, the second half the values. Each task adds and trains m components; older ones are frozen and stay
    in the sum. L = CE + μ · Σ_blocks [mean (KKᵀ − I)² + mean (AAᵀ − I)² + mean (PPᵀ − I)²]. Two passes per image.
    """

    class Config(PromptRecipe):
        epochs: int = Field(20, gt=0, description="epochs per task")
        train_batch_size: int = Field(128, gt=0, description="images per optimiser step")
        lr: float = Field(1e-3, gt=0, description="peak learning rate")
        schedule: Schedule = Field("quarter_cosine", description="learning-rate schedule")
        schedule_per: Per = Field("epoch", description="interval at which the schedule changes the rate")
        components: PositiveInt = Field(10, description="components m per task (the authors: 100 over 10 tasks)")
        length: NonNegativeInt = Field(8, description="rows L per component, an even number: half keys, half values")
        blocks: list[NonNegativeInt] = Field([0, 1, 2, 3, 4], description="indices of the blocks with a prefix")
        head_start: HeadStart = Field(
            "normal",
            description="distribution of the head's new rows; normal: truncated, deviation 0.02, as in timm; uniform: "
            "U(−1/√F, 1/√F) for rows and biases, as in the authors' code",
        )
        orthogonality: float = Field(0.0, ge=0, description="weight μ ≥ 0 of the orthogonality term")

        @model_validator(mode="after")
        def _even(self) -> Any:
            if self.length % 2:
                raise ValueError(f"length: {self.length}; it must be even: half keys, half values")
            return self

    name = "coda_prompt"
    summary = "prefixes mixed from components by attention to the image's features"
    trains = "prompt components, head"
    paper = "Smith et al., CODA-Prompt: Continual Decomposed Attention-based Prompting, CVPR 2023, arXiv 2211.13218"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.head = LinearHead(backbone.feature_dim, start=config.head_start)
        require_views(backbone.model)
        chosen_blocks(backbone.model, config.blocks)
        # one entry per task: [blocks, m, F], [blocks, m, F], [blocks, m, L · A]
        self.keys, self.attention, self.prompts = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        prompt = self.config.length * attention_width(self.backbone.model)
        width = self.backbone.feature_dim
        for old, size in ((self.keys, width), (self.attention, width), (self.prompts, prompt)):
            present = joined(old) if len(old) else torch.zeros(len(self.config.blocks), 0, size)
            new = [orthogonal_rows(rows, self.config.components, ctx.generator) for rows in present.detach().cpu()]
            old.append(nn.Parameter(torch.stack(new).to(ctx.device), requires_grad=False))

    def trained(self) -> list[nn.Parameter]:
        return [self.keys[-1], self.attention[-1], self.prompts[-1]]

    @without_autocast()
    def weights(self, query: Tensor) -> Tensor:
        """Weights α of the components in each block for queries [B, F], [blocks, B, components]."""
        keys, attention = F.normalize(joined(self.keys), dim=-1), joined(self.attention)
        # ⟨q ⊙ A, K⟩ / ‖q ⊙ A‖ from two products, without a tensor of B × components × F
        dots = torch.einsum("bf,lmf->lbm", query, attention * keys)
        lengths = torch.einsum("bf,lmf->lbm", query.square(), attention.square()).sqrt()
        return dots / lengths.clamp(min=1e-12)

    def tuner(self, query: Tensor) -> ExternalPrefix:
        if not len(self.keys):
            return ExternalPrefix({})
        shape = 2, self.config.length // 2, attention_width(self.backbone.model)
        mixed = (self.weights(query) @ joined(self.prompts)).unflatten(2, shape)
        return ExternalPrefix({block: (p[:, 0], p[:, 1]) for block, p in zip(self.config.blocks, mixed, strict=True)})

    def training_tuner(self, query: Tensor) -> tuple[ExternalPrefix, Tensor]:
        return self.tuner(query), self.config.orthogonality * self.orthogonality()

    def orthogonality(self) -> Tensor:
        """Σ over blocks of the mean squared entries of KKᵀ − I, AAᵀ − I and PPᵀ − I over all components so far."""
        total = torch.zeros((), device=self.head.weight.device)
        for part in (self.keys, self.attention, self.prompts):
            rows = joined(part)
            gram = rows @ rows.transpose(1, 2)
            total = total + (gram - torch.eye(rows.shape[1], device=rows.device)).square().mean(dim=(1, 2)).sum()
        return total

    def usage(self, query: Tensor) -> Tensor:
        return self.weights(query).abs().mean(0)


def joined(parts: nn.ParameterList) -> Tensor:
    """The components of all tasks, [blocks, components, ...]."""
    return torch.cat(list(parts), dim=1)


def orthogonal_rows(old: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The authors' Gram–Schmidt start: unit rows, each drawn from N(0, I) minus its projections on the rows before it.

    Args:
        old: Trained rows, [s, d]. They are not orthogonal to one another; as in the authors' code the projection on
            each of them is subtracted, not the projection on their span.
        count: Number of new rows.
        generator: Random generator.

    Returns:
        The new rows, [count, d].
    """
    rows = old.double()
    for _ in range(count):
        for _attempt in range(10):
            v = torch.randn(old.shape[1], generator=generator, dtype=torch.float64)
            u = v - (rows @ v / rows.square().sum(1).clamp(min=1e-12)) @ rows
            if u.square().sum() >= 1e-8:
                break
        else:  # with as many rows as dimensions no orthogonal direction is left: use a random one
            u = v
        rows = torch.cat([rows, u[None]])
    return F.normalize(rows[len(old) :], dim=1).to(old.dtype)
