"""What a learner gets of a task's training images: all of them, or those whose labels the others of the task support.

Old labels are gone and a wrong one is another class of the same task, so a task's own images must do. The votes are
taken on frozen features, so that every learner can be given a filter.
"""

from __future__ import annotations

from dataclasses import replace

from cil.classifiers import votes
from cil.config.cleaning import NoiseFilter
from cil.errors import DataError
from cil.learner import Context, Learner
from cil.stream import Task, TaskData


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
