"""L2-SP: weight decay towards the pre-trained weights instead of towards zero."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from cil.learners.bases.anchor import Anchor
from cil.learners.finetune import Finetune
from cil.training import Optimizer


class L2SP(Finetune):
    """Fine-tuning of all weights with a penalty on the distance to the pre-trained ones (Li et al., arXiv 1802.01483).

    L = CE(f_θ(x) Wᵀ + b, y) + α/2 ‖θ − θ_0‖² + β/2 (‖W‖² + ‖b‖²). θ_0 are the pre-trained weights in every task, unlike
    EWC, whose penalty refers to the previous task. It is ``finetune`` with ``anchor: l2``, with another default
    optimiser: SGD, as in the paper. Under Adam or AdamW the penalty stays in the loss, where they rescale it for each
    weight.
    """

    class Config(Finetune.Config):
        optimizer: Optimizer = Field("sgd", description="optimiser: SGD with momentum, Adam or AdamW")
        lr: float = Field(0.01, gt=0, description="peak learning rate of backbone and head")
        alpha: float = Field(0.1, ge=0, description="weight α ≥ 0 of the distance to the pre-trained weights")
        beta: float = Field(0.01, ge=0, description="weight β ≥ 0 of the squared norm of the head")

        @model_validator(mode="after")
        def _own_anchor(self) -> Any:
            if self.anchor is not None:
                raise ValueError("anchor: alpha and beta are the anchor of l2_sp; leave it out, or use finetune")
            return self

    name = "l2_sp"
    summary = "fine-tuning with a penalty on the distance to the pre-trained weights"
    trains = "all weights, head"
    decoupled = False
    paper = (
        "Li, Grandvalet and Davoine, Explicit Inductive Bias for Transfer Learning with Convolutional Networks, "
        "ICML 2018, arXiv 1802.01483"
    )

    @property
    def anchor(self) -> Anchor:
        return Anchor(norm="l2", to="pretrained", alpha=self.config.alpha, beta=self.config.beta)
