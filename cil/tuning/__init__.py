"""What rides along a frozen backbone. Each tuner is usable alone: ``backbone(images, tuner)``."""

from cil.tuning.weights import WeightTuner
from cil.vit import Tuner

__all__ = ["Tuner", "WeightTuner"]
