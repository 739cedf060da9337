"""L2-SP: decay towards the pre-trained weights instead of towards zero."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from cil.learner import Context
from cil.learners.finetune import Finetune
from cil.stream import TaskData
from cil.training import Group, Optimizer, cross_entropy, fit


class L2SP(Finetune):
    """Fine-tuning of every weight with a penalty on the way from the pre-trained ones (Li et al., arXiv 1802.01483).

    L = CE(f_θ(x) Wᵀ + b, y) + α/2 ‖θ − θ_0‖² + β/2 (‖W‖² + ‖b‖²), θ_0 being the pre-trained weights at every task: the
    penalty looks back to the start, not to the last task as EWC's. Everything else is ``finetune``; nothing is kept
    but the weights. The paper's SGD: under Adam the penalty would be rescaled weight by weight.
    """

    class Config(Finetune.Config):
        optimizer: Optimizer = Field("sgd", description="SGD with momentum, Adam or AdamW")
        lr: float = Field(0.01, gt=0, description="peak learning rate, of backbone and head")
        alpha: float = Field(0.1, ge=0, description="α, towards the pre-trained weights")
        beta: float = Field(0.01, ge=0, description="β, of the head towards zero")

    name = "l2_sp"
    paper = (
        "Li, Grandvalet and Davoine, Explicit Inductive Bias for Transfer Learning with Convolutional Networks, "
        "ICML 2018, arXiv 1802.01483"
    )

    def train_on(self, data: TaskData, first: int, ctx: Context) -> None:
        fitted = cross_entropy(lambda images: self.logits(self.features(images)), self.config, first)

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            value, logits = fitted(images, labels)
            return value + self.penalty(), logits

        fit(loss, [Group(self.tuner.parameters()), Group(self.head.parameters())], data, self.config, ctx)

    def penalty(self) -> Tensor:
        """α/2 ‖θ − θ_0‖² + β/2 (‖W‖² + ‖b‖²), a scalar."""
        start = dict(self.backbone.model.named_parameters())
        away = sum((weight - start[name]).square().sum() for name, weight in self.tuner.weights().items())
        head = sum(p.square().sum() for p in self.head.parameters())
        return self.config.alpha / 2 * away + self.config.beta / 2 * head
