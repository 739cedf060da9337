"""The configuration of every rule and finaliser by name, and the function that builds a rule from it.

``rule: opcm`` and ``rule: {name: opcm, alpha: 0.3, finalisers: [{name: lines, alpha: 0.5}]}`` are both a
:data:`RuleConfig`, and so is a custom rule, ``rule: {class: "mine.py:Mine", scale: 0.5}``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from cil.config import Section, as_section
from cil.config.plugins import CustomObject, as_custom
from cil.config.reading import validated
from cil.merging.bank import StoredDtype
from cil.merging.base import Rule
from cil.merging.consensus import Consensus
from cil.merging.dare import DARE, DareTIES
from cil.merging.finalisers import Finaliser, LiNeS, NormMatching
from cil.merging.fisher import Fisher
from cil.merging.iso_c import IsoC
from cil.merging.iso_cts import IsoCTS
from cil.merging.linear import EMA, Average, TaskArithmetic, WiseFT
from cil.merging.magmax import MagMax
from cil.merging.nufilt import NUFILT
from cil.merging.opcm import OPCM, Variant
from cil.merging.regmean import GramMerge, RegMean
from cil.merging.ties import TIES, Combination, ContinualTIES, Trim
from cil.merging.tsv_m import TSVM
from cil.merging.wudi import WUDI, Anchor

Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class NormMatchingConfig(Section):
    """Scales the merged update to the tasks' mean norm; see :class:`cil.merging.NormMatching`."""

    name: Literal["norm_matching"] = "norm_matching"
    scale: Positive = Field(1.0, description="norm of the result, in units of the tasks' mean norm")
    cap: bool = Field(False, description="whether only larger updates are scaled")


class LiNeSConfig(Section):
    """Scales the merged update linearly with depth; see :class:`cil.merging.LiNeS`."""

    name: Literal["lines"] = "lines"
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["1/T"] = Field(
        0.5, description="scale of the first block; 1/T: one divided by the number of tasks"
    )
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="additional scale of the last block; default: 1 − alpha"
    )

    @model_validator(mode="after")
    def _slope(self) -> LiNeSConfig:
        if self.beta is None and not isinstance(self.alpha, str) and self.alpha > 1:
            raise ValueError("alpha above 1 needs a beta, since the default 1 − alpha is negative")
        return self


FinaliserSection = NormMatchingConfig | LiNeSConfig
FinaliserConfig = Annotated[Annotated[FinaliserSection, Field(discriminator="name")], BeforeValidator(as_section)]


class _Rule(Section):
    finalisers: list[FinaliserConfig] = Field([], description="finalisers, applied in this order to the merged update")


class AverageConfig(_Rule):
    """Running mean of the models; see :class:`cil.merging.Average`."""

    name: Literal["average"] = "average"


class WiseFTConfig(_Rule):
    """Interpolation of every new model with the merged one; see :class:`cil.merging.WiseFT`."""

    name: Literal["wise_ft"] = "wise_ft"
    alpha: Share = Field(0.5, description="weight of the new model")


class EMAConfig(_Rule):
    """Exponential moving average of the models; see :class:`cil.merging.EMA`."""

    name: Literal["ema"] = "ema"
    alpha: Share = Field(0.5, description="weight of the new model; 1: only the newest counts, 0: only the first")


class TaskArithmeticConfig(_Rule):
    """Scaled sum of the task vectors; see :class:`cil.merging.TaskArithmetic`."""

    name: Literal["task_arithmetic"] = "task_arithmetic"
    scale: Finite = Field(0.3, description="factor on the sum of updates")
    divide: Literal["none", "tasks"] = Field("none", description="divisor of the sum; tasks: the number of tasks")


class TIESConfig(_Rule):
    """TIES-Merging, exact in constant memory; see :class:`cil.merging.TIES`."""

    name: Literal["ties"] = "ties"
    density: float = Field(0.2, gt=0, le=1, description="share of the entries that is kept, by magnitude")
    merge: Combination = Field("sum", description="how entries that agree with the elected sign are combined")
    scale: Finite = Field(0.3, description="factor on the merged update")
    trim: Trim = Field("model", description="unit that density refers to: the flattened model, or each tensor")


class ContinualTIESConfig(_Rule):
    """TIES of the merged and the new update, as published; see :class:`cil.merging.ContinualTIES`."""

    name: Literal["continual_ties"] = "continual_ties"
    density: float = Field(0.2, gt=0, le=1, description="share of the entries that is kept, by magnitude")
    merge: Combination = Field("sum", description="how entries that agree with the elected sign are combined")
    scale: Finite = Field(0.5, description="factor on the merged update of every step")


class MagMaxConfig(_Rule):
    """The largest change of every weight; see :class:`cil.merging.MagMax`."""

    name: Literal["magmax"] = "magmax"
    scale: Finite = Field(0.5, description="factor on the merged update")


class DAREConfig(_Rule):
    """Task arithmetic of updates whose entries are dropped at random; see :class:`cil.merging.DARE`."""

    name: Literal["dare"] = "dare"
    drop: float = Field(0.5, ge=0, lt=1, description="probability that an entry is dropped")
    scale: Finite = Field(0.3, description="factor on the sum of updates")
    divide: Literal["none", "tasks"] = Field("none", description="divisor of the sum; tasks: the number of tasks")
    seed: int = Field(0, ge=0, description="seed of the masks")


class DareTIESConfig(_Rule):
    """TIES with DARE in place of trimming; see :class:`cil.merging.DareTIES`."""

    name: Literal["dare_ties"] = "dare_ties"
    drop: float = Field(0.5, ge=0, lt=1, description="probability that an entry is dropped")
    merge: Combination = Field("sum", description="how entries that agree with the elected sign are combined")
    scale: Finite = Field(0.3, description="factor on the merged update")
    seed: int = Field(0, ge=0, description="seed of the masks")


class FisherConfig(_Rule):
    """Averaging weighted by Fisher information; see :class:`cil.merging.Fisher`."""

    name: Literal["fisher"] = "fisher"
    epsilon: Positive = Field(1e-6, description="constant that is added to the Fisher information")
    normalize: bool = Field(True, description="whether each task's Fisher information is divided by its norm")


class RegMeanConfig(_Rule):
    """Least squares fit to the layer outputs of all tasks; see :class:`cil.merging.RegMean`."""

    name: Literal["regmean"] = "regmean"
    rho: Share = Field(0.95, description="factor on the off-diagonal entries of the Gram matrices")
    ridge: Positive = Field(1e-3, description="ridge penalty, as a multiple of the mean diagonal of the Gram matrices")
    block: PositiveInt | None = Field(None, description="largest width of the diagonal blocks of Gram matrices kept")


class GramMergeConfig(_Rule):
    """RegMean with a depth slope and a capped norm; see :class:`cil.merging.GramMerge`."""

    name: Literal["gram_merge"] = "gram_merge"
    slope: Share = Field(0.5, description="scale of the first block's update; 1: the same for all blocks")
    cap: bool = Field(True, description="whether the norm is capped at the tasks' mean norm")
    rho: Share = Field(0.95, description="factor on the off-diagonal entries of the Gram matrices")
    ridge: Positive = Field(1e-3, description="ridge penalty, as a multiple of the mean diagonal of the Gram matrices")
    block: PositiveInt | None = Field(1024, description="largest width of the diagonal blocks of Gram matrices kept")


class IsoCConfig(_Rule):
    """Merged update with equal singular values; see :class:`cil.merging.IsoC`."""

    name: Literal["iso_c"] = "iso_c"
    scale: Finite = Field(1.0, description="factor on the updates of linear weights")
    split_qkv: bool = Field(True, description="whether query, key and value of a fused weight are separate")
    of: Literal["mean", "sum"] = Field(
        "sum", description="update whose singular values become equal; sum: as published, mean: divided by the tasks"
    )


class _Banked(_Rule):
    max_rank: PositiveInt | None = Field(None, description="largest rank that is kept of an update; null: all of it")
    dtype: StoredDtype | None = Field(None, description="dtype in which updates are kept; null: that of computing")


class IsoCTSConfig(_Banked):
    """Common and task-specific directions with equal singular values; see :class:`cil.merging.IsoCTS`."""

    name: Literal["iso_cts"] = "iso_cts"
    scale: Finite = Field(1.0, description="factor on the updates of linear weights")
    fraction: Share = Field(0.8, description="share of the directions that all tasks have in common")
    split_qkv: bool = Field(True, description="whether query, key and value of a fused weight are separate")


class TSVMConfig(_Rule):
    """Leading singular vectors of all updates, made orthogonal; see :class:`cil.merging.TSVM`."""

    name: Literal["tsv_m"] = "tsv_m"
    scale: Finite = Field(1.0, description="factor on the updates of linear weights")
    split_qkv: bool = Field(True, description="whether query, key and value of a fused weight are separate")


class ConsensusConfig(_Banked):
    """Sum of the updates where several tasks agree with it; see :class:`cil.merging.Consensus`."""

    name: Literal["consensus"] = "consensus"
    scale: Finite = Field(0.3, description="factor on the sum of updates")
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.4, description="size of a task's change of a weight, relative to that by all others, from which it counts"
    )
    masks: PositiveInt = Field(2, description="number of tasks whose change must count for a weight to be merged")


class WUDIConfig(_Rule):
    """Least interference with every update on its own row space; see :class:`cil.merging.WUDI`."""

    name: Literal["wudi"] = "wudi"
    ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.1, description="ridge penalty, as a multiple of the mean diagonal of the sum of the updates' Gram matrices"
    )
    anchor: Anchor = Field("zero", description="update to which the penalty shrinks")
    steps: NonNegativeInt = Field(0, description="Adam steps of the published iteration; 0: the closed form")
    lr: Positive = Field(1e-5, description="learning rate of Adam")
    block: PositiveInt | None = Field(None, description="largest width of the diagonal blocks of Gram matrices kept")


class NUFILTConfig(_Rule):
    """Updates that act only where old ones do not, with a correction; see :class:`cil.merging.NUFILT`."""

    name: Literal["nufilt"] = "nufilt"
    protected: PositiveInt = Field(128, description="number of leading input directions that are protected")
    steps: NonNegativeInt = Field(50, description="Adam steps of the correction; 0: the closed form, without it")
    rank: PositiveInt = Field(64, description="rank of the correction")
    lr: Positive = Field(1e-3, description="learning rate of Adam")
    directions: PositiveInt = Field(8, description="number of leading directions per update that the correction fits")
    split_qkv: bool = Field(True, description="whether query, key and value of a fused weight are separate")
    seed: NonNegativeInt = Field(0, description="seed of the correction's initial values")


class OPCMConfig(_Rule):
    """Updates that are projected away from the merged one, at the tasks' mean norm; see :class:`cil.merging.OPCM`."""

    name: Literal["opcm"] = "opcm"
    alpha: Share = Field(0.5, description="share of the nuclear norm that is protected")
    variant: Variant = Field("diag_zeroed", description="projection operator, see the table on the class")
    split_qkv: bool = Field(True, description="whether query, key and value of a fused weight are separate")


RuleSection = (
    AverageConfig
    | WiseFTConfig
    | EMAConfig
    | TaskArithmeticConfig
    | TIESConfig
    | ContinualTIESConfig
    | MagMaxConfig
    | DAREConfig
    | DareTIESConfig
    | FisherConfig
    | RegMeanConfig
    | GramMergeConfig
    | IsoCConfig
    | IsoCTSConfig
    | TSVMConfig
    | WUDIConfig
    | ConsensusConfig
    | NUFILTConfig
    | OPCMConfig
)


class CustomRule(CustomObject):
    """A :class:`cil.merging.Rule` from a file or package, constructed as ``Mine(**arguments)``."""

    what = "rule"
    skip = ("finalisers",)
    finalisers: list[FinaliserConfig] = Field([], description="finalisers, applied in this order to the merged update")

    @classmethod
    def kind(cls) -> type:
        return Rule


RuleConfig = Annotated[
    Annotated[RuleSection | CustomRule, Field(discriminator="name")],
    BeforeValidator(lambda raw: as_custom(as_section(raw))),
]
"""A field of this type accepts a rule's bare name, its name and hyper-parameters, or a custom class."""

RULES: dict[str, type[Rule]] = {
    "average": Average,
    "wise_ft": WiseFT,
    "ema": EMA,
    "task_arithmetic": TaskArithmetic,
    "ties": TIES,
    "continual_ties": ContinualTIES,
    "magmax": MagMax,
    "dare": DARE,
    "dare_ties": DareTIES,
    "fisher": Fisher,
    "regmean": RegMean,
    "gram_merge": GramMerge,
    "iso_c": IsoC,
    "iso_cts": IsoCTS,
    "tsv_m": TSVM,
    "wudi": WUDI,
    "consensus": Consensus,
    "nufilt": NUFILT,
    "opcm": OPCM,
}
FINALISERS: dict[str, type[Finaliser]] = {"norm_matching": NormMatching, "lines": LiNeS}


class _Choice(Section):
    rule: RuleConfig


def rule_config(config: RuleSection | CustomRule | str | dict[str, Any]) -> RuleSection | CustomRule:
    """Validate the configuration of a rule.

    Raises:
        ConfigError: A rule, finaliser or hyper-parameter is unknown, a value is out of range, or a class cannot be
            loaded.
    """
    return validated(_Choice, {"rule": config}).rule


def build_rule(config: RuleSection | CustomRule | str | dict[str, Any]) -> Rule:
    """Build the rule that a configuration names, without starting it.

    Args:
        config: A configuration, a rule's name, or a dictionary of its name and hyper-parameters.

    Raises:
        ConfigError: A rule, finaliser or hyper-parameter is unknown, a value is out of range, or a class cannot be
            loaded.
    """
    c = rule_config(config)
    finalisers = [FINALISERS[f.name](**f.model_dump(exclude={"name"})) for f in c.finalisers]
    if isinstance(c, CustomRule):
        rule: Rule = c.build()
        rule.finalisers = tuple(finalisers)
        return rule
    return RULES[c.name](**c.model_dump(exclude={"name", "finalisers"}), finalisers=finalisers)
