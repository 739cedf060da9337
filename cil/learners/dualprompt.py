"""DualPrompt: prefixes shared by all tasks, and one set of prefixes per task, selected by key at test."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.views import require_views
from cil.backbone.vit import attention_width
from cil.errors import BackboneError
from cil.learner import Context
from cil.learners.bases.prompting import PromptLearner, PromptRecipe, draw_uniform, similarity
from cil.stream import Task
from cil.tuning import ExternalPrefix
from cil.tuning.blocks import chosen_blocks


class DualPrompt(PromptLearner):
    """DualPrompt (Wang et al., arXiv 2204.04799).

    G-prompts are prefixes in the first blocks and are trained on every task. Task t has E-prompts E_t, prefixes in
    further blocks, and one key K_t ∈ [F] for all these blocks. E_t starts as a copy of E_{t−1} and is trained on task t
    only, with every image of the task: L = CE − λ · mean_b cos(q_b, K_t). At test an image uses E_k with
    k = argmax cos(q, K_k). The number of tasks need not be known in advance. Two passes per image.
    """

    class Config(PromptRecipe):
        epochs: int = Field(5, gt=0, description="epochs per task")
        train_batch_size: int = Field(24, gt=0, description="images per optimiser step")
        lr: float = Field(0.0028125, gt=0, description="learning rate")
        clip: float | None = Field(1.0, gt=0, description="largest gradient norm")
        general_length: NonNegativeInt = Field(
            5, description="rows of the shared prefix per block: as many keys and as many values"
        )
        general_blocks: list[NonNegativeInt] = Field([0, 1], description="indices of the blocks with the shared prefix")
        expert_length: NonNegativeInt = Field(
            5, description="rows of a task's prefix per block: as many keys and as many values"
        )
        expert_blocks: list[NonNegativeInt] = Field(
            [2, 3, 4], description="indices of the blocks with the tasks' prefixes"
        )
        init: float = Field(
            1.0, gt=0, description="bound > 0 of the uniform distribution that prompts and keys start from"
        )
        pull: float = Field(1.0, ge=0, description="weight λ ≥ 0 of the term that pulls a task's key to its queries")

    name = "dualprompt"
    summary = "one shared prefix and one per task, selected per image by nearest key"
    trains = "prefixes, keys, head"
    paper = "Wang et al., DualPrompt: Complementary Prompting, ECCV 2022, arXiv 2204.04799"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        require_views(backbone.model)
        chosen_blocks(backbone.model, config.general_blocks)
        chosen_blocks(backbone.model, config.expert_blocks)
        both = sorted(set(config.general_blocks) & set(config.expert_blocks))
        if both:
            raise BackboneError(f"general_blocks and expert_blocks both name {both}; give each block to one of them")
        width = attention_width(backbone.model)
        # blocks × (key, value) × length × attention width
        self.general = nn.Parameter(torch.empty(len(config.general_blocks), 2, config.general_length, width))
        self._expert_shape = len(config.expert_blocks), 2, config.expert_length, width
        self.experts = nn.ParameterList()
        self.keys = nn.ParameterList()
        draw_uniform([self.general], config.init, torch.Generator().manual_seed(0))

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        key, expert = torch.empty(self.backbone.feature_dim), torch.empty(self._expert_shape)
        if task.index == 0:
            draw_uniform([self.general, expert], self.config.init, ctx.generator)
        else:
            expert.copy_(self.experts[-1].detach())
        draw_uniform([key], self.config.init, ctx.generator)
        for slots, new in ((self.keys, key), (self.experts, expert)):
            slots.append(nn.Parameter(new.to(ctx.device), requires_grad=False))

    def trained(self) -> list[nn.Parameter]:
        return [self.general, self.experts[-1], self.keys[-1]]

    def match(self, query: Tensor) -> Tensor:
        """The task whose key is nearest to each query [B, F], int64 [B]."""
        return similarity(query, torch.stack(list(self.keys))).argmax(1)

    def tuner(self, query: Tensor) -> ExternalPrefix:
        if not len(self.keys):
            return self._prefixes(None)
        return self._prefixes(torch.stack(list(self.experts))[self.match(query)])

    def training_tuner(self, query: Tensor) -> tuple[ExternalPrefix, Tensor]:
        pulled = similarity(query, self.keys[-1][None]).mean()
        return self._prefixes(self.experts[-1]), -self.config.pull * pulled

    def usage(self, query: Tensor) -> Tensor:
        return F.one_hot(self.match(query), len(self.keys))

    def _prefixes(self, experts: Tensor | None) -> ExternalPrefix:
        """``experts``: [blocks, 2, L, A] for all images, [B, blocks, 2, L, A], or None before the first task."""
        prefixes = {block: (p[0], p[1]) for block, p in zip(self.config.general_blocks, self.general, strict=True)}
        if experts is not None:
            for i, block in enumerate(self.config.expert_blocks):
                prefixes[block] = experts[..., i, 0, :, :], experts[..., i, 1, :, :]
        return ExternalPrefix(prefixes)
