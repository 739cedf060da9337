"""Avalanche's strategies by name, with the hyper-parameters of their constructors; does not import Avalanche.

``strategy: LwF`` and ``strategy: {name: LwF, alpha: 2}`` are both a :data:`StrategyConfig`. Names and defaults are
Avalanche's (a test compares them with its signatures); where Avalanche has no default, ours is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt, model_validator

from cil.config import Section, named


class NaiveConfig(Section):
    """Fine-tuning and nothing else."""

    name: Literal["Naive"] = "Naive"


class EWCConfig(Section):
    """λ Σ_i F_i (θ_i − θ*_i)² with F the mean over batches of the squared gradient of the batch's loss (1612.00796)."""

    name: Literal["EWC"] = "EWC"
    ewc_lambda: NonNegativeFloat = Field(1000.0, description="λ")
    mode: Literal["separate", "online"] = Field(
        "separate", description="a penalty for every old task, or one with F ← decay_factor · F + F_new"
    )
    decay_factor: NonNegativeFloat | None = Field(None, description="of online EWC; goes with mode: online")
    keep_importance_data: bool = Field(False, description="online: keep all old importances, without using them")

    @model_validator(mode="after")
    def _decay(self) -> EWCConfig:
        if (self.mode == "online") != (self.decay_factor is not None):
            raise ValueError("mode: online and decay_factor go together, e.g. {mode: online, decay_factor: 0.9}")
        return self


class LwFConfig(Section):
    """α KL(p_old ‖ p) over old classes at temperature τ, p_old from the model before the task (1606.09282)."""

    name: Literal["LwF"] = "LwF"
    alpha: NonNegativeFloat = Field(1.0, description="α")
    temperature: float = Field(2.0, gt=0, description="τ")


class MASConfig(Section):
    """λ Σ_i Ω_i (θ_i − θ*_i)², Ω_i the mean size of the gradient of ‖logits‖² (1711.09601)."""

    name: Literal["MAS"] = "MAS"
    lambda_reg: NonNegativeFloat = Field(1.0, description="λ")
    alpha: float = Field(0.5, ge=0, le=1, description="Ω ← α Ω + (1 − α) Ω_new")


class ReplayConfig(Section):
    """Every batch is as many new images again from a memory drawn at random from the tasks, in equal parts."""

    name: Literal["Replay"] = "Replay"
    mem_size: PositiveInt = Field(200, description="images kept")


class DERConfig(Section):
    """DER++: α MSE to the logits stored with each kept image, β CE on its label (2004.07211)."""

    name: Literal["DER"] = "DER"
    mem_size: PositiveInt = Field(200, description="images kept, in equal parts for the classes")
    batch_size_mem: PositiveInt | None = Field(None, description="kept images a step; default: as many as new ones")
    alpha: NonNegativeFloat = Field(0.1, description="α")
    beta: NonNegativeFloat = Field(0.5, description="β; 0 is DER")


class ERACEConfig(Section):
    """Experience replay with an asymmetric softmax: new images see new classes only (2104.05025)."""

    name: Literal["ER_ACE"] = "ER_ACE"
    mem_size: PositiveInt = Field(200, description="images kept, in equal parts for the classes")
    batch_size_mem: PositiveInt = Field(10, description="kept images a step")


class AGEMConfig(Section):
    """A gradient that points against the memory's average gradient loses that part (1812.00420)."""

    name: Literal["AGEM"] = "AGEM"
    patterns_per_exp: PositiveInt = Field(50, description="images kept of every task")
    sample_size: PositiveInt = Field(64, description="kept images a step, in equal parts for the tasks")


class ICaRLConfig(Section):
    """Sigmoid outputs, old ones distilled; exemplars by herding; nearest mean of exemplars decides (1611.07725)."""

    name: Literal["ICaRL"] = "ICaRL"
    memory_size: PositiveInt = Field(
        200, description="images kept: in all (but one a class at least), or of every class"
    )
    fixed_memory: bool = Field(True, description="whether memory_size is for all classes together")


REFUSED = {
    "BiC": "Avalanche 0.6 stops in its second stage (it assigns to experience.dataset, which has no setter)",
    "Cumulative": "the learner joint trains on all images so far",
    "GDumb": "it puts the model back to its first state, whose head has the first task's classes only; the learner "
    "joint starts over at every task",
    "GEM": "it keeps augmented pixels and needs a quadratic solver that does not come with Avalanche; AGEM is its "
    "successor",
    "GSS_greedy": "Avalanche 0.6 stops at the second batch, before the memory holds as many images as a batch",
    "JointTraining": "the learner joint trains on all images so far",
    "LearningToPrompt": "Avalanche 0.6's own ViT does not build with timm 1; the learner l2p is the same method",
    "SynapticIntelligence": "on a CPU Avalanche 0.6 compares weights with views of themselves, finds that none has "
    "moved, and is Naive; MAS and EWC weigh parameters, too",
}
"""Strategies that Avalanche has and that are not run here: why."""

FREE = (NaiveConfig, EWCConfig, LwFConfig, MASConfig)
STORING = (ReplayConfig, DERConfig, ERACEConfig, AGEMConfig, ICaRLConfig)
FreeSection = NaiveConfig | EWCConfig | LwFConfig | MASConfig
StoringSection = ReplayConfig | DERConfig | ERACEConfig | AGEMConfig | ICaRLConfig
StrategySection = FreeSection | StoringSection


def _named(elsewhere: dict[str, str]) -> Callable[[Any], Any]:
    """:func:`named`, and a refusal that says why of names that are known but not of this kind."""

    def check(raw: Any) -> Any:
        raw = named(raw)
        name = raw.get("name") if isinstance(raw, dict) else None
        if name in elsewhere:
            raise ValueError(f"{name}: {elsewhere[name]}")
        return raw

    return check


def _of(sections: tuple[type[Section], ...], why: str) -> dict[str, str]:
    return {section.model_fields["name"].default: why for section in sections}


StrategyConfig = Annotated[
    Annotated[FreeSection, Field(discriminator="name")],
    BeforeValidator(_named(REFUSED | _of(STORING, "it keeps old images; use the learner avalanche_replay"))),
]
"""A strategy that keeps no images."""
StoringStrategyConfig = Annotated[
    Annotated[StoringSection, Field(discriminator="name")],
    BeforeValidator(_named(REFUSED | _of(FREE, "it keeps no images; use the learner avalanche"))),
]
"""A strategy that keeps old images."""
