"""The stream of a growing model: past lessons without images, and one lesson that is taught now."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from cil.data.images import ImageSet, LoadedSplit
from cil.data.pixels import Undecoded
from cil.data.source import ImageSource
from cil.data.transforms import Transforms
from cil.errors import StreamError
from cil.features import FeatureCache
from cil.growing.records import Kept, key
from cil.learner import Learner
from cil.stream import Stream, Task, TaskData, TestData, past_tasks


def image_set(
    split: LoadedSplit, positions: np.ndarray, labels: np.ndarray, kept: Sequence[Kept], transforms: Transforms
) -> ImageSet:
    """The images of a lesson, then a place for each held-out image of earlier lessons, of which features alone exist.

    Every earlier lesson is a domain of its own, so that the batches in which features are computed are those that the
    lesson's images would have without the others.

    Args:
        split: The images that were given.
        positions: Those among them that are taught or held out, int64 [N].
        labels: Their labels, int64 [N].
        kept: The held-out images of earlier lessons.
        transforms: The backbone's transforms.
    """
    base = split.source
    every = np.concatenate([labels, *(one.label for one in kept)])
    present = np.unique(every)
    sizes = [len(labels), *(len(one.label) for one in kept)]

    def read(index: int) -> Undecoded:
        if index >= len(positions):
            raise StreamError("the images of earlier lessons are not kept")
        return base._read(int(positions[index]))

    source = ImageSource(
        read,
        np.searchsorted(present, every),
        [str(label) for label in present],
        describe=lambda i: base.describe(int(positions[i])) if i < len(positions) else "an image of an earlier lesson",
        fingerprint=hashlib.sha256(f"{base.fingerprint} lesson".encode() + every.tobytes()).hexdigest(),
        domains=np.repeat(np.arange(len(sizes)), sizes),
        stamp=base.stamp,
        max_pixels=base.max_pixels,
    )
    return split.images(transforms, source)


def kept_of(learner: Learner, cache: FeatureCache, images: ImageSet, labels: np.ndarray, positions: np.ndarray) -> Kept:
    """What a lesson keeps of some of its images: features of all of the learner's views and of the frozen backbone.

    Models are found and routed between by the latter (:mod:`cil.reuse`).

    Args:
        learner: The learner after the lesson.
        cache: The lesson's features.
        images: Its image set, from :func:`image_set`.
        labels: Label of each of its images, int64 [N].
        positions: The images of which features are kept.
    """
    features = {}
    if len(positions):
        features = {**cache.parts(learner, images, positions), **cache.parts(learner.backbone, images, positions)}
    return Kept(labels[positions], {key(version): x for version, x in features.items()})


class LessonStream(Stream):
    """Past lessons, whose images are gone, and the current one.

    Args:
        past: Labels of the classes of each past lesson.
        names: Names of all classes, the current lesson's included, by label.
        images: The image set of the lesson, from :func:`image_set`.
        labels: Label of each of the lesson's images, int64 [N].
        held_out: Positions of the held-out ones.
        kept: What the past lessons hold out.
        absent: Labels that are not predicted, and whose held-out images are not tested.
    """

    def __init__(
        self,
        past: Sequence[Sequence[int]],
        names: Sequence[str],
        images: ImageSet,
        labels: np.ndarray,
        held_out: np.ndarray,
        kept: Sequence[Kept],
        absent: Sequence[int],
    ) -> None:
        self.class_names, self.order = tuple(names), tuple(range(len(names)))
        self.absent = tuple(absent)
        trained = np.setdiff1d(np.arange(len(labels)), held_out)
        task = Task(
            index=len(past),
            classes=tuple(np.unique(labels).tolist()),
            seen=self.order,
            names=self.class_names,
            train=TaskData(images, trained, labels[trained]),
            validation=TaskData(images, held_out, labels[held_out]) if len(held_out) else None,
        )
        self.tasks = (*past_tasks(past, names), task)
        self.groups = tuple(one.classes for one in self.tasks)
        self._kept, self._ends = list(kept), np.cumsum([len(labels), *(len(one.label) for one in kept)])
        every = np.concatenate([labels, *(one.label for one in kept)])
        nothing = np.zeros(0, dtype=np.int64)
        self._test = TestData(images, every, [*(nothing for _ in past), held_out], "held-out")

    def test_earlier(self, learner: Learner, cache: FeatureCache) -> None:
        """Test the past lessons, too, as far as features of all of the learner's current views are kept.

        It is called when the lesson has been learned: only then it is known which views have changed.
        """
        with self.open_test() as test:
            for lesson, one in enumerate(self._kept):
                positions = np.arange(self._ends[lesson], self._ends[lesson + 1])
                views = {key(version): version for version in learner.views()}
                if not views.keys() <= one.features.keys():
                    continue
                for name, version in views.items():
                    cache.put(learner, version, test.images, positions, one.features[name])
                test.members[lesson] = positions[~np.isin(one.label, self.absent)]
