"""One bank of low-rank updates that is trained task by task, in directions chosen from the inputs: InfLoRA, LoDA."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers.heads import Head
from cil.errors import BackboneError
from cil.learner import Context
from cil.learners.bases.aligned_copy import AlignedCopy
from cil.learners.bases.sequential import SequentialTuning
from cil.merging.statistics import input_grams
from cil.stream import Task
from cil.tuning import LowRankBank
from cil.tuning.peft_tree import uncalled


class LowRankUpdates(AlignedCopy, SequentialTuning):
    """A learner whose tuner is a :class:`~cil.tuning.LowRankBank`, with an alignment if it is configured."""

    tuner: LowRankBank

    @property
    def predictor(self) -> Head:
        """The head that predicts: the aligned copy, or ``head`` itself without alignment."""
        return self.aligned if self.config.alignment_epochs else self.head

    def grams(self, task: Task, ctx: Context) -> Tensor:
        """C = mean x xᵀ of each block's inputs over the task's images, under the test transform, float64 [L, D, D]."""
        names = self.tuner.inputs
        found = input_moments(self, names, task, ctx)
        return torch.stack([found[name] for name in names])


def input_moments(
    learner: SequentialTuning, names: Collection[str], task: Task, ctx: Context, *, centred: bool = False
) -> dict[str, Tensor]:
    """Mean x xᵀ, or with ``centred`` the covariance, of the inputs of linear layers over a task's images.

    Args:
        learner: The learner, for its backbone with its tuner.
        names: Names of the layers' weights.
        task: The task; its training images pass once, under the test transform.
        ctx: Context of the stage.
        centred: Whether the mean of the inputs is subtracted.

    Returns:
        float64 [D, D] by name.
    """
    batches = task.train.batches(learner.config.train_batch_size, generator=None, augment=False, device=ctx.device)
    images = (images for images, _ in batches)
    found = input_grams(learner.backbone.model, images, layers=names, forward=learner.tuned, centred=centred)
    return {name: value[0] for name, value in found.items()}


def require_called(backbone: Backbone, names: Collection[str]) -> None:
    """Refuse a backbone that reads some of these layers' weights without calling the layers, by one blank image.

    Raises:
        BackboneError: The inputs of a layer cannot be seen.
    """
    layers = {name: backbone.model.get_submodule(name.removesuffix(".weight")) for name in names}
    if unseen := uncalled(backbone.model, layers, backbone.input_size):
        raise BackboneError(
            f"{len(unseen)} of the {len(names)} layers whose inputs this learner measures are read, not called, by "
            f"this {type(backbone.model).__name__}; the first is {unseen[0].removesuffix('.weight')}. Use a backbone "
            "that calls them, e.g. a plain ViT, or a learner without such measurements, e.g. ssiat"
        )
