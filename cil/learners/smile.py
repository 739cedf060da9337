"""SMILE: one low-rank expert per task in every linear layer, chosen for each token by the token itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from cil.backbone import Backbone
from cil.learners.bases.banked import BankedRecipe, experts_of
from cil.learners.bases.merged_space import require_weights
from cil.learners.merge import Merge
from cil.merging import ExpertBank
from cil.tuning.token_experts import TokenExperts


class Smile(Merge):
    """SMILE: zero-shot sparse mixture of low-rank experts (Tang et al., arXiv 2408.10174), with one classifier.

    Tasks are trained as in ``merge``, and their updates are kept at their rank (:class:`cil.merging.ExpertBank`). In
    every linear layer each token takes the ``top`` experts in whose first ``directions`` input directions it has most
    energy (:class:`cil.tuning.token_experts.TokenExperts`); all other weights are the pre-trained ones. Nothing is
    trained for the choice. The features φ_T are those of one pass, so the classifier and the correction of old
    statistics are those of ``merge``. Keeps the bank, which grows with every task.
    """

    class Config(BankedRecipe, Merge.Config):
        rule: Literal["bank"] = Field("bank", description="always bank: every task's update is kept")  # type: ignore[assignment]
        start: Literal["pretrained"] = Field("pretrained", description="always pretrained: tasks are experts of θ_0")
        head: Literal["ncm", "lda", "ridge"] = Field(
            "lda", description="classifier: class means, LDA, or ridge regression"
        )
        directions: PositiveInt = Field(4, description="input directions of each expert that a token is measured in")
        top: PositiveInt = Field(1, description="experts per token")

    name = "smile"
    summary = "one low-rank expert per task in every layer, chosen for each token"
    trains = "one tuner per task"
    paper = "Tang et al., SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction, 2408.10174"

    rule: ExpertBank

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        require_weights(self.name, self.models, "a bank keeps updates of weights")

    def make_rule(self) -> ExpertBank:
        return ExpertBank(self.config.max_rank, self.config.dtype)

    def make_tuner(self) -> TokenExperts:
        return TokenExperts(self.backbone, experts_of(self.rule), self.config.directions, self.config.top)
