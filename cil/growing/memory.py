"""A growing model without a folder: what ``IncrementalClassifier`` teaches, and can save as a model of `cil learn`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import Tensor

from cil import history, results
from cil.backbone import Backbone
from cil.data.source import ImageSource
from cil.data.transforms import Transforms
from cil.errors import RunError
from cil.features import FeatureCache
from cil.growing import events
from cil.growing.calibration import report, scored
from cil.growing.lesson import open_images, prepare
from cil.growing.records import HOLDOUT, IMAGES, Kept, read_tensors
from cil.growing.setting import Setting, new_header
from cil.growing.stream import LessonStream, image_set, kept_of
from cil.learner import Context, Learner
from cil.learners import registry
from cil.prediction.model import recorded_setting
from cil.results import Header, StageRow
from cil.runner.checkpoint import RunFolder, restore_learner, split_state, to_json
from cil.runner.confidence import FILE as CONFIDENCE
from cil.runner.confidence import Confidence
from cil.runner.plan import Plan
from cil.runner.stages import Observer, Session, prediction_tensors, run_stage
from cil.stream import past_tasks
from cil.utils import hardware

PREDICTIONS = "predictions.safetensors"


@dataclass(frozen=True)
class Stage:
    """What a model's folder holds of a stage, besides the learner: its row, and tensors by the name of their file."""

    row: StageRow
    files: Mapping[str, dict[str, Tensor]]


class MemoryModel:
    """A model that is taught lesson by lesson, in memory.

    A lesson teaches what :meth:`GrowingModel.learn` would, bit for bit, but images that were taught before are taught
    again.

    Args:
        plan: The learner with its settings.
        backbone: Its backbone.
        device: As ``hardware.device``.

    Attributes:
        header: What ``metrics.json`` of its folder would say.
        learner: The learner after all lessons.
        confidence: The calibration on the held-out images of the lessons; None if the plan holds none out.
    """

    def __init__(self, plan: Plan, backbone: Backbone, device: str) -> None:
        accelerator = hardware.accelerator(device)
        self.plan, self.device, self.backbone = plan, device, backbone.to(accelerator.device)
        self.transforms = Transforms(backbone.data_config, plan.config.transform)
        self.header = new_header(Setting(plan, self.backbone, accelerator))
        self.learner = self._fresh()
        self.stages: list[Stage] = []
        held_out = plan.config.stream.validation > 0
        self.confidence = Confidence(backbone.feature_dim) if held_out else None
        self._unchanged_since: dict[Hashable, int] = {}

    def _fresh(self) -> Learner:
        return registry.instantiate(self.plan.cls, self.plan.parameters, self.backbone).to(self.backbone.device)

    def _cache(self) -> FeatureCache:
        return FeatureCache(hardware.accelerator(self.device), self.plan.config.inference_batch_size)

    def teach(self, source: ImageSource) -> None:
        """Teach one more lesson, or raise and be what it was.

        Args:
            source: The images. New classes get their labels in the order of its class names.

        Raises:
            DataError: An image cannot be read, or names of classes differ only in case.
            TrainingError: Training failed.
        """
        holdout = self.plan.config.stream.validation
        given = prepare(open_images(source), holdout, self.header if self.stages else None, [])
        assert given is not None  # it compares with no earlier lesson
        kept = [Kept.of(stage.files[HOLDOUT]) for stage in self.stages]
        images = image_set(given.split, given.positions, given.labels, kept, self.transforms)
        stream = LessonStream(self.header["tasks"], given.names, images, given.labels, given.held_out, kept, [])
        cache, learner, confidence = self._cache(), self.learner, deepcopy(self.confidence)
        session = Session(learner, stream, cache, self.plan.seed, Observer(), dict(self._unchanged_since))
        session.before_test, session.confidence = lambda: stream.test_earlier(learner, cache), confidence
        before = split_state(learner.state_dict())
        try:
            row, predictions = run_stage(session, stream.tasks[-1])
            out = kept_of(learner, cache, images, given.labels, given.held_out)
            if found := scored(learner, [*kept, out], [], cache.accelerator):
                row["confidence"] = report(found)
        except BaseException:
            self.learner = self._fresh()
            past = past_tasks(self.header["tasks"], self.header["class_names"])
            restore_learner(self.learner, past, self._context, {**before[0], **before[1]})
            self.learner.eval()
            raise
        files = {
            PREDICTIONS: prediction_tensors(predictions),
            IMAGES: given.contents.tensors(),
            HOLDOUT: out.tensors(),
        }
        self.header = events.with_lesson(self.header, given.lesson, stream.tasks[-1].classes, given.names)
        self.stages.append(Stage(row, files))
        self.confidence, self._unchanged_since = confidence, session.unchanged_since

    def _context(self, stage: int) -> Context:
        cache = self._cache()
        return Context(cache.accelerator, cache, seed=self.plan.seed, stage=stage)

    def save(self, path: Path, further: Mapping[str, str]) -> None:
        """Write the model as a new folder, which `cil learn` continues; only its last stage has weights.

        Args:
            path: The folder; it must not hold a model or run.
            further: Texts of further files by name.

        Raises:
            RunError: The folder holds a model or run, is in use, or cannot be written.
        """
        folder, rows, checksums = RunFolder(path, keep="last"), [stage.row for stage in self.stages], []
        with folder.locked():
            if (path / "metrics.json").exists() or any(path.glob("stage-*")):
                raise RunError(f"{path}: holds a model or run already; delete it, or give another folder")
            for index, stage in enumerate(self.stages):
                files = {**stage.files}
                if self.confidence is not None and index == len(self.stages) - 1:
                    files[CONFIDENCE] = split_state(self.confidence.state_dict())[0]
                folder.save_stage(index, self.learner, stage.row, files.pop(PREDICTIONS), files)
                checksums.append(results.read_stage(path, index).checksum)
            for name, text in further.items():
                folder.write(name, text)
            folder.write(
                "metrics.json", to_json(results.run_file(cast(Header, self.header), rows, checksums, len(rows)))
            )

    @classmethod
    def load(cls, path: Path, device: str) -> MemoryModel:
        """The model in a folder of `cil learn` or :meth:`save`, which stays as it is.

        Raises:
            RunError: There is no such model, it is damaged, or it no longer predicts some of its classes.
        """
        header, accelerator = events.read(path), hardware.accelerator(device)
        if gone := history.absent(header):
            name = header["class_names"][gone[0]]
            raise RunError(f"{path}: no longer predicts the class {name!r}; such a model is used through its folder")
        if not header["tasks"]:
            raise RunError(f"{path}: has learned nothing yet; teach it first")
        plan, backbone = recorded_setting(path, header, accelerator.device)
        model = cls(plan, backbone, device)
        past = past_tasks(header["tasks"], header["class_names"])
        RunFolder(path).load_learner(model.learner, past, model._context)
        model.learner.eval()
        model.header = {k: v for k, v in header.items() if k not in ("complete", "summary", "stage_checksums")}
        model.stages = [_read(path, index) for index in range(len(header["tasks"]))]
        since = model.stages[-1].row["unchanged_since"]
        model._unchanged_since = dict(zip(model.learner.views(), since, strict=True))
        last = model.stages[-1]
        state = dict(last.files).pop(CONFIDENCE, None)
        model.confidence = None
        if state is not None:
            model.confidence = Confidence(backbone.feature_dim)
            model.confidence.load_state_dict(state)
            model.stages[-1] = replace(last, files={k: v for k, v in last.files.items() if k != CONFIDENCE})
        return model


def _read(path: Path, index: int) -> Stage:
    """What a folder holds of a stage.

    Raises:
        RunError: A file is missing or damaged.
    """
    stored, place = results.read_stage(path, index), results.stage_folder(path, index)
    names = (PREDICTIONS, IMAGES, HOLDOUT, *([CONFIDENCE] if CONFIDENCE in stored.files else []))
    return Stage(stored.row, {name: read_tensors(place / name, stored.files) for name in names})
