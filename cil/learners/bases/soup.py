"""Greedy soups: the mean of those fine-tunings of one task that together do best on its own held-out images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from cil.backbone import Backbone
from cil.classifiers import CosineHead
from cil.learner import Context
from cil.learners.bases.merged_space import Mergeable, Weights
from cil.stream import Task, TaskData
from cil.stream.protocol import validation_split
from cil.tuning import AddedWeights, Tuner
from cil.utils.precision import exact

Parameters = Mapping[str, Tensor]
Score = tuple[float, float]
"""Accuracy and negative mean cross-entropy; larger is better."""


def held_out(data: TaskData, share: float) -> tuple[TaskData, TaskData]:
    """Split a task's images class by class into those to train on and those to choose by, possibly none."""
    images, indices = data.source
    train, rest = validation_split(data.labels, share)
    return TaskData(images, indices[train], data.labels[train]), TaskData(images, indices[rest], data.labels[rest])


def greedy(count: int, score: Callable[[Sequence[int]], Score]) -> list[int]:
    """Choose ingredients 0 … ``count`` − 1 as model soups do (Wortsman et al., ICML 2022, arXiv 2203.05482).

    They are sorted by their own accuracy, then loss, then number. The first one starts the soup, and each next one is
    accepted if the soup with it is strictly more accurate.

    Args:
        count: Number of ingredients, ≥ 1.
        score: Score of the mean of some ingredients.

    Returns:
        The accepted ingredients, the best one first.
    """
    alone = [score([i]) for i in range(count)]
    first, *others = sorted(range(count), key=lambda i: (-alone[i][0], -alone[i][1], i))
    accepted, best = [first], alone[first][0]
    for i in others:
        accuracy = score([*accepted, i])[0]
        if accuracy > best:
            accepted, best = [*accepted, i], accuracy
    return accepted


@exact()
def mean_of(members: Sequence[Parameters]) -> dict[str, Tensor]:
    """The mean of parameters, by name."""
    return {name: sum((m[name] for m in members[1:]), members[0][name]) / len(members) for name in members[0]}


def tuner_with(models: Mergeable, update: Parameters) -> Tuner:
    """A tuner at θ_0 + update, whose update is exactly this one."""
    if isinstance(models, Weights):
        return AddedWeights(models.initial, {name: (value,) for name, value in update.items()})
    return models.tuner_at({name: models.initial[name] + value for name, value in update.items()})


def greedy_soup(
    models: Mergeable,
    backbone: Backbone,
    members: Sequence[tuple[Parameters, CosineHead]],
    data: TaskData,
    task: Task,
    ctx: Context,
) -> tuple[Tuner, CosineHead]:
    """The greedy soup of fine-tunings of a task: mean updates and mean heads, chosen on ``data``.

    Args:
        models: The space of the updates.
        backbone: The frozen backbone.
        members: Update by name, and head, of every fine-tuning; the heads started from the same values.
        data: The task's held-out images.
        task, ctx: The stage; the number of accepted fine-tunings and the soup's accuracy are logged.
    """
    heads = [{name: value.detach() for name, value in head.named_parameters()} for _, head in members]

    def soup(chosen: Sequence[int]) -> tuple[Tuner, dict[str, Tensor]]:
        return tuner_with(models, mean_of([members[i][0] for i in chosen])), mean_of([heads[i] for i in chosen])

    @torch.inference_mode()
    def score(chosen: Sequence[int]) -> Score:
        tuner, head = soup(chosen)
        hits, loss = 0, 0.0
        for images, labels in data.batches(64, device=ctx.device):
            logits = functional_call(members[0][1], head, (backbone(images, tuner),)).float()
            hits += int((logits.argmax(1) == labels - task.classes[0]).sum())
            loss += float(cross_entropy(logits, labels - task.classes[0], reduction="sum"))
        return hits / len(data), -loss / len(data)

    accepted = greedy(len(members), score)
    ctx.log("soup_accepted", len(accepted))
    ctx.log("soup_accuracy", score(accepted)[0])
    tuner, head = soup(accepted)
    members[0][1].load_state_dict(head)
    return tuner, members[0][1]
