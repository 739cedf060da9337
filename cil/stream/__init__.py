"""Streams: how labelled images become a sequence of tasks. Nothing here imports torch."""

from cil.stream.online import Online
from cil.stream.protocol import ClassDomainIncremental, ClassIncremental, DomainIncremental, Order, Tasks
from cil.stream.returning import Blurry, Repetition
from cil.stream.sampling import Sampling
from cil.stream.stream import Stream, Task, TaskData, TestData, UnlabelledData, concatenate, past_tasks

__all__ = [
    "Blurry",
    "ClassDomainIncremental",
    "ClassIncremental",
    "DomainIncremental",
    "Online",
    "Order",
    "Repetition",
    "Sampling",
    "Stream",
    "Task",
    "TaskData",
    "Tasks",
    "TestData",
    "UnlabelledData",
    "concatenate",
    "past_tasks",
]
