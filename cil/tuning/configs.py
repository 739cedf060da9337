"""The configuration of every tuner by name, and the function that builds a tuner from it.

``tuner: adapter`` and ``tuner: {name: adapter, bottleneck: 16}`` are both a :data:`TunerConfig`, and so is a custom
tuner, ``tuner: {class: "mine.py:Mine", rank: 3}``.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from cil.backbone import Backbone
from cil.backbone.vit import Tuner
from cil.config import Section, as_section
from cil.config.plugins import CustomObject, as_custom
from cil.config.reading import validated
from cil.tuning.adapter import Activation, Adapter, Form
from cil.tuning.lora_kv import KeyValueLora
from cil.tuning.peft_config import Factors
from cil.tuning.prefix import Init, Prefix
from cil.tuning.prompts import VisualPrompts
from cil.tuning.ssf import SSF
from cil.tuning.vqt import VisualQueries
from cil.tuning.weights import bitfit, full, layernorm, partial

Targets = list[str] | str
Blocks = Annotated[
    Annotated[list[NonNegativeInt], Field(min_length=1)] | None,
    Field(description="indices of the tuned blocks, counted from 0; default: all blocks"),
]


class AdapterConfig(Section):
    """Bottleneck adapters; see :class:`cil.tuning.Adapter`."""

    summary: ClassVar[str] = "a bottleneck beside the MLP (AdaptFormer), after it (Houlsby), or beside attention (LAE)"
    name: Literal["adapter"] = "adapter"
    bottleneck: PositiveInt = Field(64, description="width of the bottleneck")
    scale: float = Field(0.1, gt=0, description="factor on the adapter's output")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout probability inside the bottleneck, in training")
    form: Form = Field(
        "parallel",
        description="position; parallel: along the MLP (AdaptFormer); sequential: after attention and MLP (Houlsby); "
        "attention: along the attention (LAE)",
    )
    activation: Activation = Field("relu", description="activation function between the two projections")
    learned_scale: bool = Field(False, description="whether each adapter learns its scale, starting at `scale`")
    blocks: Blocks = None


class SSFConfig(Section):
    """Learned scale and shift of every affine layer's output; see :class:`cil.tuning.SSF`."""

    summary: ClassVar[str] = "scale and shift after every affine layer"
    name: Literal["ssf"] = "ssf"


class ShallowPromptsConfig(Section):
    """Prompt tokens before the first block; see :class:`cil.tuning.VisualPrompts`."""

    summary: ClassVar[str] = "prompt tokens before the first block"
    name: Literal["vpt_shallow"] = "vpt_shallow"
    length: int = Field(5, ge=0, description="number of prompt tokens")


class DeepPromptsConfig(Section):
    """Separate prompt tokens for every block; see :class:`cil.tuning.VisualPrompts`."""

    summary: ClassVar[str] = "separate prompt tokens before every block"
    name: Literal["vpt_deep"] = "vpt_deep"
    length: int = Field(5, ge=0, description="number of prompt tokens per block")


class PrefixConfig(Section):
    """Additional keys and values in the attention of the blocks; see :class:`cil.tuning.Prefix`."""

    summary: ClassVar[str] = "additional keys and values in every attention layer"
    name: Literal["prefix"] = "prefix"
    length: int = Field(10, ge=0, description="number of keys and of values per block")
    init: Init = Field("normal", description="initial distribution; normal: N(0, 0.02²); uniform: U(0, 0.01)")
    learned_scale: bool = Field(False, description="whether a block learns factors on its keys and values")
    compensate: bool = Field(False, description="whether each query's weights on the prefix sum to 1 (LAE)")
    blocks: Blocks = None


class VisualQueriesConfig(Section):
    """Queries that read every block's tokens and change none; see :class:`cil.tuning.VisualQueries`."""

    summary: ClassVar[str] = "queries that read every block's tokens, as further features (VQT)"
    name: Literal["vqt"] = "vqt"
    length: PositiveInt = Field(1, description="number of queries per block; each adds a block's width to the features")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout probability on the queries, in training")
    blocks: Blocks = None


class KeyValueLoraConfig(Section):
    """Low-rank updates of keys and values with learned scales; see :class:`cil.tuning.KeyValueLora`."""

    summary: ClassVar[str] = "low-rank updates of keys and values with learned scales (LAE)"
    name: Literal["lora_kv"] = "lora_kv"
    rank: PositiveInt = Field(5, description="rank of the updates")
    blocks: Blocks = None


class BitFitConfig(Section):
    """Trains every bias; see :func:`cil.tuning.weights.bitfit`."""

    summary: ClassVar[str] = "all biases"
    name: Literal["bitfit"] = "bitfit"


class LayerNormConfig(Section):
    """Trains weight and bias of every LayerNorm; see :func:`cil.tuning.weights.layernorm`."""

    summary: ClassVar[str] = "weight and bias of every LayerNorm"
    name: Literal["layernorm"] = "layernorm"


class PartialConfig(Section):
    """Trains the last blocks and the final norm; see :func:`cil.tuning.weights.partial`."""

    summary: ClassVar[str] = "the last blocks and the final norm"
    name: Literal["partial"] = "partial"
    blocks: PositiveInt = Field(1, description="number of blocks to train, counted from the last")


class FullConfig(Section):
    """Trains every weight; see :func:`cil.tuning.weights.full`."""

    summary: ClassVar[str] = "all weights"
    name: Literal["full"] = "full"


class _Peft(Section):
    targets: Targets = Field(
        ["qkv"], description="layers to tune: ends of their names, or one regular expression for whole names"
    )
    options: dict[str, Any] = Field({}, description="further arguments of PEFT's configuration of this kind")


class LoraConfig(_Peft):
    """Low-rank updates (LoRA); see :class:`cil.tuning.PeftTuner`."""

    summary: ClassVar[str] = "low-rank updates of linear layers (LoRA)"
    name: Literal["lora"] = "lora"
    rank: PositiveInt = Field(8, description="rank of the update")
    alpha: float = Field(8, gt=0, description="numerator of the update's scale, alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability on the update's input, in training")
    factors: Factors = Field(
        "both", description="trained factors; both; up: B alone, A stays as drawn; shared: as up, one A for all tasks"
    )


class DoraConfig(LoraConfig):
    """LoRA on the direction of each weight, with a separately learned magnitude (DoRA)."""

    summary: ClassVar[str] = "low-rank updates of each weight's direction, and its magnitude (DoRA)"
    name: Literal["dora"] = "dora"  # type: ignore[assignment]


class IA3Config(_Peft):
    """Learned factors on the outputs of layers, and for fc2 on its inputs (IA³)."""

    summary: ClassVar[str] = "factors on layer outputs, and on the inputs of fc2 (IA³)"
    name: Literal["ia3"] = "ia3"
    targets: Targets = Field(["qkv", "fc2"], description=_Peft.model_fields["targets"].description)


class OFTConfig(_Peft):
    """Learned orthogonal rotations of each weight's input (OFT)."""

    summary: ClassVar[str] = "orthogonal rotations of each layer's input (OFT)"
    name: Literal["oft"] = "oft"
    block_size: PositiveInt = Field(
        16, description="width of the rotation blocks, a divisor of the layers' input width"
    )


class OSFConfig(_Peft):
    """Trains each weight outside its top singular directions, which do not change (OSF)."""

    summary: ClassVar[str] = "all directions of each weight except its top singular ones (OSF)"
    name: Literal["osf"] = "osf"
    rank: PositiveInt | Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="singular directions that stay fixed: a number, or a fraction of a layer's smaller width"
    )


TunerSection = (
    AdapterConfig
    | SSFConfig
    | ShallowPromptsConfig
    | DeepPromptsConfig
    | PrefixConfig
    | VisualQueriesConfig
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


class CustomTuner(CustomObject):
    """A :class:`cil.Tuner` from a file or package, constructed as ``Mine(backbone, **arguments)``."""

    what = "tuner"
    given = ("backbone",)

    @classmethod
    def kind(cls) -> type:
        return Tuner


TunerConfig = Annotated[
    Annotated[TunerSection | CustomTuner, Field(discriminator="name")],
    BeforeValidator(lambda raw: as_custom(as_section(raw))),
]
"""A field of this type accepts a tuner's bare name, its name and hyper-parameters, or a custom class."""


class _Choice(Section):
    tuner: TunerConfig


def build_tuner(config: TunerSection | CustomTuner | str | dict[str, Any], backbone: Backbone) -> Tuner:
    """Build the tuner that a configuration names, on the backbone's device, with initial values from seed 0.

    Args:
        config: A configuration, a tuner's name, or a dictionary of its name and hyper-parameters.
        backbone: The frozen backbone.

    Raises:
        ConfigError: The tuner or a hyper-parameter is unknown, a value is out of range, or a class cannot be loaded.
        BackboneError: The tuner does not fit the backbone.
    """
    c = validated(_Choice, {"tuner": config}).tuner
    if isinstance(c, CustomTuner):
        return c.build(backbone).to(backbone.device)
    if isinstance(c, AdapterConfig):
        return Adapter(backbone, **c.model_dump(exclude={"name"}))
    if isinstance(c, SSFConfig):
        return SSF(backbone)
    if isinstance(c, ShallowPromptsConfig | DeepPromptsConfig):
        return VisualPrompts(backbone, c.length, deep=isinstance(c, DeepPromptsConfig))
    if isinstance(c, PrefixConfig):
        return Prefix(backbone, **c.model_dump(exclude={"name"}))
    if isinstance(c, VisualQueriesConfig):
        return VisualQueries(backbone, c.length, c.dropout, blocks=c.blocks)
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
