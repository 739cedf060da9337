"""Every rule and finaliser by name: hyper-parameters with ranges and meanings, and how it is built.

``rule: opcm`` and ``rule: {name: opcm, alpha: 0.3, finalisers: [{name: lines, alpha: 0.5}]}`` are both a
:data:`RuleConfig`, and so is one of the user's own, ``rule: {class: "mine.py:Mine", scale: 0.5}``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from cil.config import Section, named
from cil.configfile import validated
from cil.merging.base import Rule
from cil.merging.dare import DARE, DareTIES
from cil.merging.finalisers import Finaliser, LiNeS, NormMatching
from cil.merging.fisher import Fisher
from cil.merging.linear import EMA, Average, TaskArithmetic, WiseFT
from cil.merging.magmax import MagMax
from cil.merging.nufilt import NUFILT
from cil.merging.opcm import OPCM, Variant
from cil.merging.regmean import GramMerge, RegMean
from cil.merging.spectral import IsoC
from cil.merging.ties import TIES, ContinualTIES, Merge, Trim
from cil.plugins import Own, own

Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class NormMatchingConfig(Section):
    """The update at the tasks' mean norm; see :class:`cil.merging.NormMatching`."""

    name: Literal["norm_matching"] = "norm_matching"
    scale: Positive = Field(1.0, description="share of the mean norm")
    cap: bool = Field(False, description="only ever shrink")


class LiNeSConfig(Section):
    """Updates scaled linearly with depth; see :class:`cil.merging.LiNeS`."""

    name: Literal["lines"] = "lines"
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["1/T"] = Field(
        0.5, description="scale of the first block; 1/T divides by the number of tasks"
    )
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="what the last block gets on top; default 1 − alpha"
    )

    @model_validator(mode="after")
    def _slope(self) -> LiNeSConfig:
        if self.beta is None and not isinstance(self.alpha, str) and self.alpha > 1:
            raise ValueError("alpha above 1 needs a beta of its own, since 1 − alpha is negative")
        return self


FinaliserSection = NormMatchingConfig | LiNeSConfig
FinaliserConfig = Annotated[Annotated[FinaliserSection, Field(discriminator="name")], BeforeValidator(named)]


class _Rule(Section):
    finalisers: list[FinaliserConfig] = Field([], description="applied to the merged update when it is read out")


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
    alpha: Share = Field(0.5, description="weight of the new model; 1: it replaces the merged one, 0: the first stays")


class TaskArithmeticConfig(_Rule):
    """Scaled sum of the task vectors; see :class:`cil.merging.TaskArithmetic`."""

    name: Literal["task_arithmetic"] = "task_arithmetic"
    scale: Finite = Field(0.3, description="factor of the sum")
    divide: Literal["none", "tasks"] = Field("none", description="tasks: divide by the number of tasks, too")


class TIESConfig(_Rule):
    """TIES-Merging, exact in constant memory; see :class:`cil.merging.TIES`."""

    name: Literal["ties"] = "ties"
    density: float = Field(0.2, gt=0, le=1, description="share of largest magnitudes kept")
    merge: Merge = Field("sum", description="of the entries that agree with the elected sign")
    scale: Finite = Field(0.3, description="factor of the result")
    trim: Trim = Field("model", description="what the share is of: the flattened model, or every tensor by itself")


class ContinualTIESConfig(_Rule):
    """TIES of the merged and the new update, as published; see :class:`cil.merging.ContinualTIES`."""

    name: Literal["continual_ties"] = "continual_ties"
    density: float = Field(0.2, gt=0, le=1, description="share of largest magnitudes kept")
    merge: Merge = Field("sum", description="of the entries that agree with the elected sign")
    scale: Finite = Field(0.5, description="factor of every step's result")


class MagMaxConfig(_Rule):
    """The largest change of every weight; see :class:`cil.merging.MagMax`."""

    name: Literal["magmax"] = "magmax"
    scale: Finite = Field(0.5, description="factor of the result")


class DAREConfig(_Rule):
    """Task arithmetic of randomly dropped, rescaled updates; see :class:`cil.merging.DARE`."""

    name: Literal["dare"] = "dare"
    drop: float = Field(0.5, ge=0, lt=1, description="share of entries dropped")
    scale: Finite = Field(0.3, description="factor of the sum")
    divide: Literal["none", "tasks"] = Field("none", description="tasks: divide by the number of tasks, too")
    seed: int = Field(0, ge=0, description="of the masks")


class DareTIESConfig(_Rule):
    """TIES with DARE in place of trimming; see :class:`cil.merging.DareTIES`."""

    name: Literal["dare_ties"] = "dare_ties"
    drop: float = Field(0.5, ge=0, lt=1, description="share of entries dropped")
    merge: Merge = Field("sum", description="of the entries that agree with the elected sign")
    scale: Finite = Field(0.3, description="factor of the result")
    seed: int = Field(0, ge=0, description="of the masks")


class FisherConfig(_Rule):
    """Averaging weighted by Fisher information; see :class:`cil.merging.Fisher`."""

    name: Literal["fisher"] = "fisher"
    epsilon: Positive = Field(1e-6, description="added to the information")
    normalize: bool = Field(True, description="divide every task's information by its norm")


class RegMeanConfig(_Rule):
    """Least squares fit to all tasks' layer outputs; see :class:`cil.merging.RegMean`."""

    name: Literal["regmean"] = "regmean"
    rho: Share = Field(0.95, description="share of the Gram matrices' off-diagonal entries kept")
    ridge: Positive = Field(1e-3, description="ridge, as a multiple of the mean diagonal")
    block: PositiveInt | None = Field(None, description="cut wider Gram matrices into diagonal blocks of this width")


class GramMergeConfig(_Rule):
    """RegMean with a depth slope and a capped norm; see :class:`cil.merging.GramMerge`."""

    name: Literal["gram_merge"] = "gram_merge"
    slope: Share = Field(0.5, description="scale of the first block's update; 1: none")
    cap: bool = Field(True, description="cap the norm at the tasks' mean norm")
    rho: Share = Field(0.95, description="share of the Gram matrices' off-diagonal entries kept")
    ridge: Positive = Field(1e-3, description="ridge, as a multiple of the mean diagonal")
    block: PositiveInt | None = Field(1024, description="cut wider Gram matrices into diagonal blocks of this width")


class IsoCConfig(_Rule):
    """Mean update with equal singular values; see :class:`cil.merging.IsoC`."""

    name: Literal["iso_c"] = "iso_c"
    scale: Finite = Field(1.0, description="factor of linear weights' updates")
    split_qkv: bool = Field(True, description="treat query, key and value of a fused weight one by one")


class NUFILTConfig(_Rule):
    """Updates filtered to where old ones do not act, and corrected; see :class:`cil.merging.NUFILT`."""

    name: Literal["nufilt"] = "nufilt"
    protected: PositiveInt = Field(128, description="leading input directions of the merged update that are kept free")
    steps: NonNegativeInt = Field(50, description="Adam steps of the correction; 0: the closed form, without it")
    rank: PositiveInt = Field(64, description="rank of the correction")
    lr: Positive = Field(1e-3, description="Adam's rate")
    directions: PositiveInt = Field(8, description="main directions of old and new update that the correction fits")
    split_qkv: bool = Field(True, description="treat query, key and value of a fused weight one by one")
    seed: NonNegativeInt = Field(0, description="of the correction's start")


class OPCMConfig(_Rule):
    """Updates projected away from the merged one, at the mean norm; see :class:`cil.merging.OPCM`."""

    name: Literal["opcm"] = "opcm"
    alpha: Share = Field(0.5, description="share of the nuclear norm that is protected")
    variant: Variant = Field("diag_zeroed", description="which of the three operators of that name")
    split_qkv: bool = Field(True, description="treat query, key and value of a fused weight one by one")


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
    | NUFILTConfig
    | OPCMConfig
)


class OwnRule(Own):
    """A :class:`cil.merging.Rule` from a file or package, constructed as ``Mine(**arguments)``."""

    what = "rule"
    skip = ("finalisers",)
    finalisers: list[FinaliserConfig] = Field([], description="applied to the merged update when it is read out")

    @classmethod
    def kind(cls) -> type:
        return Rule


RuleConfig = Annotated[
    Annotated[RuleSection | OwnRule, Field(discriminator="name")], BeforeValidator(lambda raw: own(named(raw)))
]
"""A field of this type accepts a rule's bare name, its name and hyper-parameters, or a class of the user's own."""

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
    "nufilt": NUFILT,
    "opcm": OPCM,
}
FINALISERS: dict[str, type[Finaliser]] = {"norm_matching": NormMatching, "lines": LiNeS}


class _Choice(Section):
    rule: RuleConfig


def rule_config(config: RuleSection | OwnRule | str | dict[str, Any]) -> RuleSection | OwnRule:
    """The validated configuration of a rule.

    Raises:
        ConfigError: Unknown rule, finaliser or hyper-parameter, a value out of range, or a class that cannot be loaded.
    """
    return validated(_Choice, {"rule": config}).rule


def build_rule(config: RuleSection | OwnRule | str | dict[str, Any]) -> Rule:
    """The rule a configuration names, not started.

    Args:
        config: A configuration, or what one can be made from: the bare name, or name and hyper-parameters.

    Raises:
        ConfigError: Unknown rule, finaliser or hyper-parameter, a value out of range, or a class that cannot be loaded.
    """
    c = rule_config(config)
    finalisers = [FINALISERS[f.name](**f.model_dump(exclude={"name"})) for f in c.finalisers]
    if isinstance(c, OwnRule):
        rule: Rule = c.build()
        rule.finalisers = tuple(finalisers)
        return rule
    return RULES[c.name](**c.model_dump(exclude={"name", "finalisers"}), finalisers=finalisers)
