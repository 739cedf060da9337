"""Streams: how labelled images become a sequence of tasks. Nothing here imports torch."""

from cil.stream.protocol import ClassIncremental, DomainIncremental, Order, Tasks
from cil.stream.stream import Stream, Task, TaskData, TestData, concatenate, past_tasks

__all__ = [
    "ClassIncremental",
    "DomainIncremental",
    "Order",
    "Stream",
    "Task",
    "TaskData",
    "Tasks",
    "TestData",
    "concatenate",
    "past_tasks",
]
