"""A stream of which only the first tasks can be read, for the selection of settings or a backbone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cil.backbone import Backbone, load_backbones
from cil.config import Config, StreamConfig
from cil.data.decoded import DecodedSource
from cil.data.images import GIB, ImageSet, subset, training_part
from cil.data.opening import open_source
from cil.data.packed import make_transforms
from cil.data.sources import ImageSource
from cil.data.transforms import Transforms
from cil.errors import StreamError
from cil.runner import make_stream
from cil.runner.plan import Plan
from cil.stream import Stream


def first_order(config: Config) -> Config:
    """The same benchmark with the first class order only, even for learners that list their own orders."""
    entries = [entry.model_copy(update={"orders": None}) for entry in config.learners]
    return config.model_copy(update={"learners": entries, "orders": config.orders[:1]})


class FirstTasks:
    """The training images of the first tasks; reading any other image raises :class:`StreamError`.

    The other images of the same classes (and domains) can be read, too, where a stream leaves some out or shows them in
    later tasks: features are computed class by class. None of them is learned or tested.

    Args:
        count: Number of tasks.

    Attributes:
        facts: Tasks, numbers of images, class order and data fingerprint, for a record; empty until the first stream
            is made.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._last: tuple[Any, Backbone, ImageSet] | None = None
        self._source: tuple[ImageSource, bool] | None = None
        self.facts: dict[str, Any] = {}

    def stream(self, plan: Plan, held_out: StreamConfig, device: torch.device) -> tuple[Stream, Backbone]:
        """The stream of a plan and its backbone.

        Plans of successive calls may differ in learner, backbone and transform, but not in data or class order.

        Args:
            plan: The run.
            held_out: The section ``stream``, which tests on images held out of the training data.
            device: Device of the backbone.

        Raises:
            StreamError: The whole stream has no more tasks than these first ones.
        """
        key = (plan.config.backbone, plan.config.backbones, plan.config.combine, plan.config.transform)
        config = plan.config.model_copy(update={"stream": held_out})
        if self._last is None or self._last[0] != key:
            backbone = load_backbones(config, device)
            transforms = make_transforms(backbone.data_config, config.transform)
            if self._source is None:
                self._source = self._open(config, transforms)
            source, in_memory = self._source
            memory, workers = config.hardware.memory_gib * GIB, config.hardware.workers
            images = ImageSet(source, transforms, in_memory=in_memory, memory_bytes=memory, workers=workers)
            self._last = key, backbone, images
        _, backbone, images = self._last
        stream = make_stream(config, images, images)
        if stream.returns:
            stream.test_only(self._shown(stream))
        return stream, backbone

    def _open(self, config: Config, transforms: Transforms) -> tuple[ImageSource, bool]:
        """The training source, guarded against reads of later tasks, and whether its images fit in memory."""
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
            max_pixels=source.max_pixels,
        )
        decoded = DecodedSource(part, machine.memory_gib * GIB, machine.workers)
        position_of = {int(member): k for k, member in enumerate(members)}

        def read(index: int) -> Any:
            if index not in position_of:
                raise StreamError(f"{source.describe(index)} is of a later task; only the first {self.count} are open")
            return decoded.read(position_of[index])

        first = stream.tasks[: self.count]
        self.facts = {
            "tasks": [[task.names[c] for c in task.classes] for task in first],
            "images": {
                "training": [len(task.train) for task in first],
                "held_out": [len(task.validation or ()) for task in first],
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
            max_pixels=source.max_pixels,
        )
        return guarded, decoded.fits

    def _members(self, config: Config, source: ImageSource, transforms: Transforms) -> tuple[Stream, np.ndarray]:
        """The stream over a source, without reading it, and the positions of the first tasks' images."""
        images = ImageSet(source, transforms, memory_bytes=0)
        stream = make_stream(config, images, images)
        if len(stream) == 1:
            raise StreamError(
                "the stream is a single task, and a choice on all of it says nothing about later tasks; "
                "give it more tasks, e.g. by a smaller stream.increment"
            )
        if self.count >= len(stream):
            raise StreamError(
                f"--first-tasks {self.count}: the stream has {len(stream)} tasks, and a choice on all of them says "
                f"nothing about later tasks; allowed: 1 to {len(stream) - 1}"
            )
        return stream, np.flatnonzero(np.isin(_groups(source), _groups(source)[self._shown(stream)]))

    def _shown(self, stream: Stream) -> np.ndarray:
        """Positions of the images of the first tasks, sorted."""
        first = stream.tasks[: self.count]
        parts = [part for task in first for part in (task.train, task.validation, task.unlabelled) if part]
        return np.sort(np.concatenate([part.source[1] for part in parts]))


def _groups(source: ImageSource) -> np.ndarray:
    """Number of the class and domain of each image, int64 [N]."""
    domains = np.zeros(len(source), dtype=np.int64) if source.domains is None else source.domains
    return source.labels + len(source.class_names) * domains
