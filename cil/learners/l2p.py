"""L2P: a pool of prompts, the few whose keys are nearest to the image's query."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.learner import Context
from cil.learners.prompting import PromptLearner, PromptRecipe, draw_uniform, similarity
from cil.stream import Task
from cil.tuning import PooledPrompts
from cil.vit import require_plain_vit


class L2P(PromptLearner):
    """L2P: learning to prompt (Wang et al., arXiv 2112.08654).

    A pool of M prompts P_m ∈ [L, D], each with a key K_m ∈ [F]. An image takes the N prompts whose keys have the
    largest cosine with its query; their N·L tokens go between class token and patches, and the mean of their outputs
    is the feature. L = CE − λ · mean_b Σ_{m ∈ chosen(b)} cos(q_b, K_m). Two passes per image, in training and at test.
    """

    class Config(PromptRecipe):
        epochs: int = Field(5, gt=0, description="passes over each task")
        train_batch_size: int = Field(16, gt=0, description="images an optimiser step")
        lr: float = Field(0.001875, gt=0, description="learning rate")
        clip: float | None = Field(1.0, gt=0, description="largest gradient norm")
        pool: PositiveInt = Field(10, description="prompts M in the pool")
        length: NonNegativeInt = Field(5, description="tokens L a prompt; 0: the frozen features")
        top: PositiveInt = Field(5, description="prompts N an image takes")
        pull: float = Field(0.1, ge=0, description="weight λ of the term that pulls chosen keys to their queries")
        init: float = Field(1.0, gt=0, description="prompts and keys are drawn from U(−init, init)")
        vote: bool = Field(
            False,
            description="in training, let the images computed at once vote for one choice, as the authors do; at test "
            "every image chooses for itself",
        )

        @model_validator(mode="after")
        def _top(self) -> Any:
            if self.top > self.pool:
                raise ValueError(f"top: {self.top} prompts of a pool of {self.pool}; lower top or raise pool")
            return self

    name = "l2p"
    paper = "Wang et al., Learning to Prompt for Continual Learning, CVPR 2022, arXiv 2112.08654"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        require_plain_vit(backbone.model)
        width: Any = backbone.model.embed_dim
        self.keys = nn.Parameter(torch.empty(config.pool, backbone.feature_dim))
        self.prompts = nn.Parameter(torch.empty(config.pool, config.length, width))
        draw_uniform(self.trained(), self.config.init, torch.Generator().manual_seed(0))

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index == 0:
            draw_uniform(self.trained(), self.config.init, ctx.generator)

    def trained(self) -> list[nn.Parameter]:
        return [self.keys, self.prompts]

    def choose(self, query: Tensor) -> Tensor:
        """The N prompts nearest to each query [B, F]: their numbers, int64 [B, N]."""
        return similarity(query, self.keys).topk(self.config.top, dim=1).indices

    def vote(self, chosen: Tensor) -> Tensor:
        """The N numbers most frequent in [B, N], for every image, [B, N]; of equally frequent ones the lowest."""
        frequency = torch.bincount(chosen.flatten(), minlength=self.config.pool)
        winners = frequency.argsort(descending=True, stable=True)[: self.config.top]
        return winners.expand(len(chosen), -1)

    def tuner(self, query: Tensor) -> PooledPrompts:
        return self._prompts(self.choose(query))

    def training_tuner(self, query: Tensor) -> tuple[PooledPrompts, Tensor]:
        chosen = self.choose(query)
        if self.config.vote:
            chosen = self.vote(chosen)
        pulled = similarity(query, self.keys).gather(1, chosen).sum(1).mean()
        return self._prompts(chosen), -self.config.pull * pulled

    def usage(self, query: Tensor) -> Tensor:
        return F.one_hot(self.choose(query), self.config.pool).sum(1)

    def _prompts(self, chosen: Tensor) -> PooledPrompts:
        return PooledPrompts(self.backbone, self.prompts[chosen].flatten(1, 2))
