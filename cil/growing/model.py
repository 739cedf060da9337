"""A model that is taught call by call: its folder is that of a run whose stream grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from cil import history
from cil.config import BackboneConfig, LearnerEntry
from cil.config.schema import MAX_PIXELS
from cil.data.transforms import Transforms
from cil.errors import StreamError, shortened
from cil.features import FeatureCache
from cil.growing import HOLDOUT, events
from cil.growing.calibration import open_sure, report, require_sure, scored
from cil.growing.folder import ModelFolder, Point
from cil.growing.forgetting import current, remove, tested
from cil.growing.lesson import Images, Prepared, open_images, prepare
from cil.growing.records import HOLDOUT as KEPT
from cil.growing.records import IMAGES, TRAIN, read_contents, read_kept
from cil.growing.setting import Setting, Settings, new_header
from cil.growing.stream import LessonStream, image_set, kept_of
from cil.learners import registry
from cil.prediction.confident import Confident
from cil.prediction.model import Trained, open_run
from cil.results import Header, StageRow
from cil.rows import Change, Lesson
from cil.runner.display import Display
from cil.runner.identity import continued
from cil.runner.provenance import header_of
from cil.runner.stages import Observer, Session, prediction_tensors, resume, run_stage
from cil.utils.paths import expand


@dataclass(frozen=True)
class Taught:
    """The answer to a call of :meth:`GrowingModel.learn`.

    Attributes:
        stage: Number of the stage, from 0; None if the model had learned all images already.
        rows: The rows of all stages, from which accuracies follow.
        lesson: What is recorded of the call; None as for ``stage``.
        notes: Lines that a user should see.
    """

    stage: int | None
    rows: Sequence[StageRow]
    lesson: Lesson | None = None
    notes: Sequence[str] = field(default_factory=list)


class GrowingModel:
    """A model in a folder, which learns classes call by call. Every call is atomic, and can be undone.

    Args:
        folder: The model's folder; the first call of :meth:`learn` makes it.
        learner: Learner of a new model, as in a configuration: ``"ranpac"``, ``{"name": "ranpac", …}``; default:
            ``cil.growing.DEFAULT_LEARNER``. For a model that is there: refused if it has another one.
        backbone: Its backbone, a name as ``backbone.name`` or a whole section; default: the model that ships with cil.
        device: As ``hardware.device``.
        weights: Place of the backbone's weights, if they were moved since the model was made.
        code: Places of the files of custom classes, if they were moved.
        display: Terminal output; none by default.
        point: See :class:`cil.growing.folder.ModelFolder`.

    Raises:
        ConfigError: The path, or the section of learner or backbone, is wrong.
    """

    def __init__(
        self,
        folder: str | Path,
        learner: LearnerEntry | str | dict[str, Any] | None = None,
        backbone: BackboneConfig | str | dict[str, Any] | None = None,
        *,
        device: str = "auto",
        weights: Path | None = None,
        code: Sequence[Path] = (),
        display: Display | None = None,
        point: Point = lambda name: None,
    ) -> None:
        self.path = expand(folder)
        self._settings = Settings(self.path, learner, backbone, device, weights, code)
        self._folder, self._display = ModelFolder(self.path, point), display or Display()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that the model predicts, in order of appearance; none before the first lesson."""
        if not (self.path / "metrics.json").exists():
            return ()
        header = events.read(self.path)
        return tuple(header["class_names"][label] for label in history.predicted(header))

    def learn(
        self,
        images: Images,
        *,
        holdout: float = HOLDOUT,
        keep_features: bool = False,
        on_error: str = "raise",
        max_pixels: int = MAX_PIXELS,
    ) -> Taught:
        """Teach the model one more task: new classes, more images of known classes, or both.

        Images that their class has learned already are left out, so repeating a call that was killed teaches nothing
        twice.

        Args:
            images: A folder of class folders, a tar file laid out like it, a CSV file with lines path,label, or a
                source, e.g. from :func:`cil.data.sources.from_arrays`.
            holdout: Share of each class's images that is held out for testing, in [0, 1).
            keep_features: Whether the features of all images are kept, and not only those of the held-out ones, so that
                :meth:`forget` needs no images.
            on_error: ``skip`` to leave out files that are no readable images; ``raise`` to refuse them.
            max_pixels: Maximum number of pixels of an image.

        Raises:
            DataError: Nothing can be read there, an image is broken, or names of classes differ only in case.
            RunError: The folder is in use, damaged, full, or holds no model of this version; or the model has another
                learner or backbone than the wanted one.
            PluginError: There is no such learner, or it keeps old images.
            StreamError: The learner is defined for new classes only, and the images show known ones.
            TrainingError: Training failed. The model stays as it was in all these cases.
        """
        split = open_images(images, on_error, max_pixels)
        with self._folder.opened() as header:
            stages = len(header["tasks"]) if header is not None else 0
            given = prepare(split, holdout, header, read_contents(self.path, stages))
            if given is None:
                note = "nothing new: the model has learned all of these images"
                return Taught(None, self._folder.rows(), notes=[note])
            setting = self._settings.of(header, holdout)
            before = header if header and stages else self._start(setting)
            after, rows = self._teach(given, before, setting, keep_features)
            self._folder.draw(after, rows)
        return Taught(stages, rows, given.lesson, given.notes)

    def undo(self) -> Change | Lesson:
        """Take back the last lesson or change, and return it.

        Raises:
            RunError: There is none, or the folder is in use, damaged, or holds no model of this version.
        """
        with self._folder.opened() as header:
            after, event = events.undone(self._there(header), self.path)
            self._folder.commit(after)
            self._folder.clean(after)
            self._folder.draw(after, self._folder.rows())
        return event

    def forget(self, name: str, images: Images | None = None, *, hide: bool = False) -> Change:
        """Remove a class: exactly, or with ``hide`` from what is predicted alone.

        After an exact removal the learner's state is, up to rounding, that of a model which never learned the class.
        Earlier stages keep theirs, so that this can be undone.

        Args:
            name: The class.
            images: The images that it was taught with, for learners that need them.
            hide: Whether the class is no longer predicted although its statistics remain.

        Raises:
            RunError: There is no such class, or it cannot be removed exactly; the message says why.
            DataError: Images are missing among those given.
        """
        with self._folder.opened() as found:
            header = self._there(found)
            label, setting = events.label_of(header, name, self.path), self._settings.of(header)
            learner = current(self.path, header, setting)
            change = events.change("hidden" if hide else "forgotten", header, label)
            if not hide:
                remove(learner, self.path, header, label, setting, images)
                change["folder"], change["files"] = self._folder.save_change(header, learner)
            gone = history.absent(events.with_change(header, change))
            kept = read_kept(self.path, change["stages"])
            change["correct"], change["total"] = tested(learner, kept, gone, setting.accelerator)
            self._folder.commit(events.with_change(header, change))
        return change

    def rename(self, old: str, new: str) -> None:
        """Give a class another name.

        Raises:
            RunError: There is no such class, or another one has the new name or one that differs only in case.
        """
        with self._folder.opened() as found:
            header = self._there(found)
            self._folder.commit(events.renamed(header, events.label_of(header, old, self.path), new, self.path))

    def predictor(self) -> Trained:
        """The model as :func:`cil.prediction.predict` takes it: images → (logits, features), with class names.

        Raises:
            RunError: There is no model, or no lesson yet, or the backbone's weights are not there.
        """
        events.read(self.path)
        settings = self._settings
        return open_run(self.path, settings.device, weights=settings.weights, code=settings.code)

    def confident(self, reject: float | None = None, score: str | None = None) -> Confident:
        """The model as :meth:`predictor` gives it, with probabilities that are calibrated on its held-out images.

        Args:
            reject: Fraction of images of known classes that may be taken for unknown, in (0, 1); None: none is.
            score: By which score; None: as for :func:`cil.growing.calibration.open_sure`.

        Raises:
            RunError: There is no model, or no held-out image has features of the current learner.
            ConfigError: ``reject`` or ``score`` is out of range.
        """
        settings = self._settings
        return require_sure(
            *open_sure(
                self.path, settings.device, reject=reject, score=score, weights=settings.weights, code=settings.code
            )
        )

    def _there(self, header: events.Header | None) -> events.Header:
        return header if header is not None else events.read(self.path)  # which raises

    def _start(self, setting: Setting) -> events.Header:
        """Write the header of a model without a lesson, so that the folder says what it holds, and return it."""
        started = new_header(setting)
        self._folder.commit(started)
        self._folder.point("new")
        return started

    def _teach(
        self, given: Prepared, header: events.Header, setting: Setting, keep_features: bool
    ) -> tuple[events.Header, list[StageRow]]:
        """Teach one lesson, write its stage, and commit it; returns the new header and all rows."""
        plan, backbone, accelerator = setting
        again = sorted({label for task in header["tasks"] for label in task} & set(given.labels.tolist()))
        if plan.cls.needs_new_classes and again:
            raise StreamError(
                f"learner {plan.entry.title} is defined for lessons of new classes only, and "
                f"{shortened(given.names[again[0]])} is known; teach new classes alone, or make a model with another "
                "learner (ncm, fecam, ranpac, …)"
            )
        stage, transforms = len(header["tasks"]), Transforms(backbone.data_config, plan.config.transform)
        kept = read_kept(self.path, stage)
        images = image_set(given.split, given.positions, given.labels, kept, transforms)
        gone = sorted(set(history.absent(header)) - set(given.labels.tolist()))
        stream = LessonStream(header["tasks"], given.names, images, given.labels, given.held_out, kept, gone)
        learner = registry.instantiate(plan.cls, plan.parameters, backbone).to(accelerator.device)
        observer = Observer(self._display)
        cache = FeatureCache(accelerator, plan.config.inference_batch_size, observer.track)
        session = Session(learner, stream, cache, plan.seed, observer)
        session.before_test = lambda: stream.test_earlier(learner, cache)
        rows = resume(session, self._folder)
        row, predictions = run_stage(session, stream.tasks[-1])
        keep = partial(kept_of, learner, cache, images, given.labels)
        held_out = keep(given.held_out)
        if found := scored(learner, [*kept, held_out], gone, accelerator):
            row["confidence"] = report(found)
        further = {IMAGES: given.contents.tensors(), KEPT: held_out.tensors()}
        if keep_features:
            taught = np.setdiff1d(np.arange(len(given.labels)), given.held_out)
            further[TRAIN] = keep(taught).tensors()
        after = events.with_lesson(header, given.lesson, stream.tasks[-1].classes, given.names)
        now = header_of(plan, [], [], [], {}, backbone, transforms, accelerator)
        after |= {"code": now["code"], "versions": now["versions"], "machine": now["machine"]}
        after = dict(continued(cast(Header, after), header, stage))
        self._folder.point("learned")
        self._folder.save_stage(stage, learner, row, prediction_tensors(predictions), further)
        self._folder.point("saved")
        self._folder.commit(after)
        return after, [*rows, row]
