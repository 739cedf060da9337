"""Every tuner by name: its hyper-parameters with ranges and meanings, and how it is built.

``tuner: adapter`` and ``tuner: {name: adapter, bottleneck: 16}`` are both a :data:`TunerConfig`, and so is one of the
user's own, ``tuner: {class: "mine.py:Mine", width: 3}``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from cil.backbone import Backbone
from cil.config import Section, named
from cil.configfile import validated
from cil.plugins import Own, own
from cil.tuning.adapter import Activation, Adapter, Form
from cil.tuning.lora_kv import KeyValueLora
from cil.tuning.prefix import Init, Prefix
from cil.tuning.prompts import VisualPrompts
from cil.tuning.ssf import SSF
from cil.tuning.weights import bitfit, full, layernorm, partial
from cil.vit import Tuner

Targets = list[str] | str
Blocks = Annotated[
    Annotated[list[NonNegativeInt], Field(min_length=1)] | None,
    Field(description="blocks it acts on, from 0; default: all"),
]


class AdapterConfig(Section):
    """Bottleneck adapters; see :class:`cil.tuning.Adapter`."""

    name: Literal["adapter"] = "adapter"
    bottleneck: PositiveInt = Field(64, description="width of the bottleneck")
    scale: float = Field(0.1, gt=0, description="factor of the adapter's output")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout inside the bottleneck, in training")
    form: Form = Field(
        "parallel",
        description="parallel: beside the MLP (AdaptFormer); sequential: behind both halves; attention: beside the "
        "attention (LAE)",
    )
    activation: Activation = Field("relu", description="between the two projections")
    learned_scale: bool = Field(False, description="every adapter learns a factor of its own, from scale on")
    blocks: Blocks = None


class SSFConfig(Section):
    """Scaling and shifting of every affine layer's output; see :class:`cil.tuning.SSF`."""

    name: Literal["ssf"] = "ssf"


class ShallowPromptsConfig(Section):
    """Prompt tokens before the first block; see :class:`cil.tuning.VisualPrompts`."""

    name: Literal["vpt_shallow"] = "vpt_shallow"
    length: int = Field(5, ge=0, description="prompt tokens")


class DeepPromptsConfig(Section):
    """Prompt tokens of its own for every block; see :class:`cil.tuning.VisualPrompts`."""

    name: Literal["vpt_deep"] = "vpt_deep"
    length: int = Field(5, ge=0, description="prompt tokens a block")


class PrefixConfig(Section):
    """Further keys and values in the attention of the blocks; see :class:`cil.tuning.Prefix`."""

    name: Literal["prefix"] = "prefix"
    length: int = Field(10, ge=0, description="keys and values a block")
    init: Init = Field("normal", description="normal: N(0, 0.02²); uniform: U(0, 0.01)")
    learned_scale: bool = Field(False, description="a block's keys and values have learned factors, from 1 on")
    compensate: bool = Field(False, description="each query's weights on the prefix sum to 1 (LAE)")
    blocks: Blocks = None


class KeyValueLoraConfig(Section):
    """Low-rank updates of keys and values with learned scales; see :class:`cil.tuning.KeyValueLora`."""

    name: Literal["lora_kv"] = "lora_kv"
    rank: PositiveInt = Field(5, description="rank of the updates")
    blocks: Blocks = None


class BitFitConfig(Section):
    """Every bias; see :func:`cil.tuning.weights.bitfit`."""

    name: Literal["bitfit"] = "bitfit"


class LayerNormConfig(Section):
    """Weight and bias of every LayerNorm; see :func:`cil.tuning.weights.layernorm`."""

    name: Literal["layernorm"] = "layernorm"


class PartialConfig(Section):
    """The last blocks and the final norm; see :func:`cil.tuning.weights.partial`."""

    name: Literal["partial"] = "partial"
    blocks: PositiveInt = Field(1, description="blocks that train, counted from the last")


class FullConfig(Section):
    """Every weight; see :func:`cil.tuning.weights.full`."""

    name: Literal["full"] = "full"


class _Peft(Section):
    targets: Targets = Field(
        ["qkv"], description="layers: the ends of their names, or one regular expression for whole names"
    )
    options: dict[str, Any] = Field({}, description="further arguments of PEFT's own configuration")


class LoraConfig(_Peft):
    """Low-rank updates (LoRA); see :class:`cil.tuning.PeftTuner`."""

    name: Literal["lora"] = "lora"
    rank: PositiveInt = Field(8, description="rank of the update")
    alpha: float = Field(8, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the update, in training")


class DoraConfig(LoraConfig):
    """LoRA on the direction of each weight with a magnitude of its own (DoRA)."""

    name: Literal["dora"] = "dora"  # type: ignore[assignment]


class IA3Config(_Peft):
    """Learned factors on layer outputs, on the inputs of fc2 (IA³)."""

    name: Literal["ia3"] = "ia3"
    targets: Targets = Field(["qkv", "fc2"], description=_Peft.model_fields["targets"].description)


class OFTConfig(_Peft):
    """Orthogonal rotations of each weight's input (OFT)."""

    name: Literal["oft"] = "oft"
    block_size: PositiveInt = Field(16, description="size of the rotation blocks; divides the layers' input width")


class OSFConfig(_Peft):
    """Every weight outside its top singular directions, which stay as they are (OSF)."""

    name: Literal["osf"] = "osf"
    rank: PositiveInt | Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="singular directions preserved: a number, or a fraction of a layer's smaller width"
    )


TunerSection = (
    AdapterConfig
    | SSFConfig
    | ShallowPromptsConfig
    | DeepPromptsConfig
    | PrefixConfig
    | KeyValueLoraConfig
    | BitFitConfig
    | LayerNormConfig
    | PartialConfig
    | FullConfig
    | LoraConfig
    | DoraConfig
    | IA3Config
    | OFTConfig
    | OSFConfig
)


class OwnTuner(Own):
    """A :class:`cil.Tuner` from a file or package, constructed as ``Mine(backbone, **arguments)``."""

    what = "tuner"
    given = ("backbone",)

    @classmethod
    def kind(cls) -> type:
        return Tuner


TunerConfig = Annotated[
    Annotated[TunerSection | OwnTuner, Field(discriminator="name")],
    BeforeValidator(lambda raw: own(named(raw))),
]
"""A field of this type accepts a tuner's bare name, its name and hyper-parameters, or a class of the user's own."""


class _Choice(Section):
    tuner: TunerConfig


def build_tuner(config: TunerSection | OwnTuner | str | dict[str, Any], backbone: Backbone) -> Tuner:
    """The tuner a configuration names, on the backbone's device, with initial values from seed 0.

    Args:
        config: A configuration, or what one can be made from: the bare name, or name and hyper-parameters.
        backbone: The frozen backbone it will ride along.

    Raises:
        ConfigError: Unknown tuner or hyper-parameter, a value out of range, or a class that cannot be loaded.
        BackboneError: The tuner does not fit the backbone.
    """
    c = validated(_Choice, {"tuner": config}).tuner
    if isinstance(c, OwnTuner):
        return c.build(backbone).to(backbone.device)
    if isinstance(c, AdapterConfig):
        return Adapter(backbone, **c.model_dump(exclude={"name"}))
    if isinstance(c, SSFConfig):
        return SSF(backbone)
    if isinstance(c, ShallowPromptsConfig | DeepPromptsConfig):
        return VisualPrompts(backbone, c.length, deep=isinstance(c, DeepPromptsConfig))
    if isinstance(c, PrefixConfig):
        return Prefix(backbone, **c.model_dump(exclude={"name"}))
    if isinstance(c, KeyValueLoraConfig):
        return KeyValueLora(backbone, c.rank, blocks=c.blocks)
    if isinstance(c, PartialConfig):
        return partial(backbone, c.blocks)
    if isinstance(c, BitFitConfig | LayerNormConfig | FullConfig):
        return {"bitfit": bitfit, "layernorm": layernorm, "full": full}[c.name](backbone)
    from cil.tuning.peft import PeftTuner  # needs peft, whose import takes seconds

    further = c.model_dump(exclude={"name", "targets", "options", "block_size"})
    options = {"oft_block_size": c.block_size, **c.options} if isinstance(c, OFTConfig) else c.options
    return PeftTuner(backbone, c.name, targets=c.targets, options=options, **further)
