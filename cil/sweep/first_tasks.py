"""A stream of which the first tasks can be read and nothing else: what choosing settings or a backbone may see."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cil.backbone import Backbone, load_backbone
from cil.config import Config, StreamConfig
from cil.data.held import Held
from cil.data.images import GIB, ImageSet, subset, training_part
from cil.data.opening import open_source
from cil.data.sources import ImageSource
from cil.data.transforms import Transforms
from cil.errors import StreamError
from cil.plan import Plan
from cil.runner import make_stream
from cil.stream import Stream


def first_order(config: Config) -> Config:
    """The same benchmark on one first task: the first class order, whatever orders a learner lists."""
    entries = [entry.model_copy(update={"orders": None}) for entry in config.learners]
    return config.model_copy(update={"learners": entries, "orders": config.orders[:1]})


class FirstTasks:
    """The training images of the first tasks, and nothing else: reading any other picture raises.

    Args:
        count: How many tasks.

    Attributes:
        facts: What was opened, once it is, for a record.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._seen: tuple[Any, Backbone, ImageSet] | None = None
        self._held: tuple[ImageSource, bool] | None = None
        self.facts: dict[str, Any] = {}

    def stream(self, plan: Plan, held_out: StreamConfig, device: torch.device) -> tuple[Stream, Backbone]:
        """The stream of a plan, tested on the images held out, and its backbone.

        Plans may differ in learner, backbone and transform, not in data or class order.

        Raises:
            StreamError: So many first tasks are the whole stream.
        """
        key = (plan.config.backbone, plan.config.transform)
        config = plan.config.model_copy(update={"stream": held_out})
        if self._seen is None or self._seen[0] != key:
            backbone = load_backbone(config.backbone, device)
            transforms = Transforms(backbone.data_config, config.transform)
            if self._held is None:
                self._held = self._open(config, transforms)
            source, in_memory = self._held
            memory, workers = config.hardware.memory_gib * GIB, config.hardware.workers
            images = ImageSet(source, transforms, in_memory=in_memory, memory_bytes=memory, workers=workers)
            self._seen = key, backbone, images
        _, backbone, images = self._seen
        return make_stream(config, images, images), backbone

    def _open(self, config: Config, transforms: Transforms) -> tuple[ImageSource, bool]:
        data, machine = config.data, config.hardware
        source = training_part(open_source(data, "train"), data)
        stream, members = self._members(config, source, transforms)
        broken = [i for i in members if source.read_or_none(int(i)) is None] if data.on_error == "skip" else []
        if broken:
            source = subset(source, np.setdiff1d(np.arange(len(source)), broken), "readable")
            stream, members = self._members(config, source, transforms)
        names, labels = np.unique(source.labels[members], return_inverse=True)
        part = ImageSource(
            lambda k: source.read(int(members[k])),
            labels,
            [source.class_names[c] for c in names],
            describe=lambda k: source.describe(int(members[k])),
            fingerprint=source.fingerprint,
        )
        held = Held(part, machine.memory_gib * GIB, machine.workers)
        where = {int(member): k for k, member in enumerate(members)}

        def read(index: int) -> Any:
            if index not in where:
                raise StreamError(f"{source.describe(index)} is of a later task; only the first {self.count} are open")
            return held.read(where[index])

        opened = stream.tasks[: self.count]
        self.facts = {
            "tasks": [[task.names[c] for c in task.classes] for task in opened],
            "images": {
                "training": [len(task.train) for task in opened],
                "held_out": [len(task.validation or ()) for task in opened],
                "broken": len(broken),
            },
            "order": config.orders[0],
            "data": {"train": {"sha256": source.fingerprint}, "test": "not opened"},
        }
        guarded = ImageSource(
            read,
            source.labels,
            source.class_names,
            describe=source.describe,
            fingerprint=source.fingerprint,
            domains=source.domains,
        )
        return guarded, held.fits

    def _members(self, config: Config, source: ImageSource, transforms: Transforms) -> tuple[Stream, np.ndarray]:
        """The stream of a source that is not read yet, and the positions of the first tasks' images."""
        images = ImageSet(source, transforms, memory_bytes=0)
        stream = make_stream(config, images, images)
        if len(stream) == 1:
            raise StreamError(
                "the stream is a single task, and a choice on all of it says nothing about tasks to come; "
                "give it more, e.g. by a smaller stream.increment"
            )
        if self.count >= len(stream):
            raise StreamError(
                f"--first-tasks {self.count}: the stream has {len(stream)} tasks, and a choice on all of them says "
                f"nothing about tasks to come; allowed: 1 to {len(stream) - 1}"
            )
        parts = [part for task in stream.tasks[: self.count] for part in (task.train, task.validation) if part]
        return stream, np.sort(np.concatenate([part.source[1] for part in parts]))
