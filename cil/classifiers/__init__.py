"""How features become logits. Each classifier is usable alone on tensors."""

from cil.classifiers.linear import LinearHead
from cil.classifiers.ncm import NCM

__all__ = ["NCM", "LinearHead"]
