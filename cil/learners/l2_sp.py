"""L2-SP: weight decay towards the pre-trained weights instead of towards zero."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from cil.learner import Context
from cil.learners.finetune import Finetune
from cil.stream import TaskData
from cil.training import Optimizer, ParamGroup, cross_entropy, fit


class L2SP(Finetune):
    """Fine-tuning of all weights with a penalty on the distance to the pre-trained ones (Li et al., arXiv 1802.01483).

    L = CE(f_θ(x) Wᵀ + b, y) + α/2 ‖θ − θ_0‖² + β/2 (‖W‖² + ‖b‖²). θ_0 are the pre-trained weights in every task, unlike
    EWC, whose penalty refers to the previous task. Everything else is as in ``finetune``; nothing is kept but the
    weights. The optimiser is SGD, as in the paper; Adam would rescale the penalty for each weight.
    """

    class Config(Finetune.Config):
        optimizer: Optimizer = Field("sgd", description="optimiser: SGD with momentum, Adam or AdamW")
        lr: float = Field(0.01, gt=0, description="peak learning rate of backbone and head")
        alpha: float = Field(0.1, ge=0, description="weight α ≥ 0 of the distance to the pre-trained weights")
        beta: float = Field(0.01, ge=0, description="weight β ≥ 0 of the squared norm of the head")

    name = "l2_sp"
    summary = "fine-tuning with a penalty on the distance to the pre-trained weights"
    trains = "all weights, head"
    paper = (
        "Li, Grandvalet and Davoine, Explicit Inductive Bias for Transfer Learning with Convolutional Networks, "
        "ICML 2018, arXiv 1802.01483"
    )

    def train_on(self, data: TaskData, first: int, ctx: Context) -> None:
        ce = cross_entropy(lambda images: self.logits(self.tuned(images)), self.config, first)

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            value, logits = ce(images, labels)
            return value + self.penalty(), logits

        fit(loss, [ParamGroup(self.tuner.parameters()), ParamGroup(self.head.parameters())], data, self.config, ctx)

    def penalty(self) -> Tensor:
        """α/2 ‖θ − θ_0‖² + β/2 (‖W‖² + ‖b‖²), a scalar."""
        start = dict(self.backbone.model.named_parameters())
        distance = sum((weight - start[name]).square().sum() for name, weight in self.tuner.weights().items())
        head = sum(p.square().sum() for p in self.head.parameters())
        return self.config.alpha / 2 * distance + self.config.beta / 2 * head
