"""L2P: a pool of prompts; each image uses the prompts whose keys are nearest to its query."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.views import require_views
from cil.learner import Context
from cil.learners.bases.prompting import PromptLearner, PromptRecipe, draw_uniform, similarity
from cil.stream import Task
from cil.tuning import PooledPrompts


class L2P(PromptLearner):
    """L2P: learning to prompt (Wang et al., arXiv 2112.08654).

    There is one pool of M prompts P_m ∈ [L, D], each with a key K_m ∈ [F], for all tasks. An image uses the N prompts
    whose keys have the largest cosine with its query: their N·L tokens are inserted between class token and patches,
    and the mean of their outputs is the feature. All tasks train the pool, its keys and the head with
    L = CE − λ · mean_b Σ_{m used by b} cos(q_b, K_m). Two passes per image, in training and at test.
    """

    class Config(PromptRecipe):
        epochs: int = Field(5, gt=0, description="epochs per task")
        train_batch_size: int = Field(16, gt=0, description="images per optimiser step")
        lr: float = Field(0.001875, gt=0, description="learning rate")
        clip: float | None = Field(1.0, gt=0, description="largest gradient norm")
        pool: PositiveInt = Field(10, description="number M of prompts in the pool")
        length: NonNegativeInt = Field(5, description="tokens L per prompt; 0: the frozen features")
        top: PositiveInt = Field(5, description="prompts N per image, at most M")
        pull: float = Field(0.1, ge=0, description="weight λ ≥ 0 of the term that pulls selected keys to their queries")
        init: float = Field(
            1.0, gt=0, description="bound > 0 of the uniform distribution that prompts and keys start from"
        )
        vote: bool = Field(
            False,
            description="whether the images of a training batch vote on one selection, as in the authors' code; at "
            "test each image has its own selection",
        )

        @model_validator(mode="after")
        def _top(self) -> Any:
            if self.top > self.pool:
                raise ValueError(
                    f"top: {self.top} prompts per image, but pool has {self.pool}; lower top or raise pool"
                )
            return self

    name = "l2p"
    summary = "prompts from a pool, selected per image by nearest key"
    trains = "prompts, keys, head"
    paper = "Wang et al., Learning to Prompt for Continual Learning, CVPR 2022, arXiv 2112.08654"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        require_views(backbone.model)
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
        """Indices of the N prompts nearest to each query [B, F], int64 [B, N]."""
        return similarity(query, self.keys).topk(self.config.top, dim=1).indices

    def vote(self, indices: Tensor) -> Tensor:
        """The N most frequent indices in [B, N], repeated for every image, [B, N]; ties go to the lower index."""
        frequency = torch.bincount(indices.flatten(), minlength=self.config.pool)
        winners = frequency.argsort(descending=True, stable=True)[: self.config.top]
        return winners.expand(len(indices), -1)

    def tuner(self, query: Tensor) -> PooledPrompts:
        return self._prompts(self.choose(query))

    def training_tuner(self, query: Tensor) -> tuple[PooledPrompts, Tensor]:
        indices = self.choose(query)
        if self.config.vote:
            indices = self.vote(indices)
        similarities = similarity(query, self.keys).gather(1, indices).sum(1).mean()
        return self._prompts(indices), -self.config.pull * similarities

    def usage(self, query: Tensor) -> Tensor:
        return F.one_hot(self.choose(query), self.config.pool).sum(1)

    def _prompts(self, indices: Tensor) -> PooledPrompts:
        return PooledPrompts(self.backbone, self.prompts[indices].flatten(1, 2))
