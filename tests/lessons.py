"""Learners in the middle of a stream, for tests that go on from there."""

from __future__ import annotations

from cil.learner import Learner
from cil.stream import Stream
from cil.testing import Case
from cil.testing.setting import context, stream


def taught(case: Case, tasks: int) -> tuple[Learner, Stream]:
    """A new learner after the first tasks of its stream, and the stream."""
    learner = case.learner()
    data = stream(learner.backbone)
    for task in data.tasks[:tasks]:
        teach(learner, task)
    return learner, data


def teach(learner: Learner, task) -> None:
    """One task, with a context of its own."""
    ctx = context()
    learner.begin(task, ctx)
    learner.learn(task, ctx)
