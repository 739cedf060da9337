"""Configurations: their keys, reading them, and loading external code that they name.

Importing this package needs pydantic, and neither torch nor timm.
"""

from cil.config.schema import (
    Augmentation,
    BackboneConfig,
    CombineConfig,
    Config,
    DataConfig,
    HardwareConfig,
    LearnerEntry,
    Normalization,
    Section,
    StreamConfig,
    TransformConfig,
    as_section,
)

__all__ = [
    "Augmentation",
    "BackboneConfig",
    "CombineConfig",
    "Config",
    "DataConfig",
    "HardwareConfig",
    "LearnerEntry",
    "Normalization",
    "Section",
    "StreamConfig",
    "TransformConfig",
    "as_section",
]
