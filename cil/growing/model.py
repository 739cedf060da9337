"""A model that is taught call by call: its folder is that of a run whose stream grows.

``metrics.json`` says which stages, classes and changes the model consists of, and is replaced in one step. What a
killed process has written beside it is no part of the model, and is deleted by the next command that writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator

from cil import history, results
from cil.backbone import Backbone, load_backbone
from cil.config import BackboneConfig, Config, LearnerEntry, as_section
from cil.config.names import fitting
from cil.config.reading import validated
from cil.config.schema import MAX_PIXELS
from cil.data.transforms import Transforms
from cil.errors import PluginError, RunError, StreamError, shortened
from cil.features import FeatureCache
from cil.growing import DEFAULT_LEARNER, HOLDOUT, events
from cil.growing.forgetting import without
from cil.growing.lesson import Images, Prepared, open_images, prepare
from cil.growing.records import HOLDOUT as KEPT
from cil.growing.records import IMAGES, Kept, key, read_contents, read_kept
from cil.growing.stream import LessonStream, image_set
from cil.learners import registry
from cil.prediction.model import Trained, open_run, recorded_setting
from cil.results import Header, StageRow
from cil.rows import Change, Lesson
from cil.runner.checkpoint import RunFolder, to_json, write_state
from cil.runner.display import Display
from cil.runner.identity import continued
from cil.runner.plan import Plan, plans
from cil.runner.provenance import header_of
from cil.runner.stages import Observer, Session, prediction_tensors, resume, run_stage
from cil.runner.tensorboard import Tracker
from cil.utils import hardware
from cil.utils.files import flush, fresh, remove
from cil.utils.paths import expand

Point = Callable[[str], None]


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
            :data:`cil.growing.DEFAULT_LEARNER`. For a model that is there: refused if it has another one.
        backbone: Its backbone, a name as ``backbone.name`` or a whole section; default: the model that ships with cil.
        device: As ``hardware.device``.
        weights: Place of the backbone's weights, if they were moved since the model was made.
        code: Places of the files of custom classes, if they were moved.
        display: Terminal output; none by default.
        point: Called with the name of each point at which a killed process leaves something else on the disk; for
            tests.

    Raises:
        ConfigError: The path, the learner's settings or the backbone's section are wrong.
        PluginError: There is no such learner.
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
        self._entry = None if learner is None else validated(LearnerEntry, as_section(learner))
        self._wanted = None if backbone is None else validated(BackboneConfig, as_section(backbone), "backbone: ")
        self._device, self._weights, self._code = device, weights, tuple(code)
        self._display, self._point = display or Display(), point
        self._folder = RunFolder(self.path)
        self._loaded: tuple[Plan, Backbone, Accelerator] | None = None
        self._config: dict[
            str, Any
        ] = {}  # the recorded configuration that is loaded; empty just after the model is made

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that the model predicts, in order of appearance; none before the first lesson."""
        if not (self.path / "metrics.json").exists():
            return ()
        header = events.read(self.path)
        return tuple(header["class_names"][label] for label in history.predicted(header))

    def learn(
        self, images: Images, *, holdout: float = HOLDOUT, on_error: str = "raise", max_pixels: int = MAX_PIXELS
    ) -> Taught:
        """Teach the model one more task: new classes, more images of known classes, or both.

        Images that their class has learned already are left out, so repeating a call that was killed teaches nothing
        twice.

        Args:
            images: A folder of class folders, a tar file laid out like it, a CSV file with lines path,label, or a
                source, e.g. from :func:`cil.data.sources.from_arrays`.
            holdout: Share of each class's images that is held out for testing, in [0, 1).
            on_error: ``skip`` to leave out files that are no readable images; ``raise`` to refuse them.
            max_pixels: Maximum number of pixels of an image.

        Raises:
            DataError: Nothing can be read there, an image is broken, or names of classes differ only in case.
            RunError: The folder is in use, damaged, full, or holds no model of this version.
            PluginError: The learner keeps old images.
            StreamError: The learner is defined for new classes only, and the images show known ones.
            TrainingError: Training failed. The model stays as it was in all these cases.
        """
        split = open_images(images, on_error, max_pixels)
        with self._locked() as header:
            stages = len(header["tasks"]) if header is not None else 0
            given = prepare(split, holdout, header, read_contents(self.path, stages))
            if given is None:
                return Taught(
                    None, self._folder.rows(), notes=["nothing new: the model has learned all of these images"]
                )
            plan, backbone, accelerator = self._setting(header, holdout)
            before = header if header and stages else self._new_header(plan, backbone, accelerator)
            after, rows = self._teach(given, before, plan, backbone, accelerator)
            self._track(after, rows)
        return Taught(stages, rows, given.lesson, given.notes)

    def undo(self) -> Change | Lesson:
        """Take back the last lesson or change, and return it.

        Raises:
            RunError: There is none, or the folder is in use, damaged, or holds no model of this version.
        """
        with self._locked() as header:
            after, event = events.undone(self._there(header), self.path)
            self._commit(after)
            self._clean(after)
            self._track(after, self._folder.rows())
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
        with self._locked() as found:
            header = self._there(found)
            label = events.label_of(header, name, self.path)
            change: Change = {
                "when": events.now(),
                "kind": "hidden" if hide else "forgotten",
                "label": label,
                "stages": len(header["tasks"]),
                "name": name,
                "folder": "",
                "files": {},
            }
            if not hide:
                change |= self._forget(header, label, images)  # type: ignore[assignment]
            self._commit(events.with_change(header, change))
        return change

    def rename(self, old: str, new: str) -> None:
        """Give a class another name.

        Raises:
            RunError: There is no such class, or another one has the new name or one that differs only in case.
        """
        with self._locked() as found:
            header = self._there(found)
            self._commit(events.renamed(header, events.label_of(header, old, self.path), new, self.path))

    def predictor(self) -> Trained:
        """The model as :func:`cil.prediction.predict` takes it: images → (logits, features), with class names."""
        events.read(self.path)
        return open_run(self.path, self._device, weights=self._weights, code=self._code)

    @contextmanager
    def _locked(self) -> Iterator[events.Header | None]:
        """Lock the folder, delete what killed processes have left there, and yield the header; None without a model.

        Raises:
            RunError: Another process holds the folder, or it holds something else.
        """
        with self._folder.locked():
            header = None
            if (self.path / "metrics.json").exists():
                header = events.read(self.path)
            elif any(self.path.glob("stage-*")):
                raise RunError(f"{self.path}: holds stages but no metrics.json; {results.RESTORE}")
            if header is not None:
                self._clean(header)
            yield header

    def _there(self, header: events.Header | None) -> events.Header:
        return header if header is not None else events.read(self.path)  # which raises

    def _clean(self, header: events.Header) -> None:
        """Delete the folders of stages and changes that are no part of the model."""
        listed = events.listed_folders(header)
        with self._folder.reported():
            for pattern in ("stage-*", "change-*", ".change-*"):
                for place in sorted(self.path.glob(pattern), reverse=True):
                    if place.name not in listed:
                        self._point("clean")
                        remove(place)

    def _setting(self, header: events.Header | None, holdout: float) -> tuple[Plan, Backbone, Accelerator]:
        """Learner and backbone: those of the model, or the wanted ones for a new model or one without a lesson."""
        if header is None or not header["tasks"]:
            self._config, self._loaded = {}, self._new_setting(holdout)
            return self._loaded
        if self._loaded is None or self._config not in ({}, header["config"]):
            accelerator = hardware.accelerator(self._device, header["config"]["precision"])
            device, weights, code = accelerator.device, self._weights, self._code
            setting = recorded_setting(self.path, header, device, weights=weights, code=code)
            self._loaded = (*setting, accelerator)
        self._config = header["config"]
        plan, backbone, _ = self._loaded
        if self._entry is not None and (wanted := self._plan(holdout).entry) != plan.entry:
            raise RunError(
                f"{self.path}: its learner is {shortened(plan.entry.title)} with {shortened(plan.entry.parameters)}, "
                f"not {shortened(wanted.title)} with {shortened(wanted.parameters)}; leave it out, or give a new folder"
            )
        if self._wanted is not None and self._wanted.name not in (backbone.name, plan.config.backbone.name):
            raise RunError(
                f"{self.path}: its backbone is {backbone.name}; leave the backbone out, or give a new folder"
            )
        return self._loaded

    def _new_setting(self, holdout: float) -> tuple[Plan, Backbone, Accelerator]:
        plan = self._plan(holdout)
        if plan.cls.stores_images:
            raise PluginError(
                f"learner {plan.entry.title} keeps old images, and a model of `cil learn` keeps none; "
                "choose another one (see `cil list learners`)"
            )
        accelerator = hardware.accelerator(self._device, plan.config.precision)
        return plan, load_backbone(plan.config.backbone, accelerator.device), accelerator

    def _plan(self, holdout: float) -> Plan:
        settings: dict[str, Any] = {
            "name": fitting(self.path.absolute().name),
            "data": {"dataset": "cil learn"},
            "stream": {"validation": holdout, "test_on": "validation"},
            "learners": [DEFAULT_LEARNER if self._entry is None else self._entry],
            "orders": ["natural"],
        }
        if self._wanted is not None:
            settings["backbone"] = self._wanted
        [plan] = plans(validated(Config, settings))
        return plan

    def _new_header(self, plan: Plan, backbone: Backbone, accelerator: Accelerator) -> events.Header:
        """The header of a model without a lesson, which is written first, so that the folder says what it holds."""
        transforms = Transforms(backbone.data_config, plan.config.transform)
        header: Header = header_of(plan, [], [], [], events.data_of([]), backbone, transforms, accelerator)
        header |= {"growing": history.VERSION, "lessons": [], "changes": []}  # type: ignore[typeddict-item]
        self._commit(cast(events.Header, header))
        self._point("new")
        return cast(events.Header, header)

    def _teach(
        self, given: Prepared, header: events.Header, plan: Plan, backbone: Backbone, accelerator: Accelerator
    ) -> tuple[events.Header, list[StageRow]]:
        """Teach one lesson, write its stage, and commit it; returns the new header and all rows."""
        old = {label for task in header["tasks"] for label in task}
        again = sorted(old & set(given.labels.tolist()))
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
        features = cache.parts(learner, images, given.held_out) if len(given.held_out) else {}
        out = Kept(given.labels[given.held_out], {key(version): x for version, x in features.items()})
        further = {IMAGES: given.contents.tensors(), KEPT: out.tensors()}
        after = events.with_lesson(header, given.lesson, stream.tasks[-1].classes, given.names)
        now = header_of(plan, [], [], [], {}, backbone, transforms, accelerator)
        fresh_facts = {name: now[name] for name in ("code", "versions", "machine")}  # type: ignore[literal-required]
        after = dict(continued(cast(Header, {**after, **fresh_facts}), header, stage))
        self._point("learned")
        self._folder.save_stage(stage, learner, row, prediction_tensors(predictions), further)
        self._point("saved")
        self._commit(after)
        return after, [*rows, row]

    def _forget(self, header: events.Header, label: int, images: Images | None) -> dict[str, Any]:
        """Write the state without a class to a folder of its own; returns the folder and its files."""
        setting = self._setting(header, HOLDOUT)
        learner = without(self.path, header, label, setting, images)
        taken = [int(change["folder"].removeprefix("change-")) for change in header["changes"] if change["folder"]]
        name = f"change-{max(taken, default=-1) + 1:02d}"
        temporary = fresh(self.path / name)
        with self._folder.reported():
            temporary.mkdir()
            files = write_state(learner, temporary)
            for file in temporary.iterdir():
                flush(file)
            self._point("changed")
            temporary.rename(self.path / name)
            flush(self.path)
        self._point("named")
        return {"folder": name, "files": files}

    def _commit(self, header: events.Header) -> None:
        """Replace ``metrics.json``: from here on, the model is what this header says."""
        stages = [results.read_stage(self.path, stage) for stage in range(len(header["tasks"]))]
        rows, checksums = [one.row for one in stages], [one.checksum for one in stages]
        self._point("commit")
        known = {name: fact for name, fact in header.items() if name not in ("complete", "summary", "stage_checksums")}
        content = results.run_file(cast(Header, known), rows, checksums, len(stages))
        self._folder.write("metrics.json", to_json(content))
        self._point("committed")

    def _track(self, header: events.Header, rows: Sequence[StageRow]) -> None:
        """Draw all stages for TensorBoard again: they are few, and one of them may have been undone."""
        tracker = Tracker(self.path, cast(Header, header))
        if rows:
            tracker.replay(rows)
            tracker.finish(results.summarise(rows))
        tracker.close()
