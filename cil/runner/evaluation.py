"""One classifier over all classes seen, tested on the test images of all tasks so far, without task ids."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from cil import metrics
from cil.errors import PluginError
from cil.features import FeatureCache
from cil.learner import Learner, RoutedLearner
from cil.results import Counts
from cil.rows import OfStream
from cil.stream import Stream

TOP = 5


@dataclass(frozen=True)
class Predictions:
    """Predictions for the test images of all tasks so far, in a fixed mixed order.

    Attributes:
        index: Position in the test set, int64 [N].
        task: Task of the image, int64 [N].
        label: True label in order of appearance, int64 [N].
        predicted: argmax over all classes seen, int64 [N].
        within: argmax over the classes whose test images belong to the image's task, int64 [N].
        top: The min(5, C) best classes, best first, int64 [N, min(5, C)].
        passes: Backbone passes of this evaluation in this process, whether features were computed or read.
        read: Passes among these whose features came from the store.
        routed: Task that a :class:`cil.learner.RoutedLearner` chose for each image, int64 [N]; None for other learners.
        oracle: argmax over all classes seen if the task is given, int64 [N]; None for other learners.
    """

    index: np.ndarray
    task: np.ndarray
    label: np.ndarray
    predicted: np.ndarray
    within: np.ndarray
    top: np.ndarray
    passes: int
    read: int
    routed: np.ndarray | None = None
    oracle: np.ndarray | None = None


def evaluate(
    learner: Learner,
    stream: Stream,
    stage: int,
    cache: FeatureCache,
    unchanged_since: Mapping[Hashable, int] | None = None,
) -> Predictions:
    """Test ``learner`` after ``stage``.

    Tasks are mixed within batches, so that predictions that depend on the rest of the batch cannot exploit task-ordered
    test images.

    Args:
        unchanged_since: Version of each of the learner's views → the stage since which it has not changed (default:
            this stage). It fixes the batches in which features are computed, so that an interrupted run uses the same
            ones. (For the frozen backbone, the data fix them.)
    """
    since = {version: (unchanged_since or {}).get(version, stage) for version in learner.views()}
    task_classes = [list(group) for group in stream.groups[: stage + 1]]
    with stream.open_test() as test:
        parts = [test.task(j)[0] for j in range(stage + 1)]
        groups = {v: [_mixed(np.concatenate(parts[: s + 1])), *parts[s + 1 :]] for v, s in since.items()}
        images = test.images
        # computed already, unless the run was resumed: not a cost of this stage
        cache.fill(learner, images, {v: groups[v][:-1] for v, s in since.items() if s < stage})
        passes, read = learner.backbone.passes + cache.passes_saved, cache.read
        cache.fill(learner, images, groups)
        passes, read = learner.backbone.passes + cache.passes_saved - passes, cache.read - read
        index = _mixed(np.concatenate(parts))
        if not len(index):
            return _none(learner)
        features = cache.get(learner, images, index)
        label = test.labels[index]
    task_of = np.zeros(len(images), dtype=np.int64)
    for j, part in enumerate(parts):
        task_of[part] = j
    task = task_of[index]
    allowed = torch.full((stage + 1, len(stream.tasks[stage].seen)), float("-inf"))
    for j, classes in enumerate(task_classes):
        allowed[j, classes] = 0
    predicted, within, top = [], [], []
    routed, oracle = [], []
    was_training = learner.training
    learner.eval()
    with torch.inference_mode(), cache.accelerator.autocast():
        for start in range(0, len(index), cache.batch_size):
            rows = slice(start, start + cache.batch_size)
            logits = learner.logits(learner.join(features[rows].to(cache.accelerator.device))).float().cpu()
            if logits.shape[1] != allowed.shape[1]:
                raise PluginError(
                    f"{type(learner).__name__}.logits gave {logits.shape[1]} columns after stage {stage}, where "
                    f"{allowed.shape[1]} classes have been seen; it must give one per class, in order of appearance"
                )
            if stream.absent:
                logits = logits.index_fill(1, torch.tensor(stream.absent), float("-inf"))
            predicted.append(logits.argmax(1))
            within.append((logits + allowed[torch.from_numpy(task[rows])]).argmax(1))
            top.append(logits.topk(min(TOP, logits.shape[1]), dim=1).indices)
            if isinstance(learner, RoutedLearner):
                x = features[rows].to(cache.accelerator.device)
                routed.append(learner.route(x).cpu())
                oracle.append(learner.routed_logits(x, torch.from_numpy(task[rows]).to(x.device)).argmax(1).cpu())
    learner.train(was_training)
    first, own, best = (torch.cat(parts).numpy() for parts in (predicted, within, top))
    asked = (torch.cat(parts).numpy() if parts else None for parts in (routed, oracle))
    return Predictions(index, task, label, first, own, best, passes, read, *asked)


def count_correct(predictions: Predictions, stream: Stream, stage: int) -> Counts:
    """Counts of correct predictions by task, and the metrics of one stage that need the predictions themselves."""
    stages, tested = stage + 1, len(predictions.label) > 0
    hit, hit_within = predictions.predicted == predictions.label, predictions.within == predictions.label
    seen = len(stream.tasks[stage].seen)
    classes = stream.groups[:stages]
    disjoint = sum(map(len, classes)) == seen
    task_of = np.zeros(seen, dtype=np.int64)
    for j, members in enumerate(classes):
        task_of[list(members)] = j
    row: Counts = {
        "correct": np.bincount(predictions.task[hit], minlength=stages).tolist(),
        "correct_within_task": np.bincount(predictions.task[hit_within], minlength=stages).tolist(),
        "total": np.bincount(predictions.task, minlength=stages).tolist(),
        "top5_accuracy": float((predictions.top == predictions.label[:, None]).any(1).mean()) if tested else None,
        "class_mean_accuracy": metrics.class_mean_accuracy(
            metrics.confusion_counts(predictions.label, predictions.predicted, seen)
        )
        if tested
        else None,
        # domains share their classes, so a predicted class says nothing about the task there
        "task_id_accuracy": metrics.task_id_accuracy(task_of[predictions.predicted], predictions.task)
        if disjoint and tested
        else None,
    }
    if predictions.routed is not None and predictions.oracle is not None and tested:
        row["router_accuracy"] = metrics.task_id_accuracy(predictions.routed, predictions.task)
        row["oracle_router_accuracy"] = float(np.mean(predictions.oracle == predictions.label))
    if of_stream := _of_stream(predictions, stream):
        row["stream"] = of_stream
    return row


def _of_stream(predictions: Predictions, stream: Stream) -> OfStream:
    """What the kind of the stream adds to a row; nothing for most streams."""
    row: OfStream = {}
    if stream.few_shots:
        row["few_shots"] = True
    if stream.returns:
        row["returning"] = True
    if stream.long_tail is not None:
        group = metrics.frequency_group(stream.long_tail)[predictions.label]
        hit = predictions.predicted == predictions.label
        groups = len(metrics.FREQUENCIES)
        row["by_frequency"] = {
            "correct": np.bincount(group[hit], minlength=groups).tolist(),
            "total": np.bincount(group, minlength=groups).tolist(),
        }
    return row


def _none(learner: Learner) -> Predictions:
    """The predictions of a stage without test images."""
    nothing = np.zeros(0, dtype=np.int64)
    routed = nothing if isinstance(learner, RoutedLearner) else None
    top = np.zeros((0, 1), dtype=np.int64)
    return Predictions(nothing, nothing, nothing, nothing, nothing, top, 0, 0, routed, routed)


def _mixed(items: np.ndarray) -> np.ndarray:
    return items[np.random.RandomState(0).permutation(len(items))]
