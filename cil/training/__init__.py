"""Training: the recipe, the losses and the one training loop that every learner uses."""

from cil.training.batches import Batches, TensorData, WithRows
from cil.training.loop import fit
from cil.training.losses import Loss, cosface, cross_entropy, local_cross_entropy
from cil.training.optimizer import ParamGroup, build_optimizer, rate_factor
from cil.training.recipe import Optimizer, Per, Recipe, Schedule, Softmax, check_whole_steps

Group = ParamGroup
"""The earlier name of :class:`ParamGroup`; it stays valid."""

__all__ = [
    "Batches",
    "Group",
    "Loss",
    "Optimizer",
    "ParamGroup",
    "Per",
    "Recipe",
    "Schedule",
    "Softmax",
    "TensorData",
    "WithRows",
    "build_optimizer",
    "check_whole_steps",
    "cosface",
    "cross_entropy",
    "fit",
    "local_cross_entropy",
    "rate_factor",
]
