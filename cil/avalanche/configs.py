"""Avalanche's strategies by name, with the hyper-parameters of their constructors. Avalanche is not imported here.

``strategy: LwF`` and ``strategy: {name: LwF, alpha: 2}`` are both a :data:`StrategyConfig`. Names and defaults are
Avalanche's (a test compares them with its signatures); a hyper-parameter without a default there has one here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt, model_validator

from cil.config import Section, as_section


class NaiveConfig(Section):
    """Plain fine-tuning, without any means against forgetting."""

    name: Literal["Naive"] = "Naive"


class EWCConfig(Section):
    """λ Σ_i F_i (θ_i − θ*_i)² with F the mean over batches of the squared gradient of the batch's loss (1612.00796)."""

    name: Literal["EWC"] = "EWC"
    ewc_lambda: NonNegativeFloat = Field(1000.0, description="factor λ on the penalty")
    mode: Literal["separate", "online"] = Field(
        "separate", description="penalties: one for every old task, or a single one with F ← decay_factor · F + F_new"
    )
    decay_factor: NonNegativeFloat | None = Field(None, description="decay of F; required by mode: online, else unset")
    keep_importance_data: bool = Field(False, description="whether mode: online stores old importances, without use")

    @model_validator(mode="after")
    def _decay(self) -> EWCConfig:
        if (self.mode == "online") != (self.decay_factor is not None):
            raise ValueError("mode: online and decay_factor go together, e.g. {mode: online, decay_factor: 0.9}")
        return self


class LwFConfig(Section):
    """α KL(p_old ‖ p) over old classes at temperature τ, p_old from the model before the task (1606.09282)."""

    name: Literal["LwF"] = "LwF"
    alpha: NonNegativeFloat = Field(1.0, description="factor α on the distillation loss")
    temperature: float = Field(2.0, gt=0, description="temperature τ of the softmax")


class MASConfig(Section):
    """λ Σ_i Ω_i (θ_i − θ*_i)², Ω_i the mean magnitude of the gradient of ‖logits‖² (1711.09601)."""

    name: Literal["MAS"] = "MAS"
    lambda_reg: NonNegativeFloat = Field(1.0, description="factor λ on the penalty")
    alpha: float = Field(0.5, ge=0, le=1, description="weight of old importances: Ω ← α Ω + (1 − α) Ω_new")


class Chooses(Section):
    """A strategy whose memory may be chosen by herding; ``selection`` is ours, and no parameter of Avalanche's."""

    selection: Literal["random", "herding"] = Field(
        "random",
        description="choice of the kept images; herding: equally many per class, the first ones in an order in which "
        "every beginning has a mean close to that of the class (iCaRL)",
    )


class ReplayConfig(Chooses):
    """Every batch has as many images from a memory as new ones; a random memory has equally many of each task."""

    name: Literal["Replay"] = "Replay"
    mem_size: PositiveInt = Field(200, description="images kept in memory (total)")


class DERConfig(Chooses):
    """DER++: α MSE to the logits stored with each kept image, β CE on its label (2004.07211)."""

    name: Literal["DER"] = "DER"
    mem_size: PositiveInt = Field(200, description="images kept in memory (total), equally many per class")
    batch_size_mem: PositiveInt | None = Field(None, description="replayed images per step; default: as many as new")
    alpha: NonNegativeFloat = Field(0.1, description="factor α on the loss for stored logits")
    beta: NonNegativeFloat = Field(0.5, description="factor β on the loss for labels of replayed images; 0: DER")


class ERACEConfig(Chooses):
    """Experience replay in which the softmax for new images is over new classes only (2104.05025)."""

    name: Literal["ER_ACE"] = "ER_ACE"
    mem_size: PositiveInt = Field(200, description="images kept in memory (total), equally many per class")
    batch_size_mem: PositiveInt = Field(10, description="replayed images per step")


class AGEMConfig(Section):
    """A gradient that opposes the average gradient on the memory is projected to be orthogonal to it (1812.00420)."""

    name: Literal["AGEM"] = "AGEM"
    patterns_per_exp: PositiveInt = Field(50, description="images kept in memory per task")
    sample_size: PositiveInt = Field(64, description="images from memory per step, equally many per task")


class ICaRLConfig(Section):
    """Sigmoid outputs with distillation of old ones; herding; nearest mean of exemplars as classifier (1611.07725)."""

    name: Literal["ICaRL"] = "ICaRL"
    memory_size: PositiveInt = Field(
        200, description="images kept in memory: total (at least one per class), or per class"
    )
    fixed_memory: bool = Field(True, description="whether memory_size is the total for all classes")


REFUSED = {
    "BiC": "Avalanche 0.6 fails in its second stage (it assigns to experience.dataset, which has no setter)",
    "Cumulative": "use the learner joint, which trains on all images so far",
    "GDumb": "it resets the model to its initial state, whose head has only the first task's classes; the learner "
    "joint starts from scratch at every task",
    "GEM": "it keeps augmented pixels and needs a quadratic solver that does not come with Avalanche; AGEM is its "
    "successor",
    "GSS_greedy": "Avalanche 0.6 fails at the second batch, when the memory has fewer images than a batch",
    "JointTraining": "use the learner joint, which trains on all images so far",
    "LearningToPrompt": "the ViT of Avalanche 0.6 cannot be built with timm 1; the learner l2p is the same method",
    "SynapticIntelligence": "on a CPU Avalanche 0.6 compares weights with views of themselves, so it finds no change "
    "and equals Naive; MAS and EWC also weight parameters by importance",
}
"""Avalanche's strategies that are not supported here, with the reasons."""

FREE = (NaiveConfig, EWCConfig, LwFConfig, MASConfig)
STORING = (ReplayConfig, DERConfig, ERACEConfig, AGEMConfig, ICaRLConfig)
FreeSection = NaiveConfig | EWCConfig | LwFConfig | MASConfig
StoringSection = ReplayConfig | DERConfig | ERACEConfig | AGEMConfig | ICaRLConfig
StrategySection = FreeSection | StoringSection


def _refusing(reasons: dict[str, str]) -> Callable[[Any], Any]:
    """:func:`as_section`, which also refuses known names of other kinds, with the reason of each."""

    def check(raw: Any) -> Any:
        raw = as_section(raw)
        name = raw.get("name") if isinstance(raw, dict) else None
        if name in reasons:
            raise ValueError(f"{name}: {reasons[name]}")
        return raw

    return check


def _of(sections: tuple[type[Section], ...], why: str) -> dict[str, str]:
    return {section.model_fields["name"].default: why for section in sections}


StrategyConfig = Annotated[
    Annotated[FreeSection, Field(discriminator="name")],
    BeforeValidator(_refusing(REFUSED | _of(STORING, "it keeps old images; use the learner avalanche_replay"))),
]
"""A strategy that keeps no images."""
StoringStrategyConfig = Annotated[
    Annotated[StoringSection, Field(discriminator="name")],
    BeforeValidator(_refusing(REFUSED | _of(FREE, "it keeps no images; use the learner avalanche"))),
]
"""A strategy that keeps old images."""
