"""One bank of low-rank updates that is trained task by task, in directions chosen from the inputs: InfLoRA, LoDA."""

from __future__ import annotations

import torch
from torch import Tensor

from cil.learner import Context
from cil.learners.bases.new_classes import TaskOfClass
from cil.learners.bases.sequential import SequentialTuning
from cil.merging.statistics import input_grams
from cil.stream import Task
from cil.tuning import LowRankBank


class LowRankUpdates(TaskOfClass, SequentialTuning):
    """A learner whose tuner is a :class:`~cil.tuning.LowRankBank`."""

    tuner: LowRankBank

    def grams(self, task: Task, ctx: Context) -> Tensor:
        """C = mean x xᵀ of each block's inputs over the task's images, under the test transform, float64 [L, D, D]."""
        batches = task.train.batches(self.config.train_batch_size, generator=None, augment=False, device=ctx.device)
        images = (images for images, _ in batches)
        names = self.tuner.inputs
        found = input_grams(self.backbone.model, images, layers=names, forward=self.tuned)
        return torch.stack([found[name][0] for name in names])
