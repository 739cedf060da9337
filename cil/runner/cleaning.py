"""What a learner gets of a task's training images: those whose labels the others support, and guessed labels of others.

Old labels are gone and a wrong one is another class of the same task, so a task's own images must do. The votes are
taken on frozen features, so that every learner can be given a filter. Guesses are the learner's own.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch

from cil.classifiers import votes
from cil.classifiers.calibration import fit_temperature
from cil.config.cleaning import NoiseFilter, Pseudo
from cil.errors import ConfigError, DataError
from cil.learner import Context, Learner
from cil.stream import Task, TaskData
from cil.stream.protocol import validation_split


def filtered(task: Task, learner: Learner, ctx: Context, wanted: NoiseFilter) -> Task:
    """The task without the training images whose labels look wrong, or with other labels for some of them.

    Votes are comparable among the classes of the task only; a task of one class stays as it is. Every class keeps at
    least one image.

    Args:
        task: The task.
        learner: The learner that will be given the task; only its frozen backbone is used.
        ctx: Context of the stage; the share of kept and of corrected images is logged.
        wanted: The filter.

    Raises:
        DataError: Ridge regression has no prediction for an image that is left out.
    """
    x, labels = ctx.features(learner.backbone, task.train)
    classes, y = labels.unique(return_inverse=True)
    if len(classes) < 2:
        return task
    x = x.double()
    try:
        found = votes.ridge_votes(x, y) if wanted.by == "ridge" else votes.knn_votes(x, y, wanted.neighbours)
    except DataError as error:
        raise DataError(
            f"noise_filter, stage {task.index} ({len(y)} images of {len(classes)} classes): {error}; use "
            "noise_filter.by=knn"
        ) from None
    stay = votes.kept(found, y, None if isinstance(wanted.keep, str) else wanted.keep)
    ctx.log("noise_filter/kept", float(stay.double().mean()))
    if wanted.correct:
        y, both = votes.corrected(found, y, stay)
        ctx.log("noise_filter/corrected", float((both & ~stay).double().mean()))
        stay = both
    images, indices = task.train.source
    chosen = stay.nonzero().flatten().cpu()
    own = classes[y].cpu()[chosen].numpy()
    return replace(task, train=TaskData(images, indices[chosen.numpy()], own))


HELD_OUT = 0.2
"""Fraction of the labelled images on which the probabilities of guesses are calibrated."""


def require_sums(learner: Learner) -> None:
    """Refuse a learner that cannot be fitted to a task several times as cheaply as once.

    Raises:
        ConfigError: It trains parameters, or its classifier is not made of sums.
    """
    if learner.statistics is None or any(True for _ in learner.parameters()):
        raise ConfigError(
            f"{learner.name or type(learner).__name__} is not defined with pseudo, which fits a learner to a task "
            "again with its own guesses, and needs a classifier of sums and nothing that is trained; remove pseudo, or "
            "use ncm, slda or ranpac without a tuner"
        )


def pseudo_labelled(task: Task, learner: Learner, ctx: Context, wanted: Pseudo) -> Task:
    """The task with those of its unlabelled images that the learner is sure about, labelled by it.

    A copy of the learner is fitted to the labelled images and scores the unlabelled ones among the classes of the task.
    softmax(z / T) is calibrated on a fifth of the labelled images, which a first copy was not fitted to. The learner
    itself is fitted once, to all images together, so that its sums are those of one task. Accepted images weigh as much
    as labelled ones.

    Args:
        task: The task; without unlabelled images it stays as it is.
        learner: The learner before the task, made of sums (:func:`require_sums`).
        ctx: Context of the stage; the share of accepted images is logged.
        wanted: Threshold and rounds.
    """
    if task.unlabelled is None or not len(task.unlabelled):
        return task
    images, known = task.train.source
    labels, unlabelled = task.train.labels, task.unlabelled.source[1]
    classes = torch.tensor(task.classes)

    def scores(indices: np.ndarray, labels: np.ndarray, wanted: np.ndarray) -> torch.Tensor:
        """Scores of the images ``wanted`` by a copy that has learned the others, [n, classes of the task]."""
        trial = copy.deepcopy(learner, {id(learner.backbone): learner.backbone})
        own = Context(ctx.accelerator, ctx.cache, seed=ctx.seed, stage=ctx.stage)
        part = replace(task, train=TaskData(images, indices, labels), validation=None, unlabelled=None)
        trial.begin(part, own)
        trial.learn(part, own)
        trial.eval()
        with torch.inference_mode():
            features = ctx.cache.get(trial, images, wanted).to(ctx.device)
            return trial.logits(trial.join(features)).float().cpu()[:, classes]

    fitted, held_out = validation_split(labels, HELD_OUT, ctx.seed)
    temperature = 1.0
    if len(held_out):
        found = scores(known[fitted], labels[fitted], known[held_out])
        temperature = fit_temperature(found, torch.searchsorted(classes, torch.from_numpy(labels[held_out])))
    indices, given = known, labels
    for _ in range(wanted.rounds):
        probability, guess = (scores(indices, given, unlabelled) / temperature).softmax(1).max(1)
        sure = (probability >= wanted.at(task.index)).numpy()
        indices = np.concatenate([known, unlabelled[sure]])
        given = np.concatenate([labels, classes[guess].numpy()[sure]])
    ctx.log("pseudo/accepted", float(sure.mean()))
    return replace(task, train=TaskData(images, indices, given))
