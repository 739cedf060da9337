"""Tuners: small trainable modules for a frozen backbone. Each can be used on its own: ``backbone(images, tuner)``."""

from typing import TYPE_CHECKING, Any

from cil.backbone.vit import Tuner
from cil.tuning.adapter import Adapter
from cil.tuning.configs import TunerConfig, build_tuner
from cil.tuning.lora_kv import KeyValueLora
from cil.tuning.low_rank_bank import LowRankBank
from cil.tuning.prefix import ExternalPrefix, Prefix
from cil.tuning.prompts import PooledPrompts, VisualPrompts
from cil.tuning.ssf import SSF
from cil.tuning.vqt import VisualQueries
from cil.tuning.weights import AddedWeights, ExternalWeights, WeightTuner, bitfit, full, layernorm, partial

if TYPE_CHECKING:
    from cil.tuning.peft import PeftTuner

__all__ = [
    "SSF",
    "Adapter",
    "AddedWeights",
    "ExternalPrefix",
    "ExternalWeights",
    "KeyValueLora",
    "LowRankBank",
    "PeftTuner",
    "PooledPrompts",
    "Prefix",
    "Tuner",
    "TunerConfig",
    "VisualPrompts",
    "VisualQueries",
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
