"""How a learner is trained: the hyper-parameters that every training shares."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from cil.learner import LearnerConfig

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["cosine", "quarter_cosine", "constant", "multistep"]
Per = Literal["step", "epoch"]
Softmax = Literal["global", "local"]
"""Classes in the softmax: all seen, or the task's own."""


class Recipe(LearnerConfig):
    """How a learner is trained. A learner's ``Config`` that derives from it has all of these keys."""

    epochs: PositiveInt = Field(5, description="epochs per task")
    train_batch_size: PositiveInt = Field(64, description="images per optimiser step, over all processes")
    optimizer: Optimizer = Field("sgd", description="optimiser: SGD with momentum, Adam or AdamW")
    lr: float = Field(0.01, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty (SGD, Adam) or decoupled decay (AdamW)")
    schedule: Schedule = Field(
        "cosine",
        description="learning-rate schedule; cosine: decay to 0 over the stage; quarter_cosine: decay along a quarter "
        "of the wave, to 0.016 of the peak; multistep: a tenth of the rate after each milestone",
    )
    milestones: list[PositiveInt] = Field([], description="epochs at which a multistep schedule lowers the rate")
    schedule_per: Per = Field("step", description="interval at which the rate changes")
    warmup: float = Field(0.0, ge=0, lt=1, description="fraction of the steps in which the rate rises linearly")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target that is spread over all classes")
    clip: float | None = Field(None, gt=0, description="largest gradient norm; null: no clipping")
    micro_batch_size: PositiveInt | None = Field(
        None,
        description="images per forward pass; gradients are accumulated over the batch. Default: the whole batch",
    )

    @model_validator(mode="after")
    def _milestones(self) -> Recipe:
        if (self.schedule == "multistep") != bool(self.milestones):
            raise ValueError("schedule: multistep and milestones go together, e.g. milestones: [18]")
        return self


def check_whole_steps(recipe: Recipe, weight: str, off: str = "0") -> None:
    """Refuse micro-batches in a ``Config`` whose key ``weight`` is the weight of a loss that compares all images of a
    step; its value ``off`` turns the loss off.

    Raises:
        ValueError: Both are set.
    """
    if recipe.micro_batch_size is not None and getattr(recipe, weight):
        raise ValueError(
            f"micro_batch_size: {recipe.micro_batch_size}; {weight} compares all images of a step with one another, so "
            f"leave it out and lower train_batch_size if memory is short, or set {weight}: {off}"
        )
