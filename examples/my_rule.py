"""A merging rule in one file: the mean direction of the updates, at their mean length."""

from typing import Annotated

import torch
from pydantic import Field

from cil.merging import Rule


class MeanDirection(Rule):
    """Per tensor, Δ = s · (Σ_t ‖τ_t‖ / T) · Σ_t τ_t / ‖Σ_t τ_t‖.

    The mean of T orthogonal updates of equal length is √T times shorter than each; here the length is preserved.

    Args:
        scale: s, positive.

    State:
        sum: Σ_t τ_t, in the computing dtype. lengths: Σ_t ‖τ_t‖, float64.
    """

    def __init__(self, scale: Annotated[float, Field(gt=0)] = 1.0):
        super().__init__()
        self.scale = scale

    def state_spec(self, entry):  # state per tensor, initially zero; its size may not grow with the tasks
        return {"sum": (entry.shape, self.layout.dtype), "lengths": ((), torch.float64)}

    def update(self, entry, state, tau, task, stats):  # adds one task's update τ of this tensor
        return {"sum": state["sum"] + tau, "lengths": state["lengths"] + tau.norm().double()}

    def read(self, entry, state, statistic):  # the merged update of this tensor
        length = state["sum"].norm().clamp(min=1e-12)
        return state["sum"] * (self.scale * state["lengths"] / int(self.count) / length)
