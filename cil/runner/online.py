"""A stage of a stream that is learned in one pass: batch after batch, with tests in between."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cil.learner import Context, Learner, check_trained
from cil.runner.evaluation import evaluate
from cil.stream import Online, Stream, Task


@dataclass
class Tests:
    """What the tests between the batches of a stage found.

    Attributes:
        images: Number of training images since the test before, one per test.
        accuracy: Accuracy over all classes of which an image was learned, one per test.
        passes: Backbone passes of these tests.
        seconds: Time that they took.
    """

    images: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    passes: int = 0
    seconds: float = 0.0


def learn_batches(
    learner: Learner, stream: Stream, task: Task, online: Online, ctx: Context, since: dict[Any, int]
) -> Tests:
    """Learn a task in one pass, as :func:`cil.runner.stages.learn_task` learns it whole.

    Args:
        learner: The learner.
        stream: The stream, of which the tests read test images.
        task: The task.
        online: Batches, and distance of the tests.
        ctx: Context of the stage; the accuracies are logged as ``anytime``.
        since: As in :func:`cil.runner.evaluation.evaluate`.
    """
    learner.begin(task, ctx)
    # features in the batches in which they are computed everywhere: their rounding does not depend on the stream
    ctx.cache.get(learner, *task.train.source)
    known = {label for earlier in stream.tasks[: task.index] for label in earlier.classes}
    tests, new, left = Tests(), 0, len(task.train)
    for part in online.batches(task):
        learner.train()
        learner.learn(part, ctx)
        learner.eval()
        known |= set(part.train.labels.tolist())
        new, left = new + len(part.train), left - len(part.train)
        part.close()
        if new < online.evaluate_every or not left:
            continue
        started = time.perf_counter()
        found = evaluate(learner, stream, task.index, ctx.cache, since)
        tested = np.isin(found.label, sorted(known))
        if tested.any():
            tests.images.append(new)
            tests.accuracy.append(float((found.predicted == found.label)[tested].mean()))
            ctx.log("anytime", tests.accuracy[-1])
            new = 0
        tests.passes += found.passes
        tests.seconds += time.perf_counter() - started
    check_trained(ctx)
    return tests
