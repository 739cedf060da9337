"""What rides along a frozen backbone. Each tuner is usable alone: ``backbone(images, tuner)``."""

from typing import TYPE_CHECKING, Any

from cil.tuning.adapter import Adapter
from cil.tuning.lora_kv import KeyValueLora
from cil.tuning.prefix import GivenPrefix, Prefix
from cil.tuning.prompts import PooledPrompts, VisualPrompts
from cil.tuning.ssf import SSF
from cil.tuning.table import TunerConfig, build_tuner
from cil.tuning.weights import GivenWeights, WeightTuner, bitfit, full, layernorm, partial
from cil.vit import Tuner

if TYPE_CHECKING:
    from cil.tuning.peft import PeftTuner

__all__ = [
    "SSF",
    "Adapter",
    "GivenPrefix",
    "GivenWeights",
    "KeyValueLora",
    "PeftTuner",
    "PooledPrompts",
    "Prefix",
    "Tuner",
    "TunerConfig",
    "VisualPrompts",
    "WeightTuner",
    "bitfit",
    "build_tuner",
    "full",
    "layernorm",
    "partial",
]


def __getattr__(name: str) -> Any:
    if name == "PeftTuner":
        from cil.tuning.peft import PeftTuner

        return PeftTuner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
