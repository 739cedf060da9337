"""A learner as an estimator in scikit-learn's sense: ``fit``, ``partial_fit``, ``predict``, ``score``."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from typing_extensions import TypedDict

from cil import results
from cil.backbone import Backbone, load_backbone
from cil.backbone.loading import EMBEDDED
from cil.config import BackboneConfig, Config, LearnerEntry, TransformConfig, as_section
from cil.config.reading import validated
from cil.data.given import count_images, from_given, labels_of
from cil.data.reading import ImageReader
from cil.errors import ConfigError, DataError, RunError, StreamError, shortened
from cil.growing import DEFAULT_LEARNER
from cil.growing.memory import MemoryModel
from cil.growing.setting import default_learner
from cil.learner import Learner
from cil.prediction.confident import Confident
from cil.prediction.model import Trained
from cil.rows import REJECT_BY
from cil.runner.checkpoint import to_json
from cil.runner.plan import plans
from cil.utils.paths import expand
from cil.utils.randomness import isolated
from cil.utils.stored import read_json, sealed

LABELS = "labels.json"
"""File of a saved model with the labels that ``y`` had: names of classes are texts."""


class _Labels(TypedDict):
    dtype: str
    labels: list[Any]


LABELS_FILE = TypeAdapter(_Labels)


class IncrementalClassifier(ClassifierMixin, BaseEstimator):
    """Classifies images with a class-incremental learner on a frozen backbone, and learns new classes at any time.

    Every call of :meth:`partial_fit` is a stage of a stream: the k-th call learns what ``cil run`` learns in its k-th
    stage from the same images, bit for bit. :meth:`fit` starts again and learns all images in one stage.

    Images (``X``) are a list of paths, PIL images or uint8 arrays [H, W, 3], one uint8 array [N, H, W, 3], or a torch
    dataset. They are decoded and transformed as in a run. Labels (``y``) are names or whole numbers.

    Args:
        learner: Learner as in a configuration: ``"ranpac"``, ``"mine.py:Mine"``, ``{"name": "ranpac", "projection":
            2000}``; None: the default of ``cil learn``, :data:`cil.growing.DEFAULT_LEARNER`.
        backbone: timm name with its tag, a section ``backbone`` of a configuration, or a loaded backbone.
        preprocessing: Section ``transform`` of a configuration; None as the backbone was trained. (An estimator with an
            attribute ``transform`` would be a transformer to scikit-learn.)
        seed: Training seed; (seed, stage) decides everything random in a stage.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        batch_size: Images per forward pass outside training, at least 1.
        holdout: Fraction of each class's images in a call that is not learned, in [0, 1). By these images probabilities
            are calibrated and :meth:`is_known` decides; 0 for neither.

    Attributes:
        classes_: The classes in the order of the columns of :meth:`predict_proba`: sorted after :meth:`fit`; each
            :meth:`partial_fit` appends its new ones.
        learner_: The trained learner.
        backbone_: Its backbone.
        tasks_: The labels of each stage's classes, as positions in ``classes_``.

    Raises:
        CilError: Wrong parameters or data, from ``fit`` on; the constructor checks nothing, as scikit-learn requires.
    """

    def __init__(
        self,
        learner: str | dict[str, Any] | None = None,
        backbone: str | dict[str, Any] | BackboneConfig | Backbone = EMBEDDED,
        *,
        preprocessing: dict[str, Any] | TransformConfig | None = None,
        seed: int = 0,
        device: str = "auto",
        batch_size: int = 128,
        holdout: float = 0.0,
    ) -> None:
        self.learner, self.backbone, self.preprocessing = learner, backbone, preprocessing
        self.seed, self.device, self.batch_size, self.holdout = seed, device, batch_size, holdout

    def fit(self, X: Any, y: Any = None) -> IncrementalClassifier:
        """Forget everything, and learn all classes of ``y`` in one stage.

        Args:
            X: Images.
            y: Labels [N], names or whole numbers; may be left out for a torch dataset that has them.
        """
        labels = self._checked(X, y)
        self._start()
        return self._learn(X, labels, np.unique(labels))

    def partial_fit(self, X: Any, y: Any = None, classes: Any = None) -> IncrementalClassifier:
        """Learn one more task: new classes, more images of known ones, or both. If it fails, nothing has changed.

        Args:
            X: Images of the task.
            y: Labels [N], names or whole numbers; may be left out for a torch dataset that has them.
            classes: All labels that ``y`` may have, in the order of their columns; by default new ones are sorted. A
                class without images gets its column when its first images come: learners know no later classes.

        Raises:
            StreamError: The learner keeps old images, or is defined for new classes only and ``y`` has old ones.
        """
        labels = self._checked(X, y)
        order = np.unique(labels) if classes is None else column_or_1d(classes)
        if len(np.unique(order)) < len(order):
            raise DataError(f"classes: {shortened(order.tolist())} names a class twice; give each label once")
        missing = np.setdiff1d(labels, order)
        if len(missing):
            raise DataError(
                f"y: {missing.tolist()[0]!r} is none of classes={shortened(order.tolist())}; add it, or leave out "
                "classes"
            )
        if not hasattr(self, "_model"):
            self._start()
        return self._learn(X, labels, order[np.isin(order, labels)])

    def predict(self, X: Any) -> np.ndarray:
        """The best class of each image, an array [N] of entries of ``classes_``."""
        best = self._logits(X).argmax(1).numpy()
        return self.classes_[best]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities, float64 [N, C], whose columns are ``classes_``: the softmax of the learner's scores z, with
        ``holdout`` of z/T at the calibrated temperature T.

        Without ``holdout``, scores that are no log-probabilities, such as cosines, give probabilities that say little
        about how often the best class is right.
        """
        logits = self._logits(X)
        confidence = self._model.confidence
        return (logits.double().softmax(1) if confidence is None else confidence.probabilities(logits)).numpy()

    def is_known(self, X: Any, rate: float = 0.05, score: str = REJECT_BY) -> np.ndarray:
        """Whether each image looks like one of ``classes_``, bool [N].

        Args:
            X: Images.
            rate: Fraction of images of known classes for which this may be denied, in (0, 1).
            score: Score by which it is decided, see :class:`cil.runner.confidence.Confidence`.

        Raises:
            ConfigError: ``rate`` or ``score`` is out of range.
            RunError: There are too few held-out images for this rate, or none.
        """
        check_is_fitted(self)
        if self._model.confidence is None:
            raise RunError("is_known: no images are held out to decide by; set holdout, e.g. holdout=0.1, and fit")
        model = Confident(
            self._model.confidence, rate, score, self.learner_, self._model.transforms, _names(self.classes_)
        )
        with torch.inference_mode():
            found = [model.judged(pixels.to(model.device))[1] for pixels in self._batches(X)]
        return np.concatenate([known for known in found if known is not None])

    @property
    def learner_(self) -> Learner:
        return self._model.learner

    @property
    def backbone_(self) -> Backbone:
        return self._model.backbone

    @property
    def tasks_(self) -> list[tuple[int, ...]]:
        return [tuple(task) for task in self._model.header["tasks"]]

    def save(self, folder: str | Path) -> None:
        """Write the fitted model to a new folder, which :meth:`load`, `cil predict`, `cil learn` and `cil export` read.

        Raises:
            RunError: The folder holds a model or run, is in use, or cannot be written.
        """
        check_is_fitted(self)
        labels = {"dtype": self.classes_.dtype.str, "labels": self.classes_.tolist()}
        self._model.save(expand(folder), {LABELS: to_json(sealed(labels))})

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> IncrementalClassifier:
        """The fitted estimator in a folder of :meth:`save`, or of `cil learn`, whose labels are names.

        Raises:
            RunError: There is no model, it is damaged, or it no longer predicts some of its classes.
        """
        place = expand(folder)
        model = MemoryModel.load(place, device)
        config, names = model.plan.config, list(model.header["class_names"])
        entry = model.plan.entry
        learner = {k: v for k, v in entry.model_dump(by_alias=True).items() if v is not None or k in entry.parameters}
        found = cls(
            learner,
            config.backbone,
            preprocessing=config.transform,
            seed=model.plan.seed,
            device=device,
            batch_size=config.inference_batch_size,
            holdout=config.stream.validation,
        )
        found._model, found.classes_ = model, np.array(names)
        if (place / LABELS).exists():
            stored = read_json(place / LABELS, LABELS_FILE, advice=results.RESTORE)
            labels = np.array(stored["labels"], dtype=stored["dtype"])
            if _names(labels) == names:  # neither taught nor renamed through its folder since
                found.classes_ = labels
        return found

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_model") and bool(self.tasks_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = tags.input_tags.sparse = False
        tags.input_tags.three_d_array = tags.input_tags.string = True
        return tags

    def _checked(self, X: Any, y: Any) -> np.ndarray:
        count, labels = count_images(X), labels_of(X) if y is None else y
        check_classification_targets(labels)
        labels = column_or_1d(labels, warn=True)
        if labels.dtype == object:  # names in a table's column
            labels = np.asarray(labels.tolist())
        if len(labels) != count:
            raise DataError(f"X and y must have the same length; got {count} images and {len(labels)} labels")
        return labels

    def _start(self) -> None:
        if not isinstance(self.batch_size, int | np.integer) or self.batch_size < 1:
            raise ConfigError(f"batch_size: {self.batch_size!r}; allowed: whole numbers from 1")
        if not isinstance(self.seed, int | np.integer) or self.seed < 0:
            raise ConfigError(f"seed: {self.seed!r}; allowed: whole numbers from 0")
        if not isinstance(self.holdout, float | int) or not 0 <= self.holdout < 1:
            raise ConfigError(f"holdout: {self.holdout!r}; allowed: from 0 to below 1, e.g. 0.1")
        given = self.backbone if isinstance(self.backbone, Backbone) else None
        section = {"name": given.name} if given else self.backbone
        section = {"name": section} if isinstance(section, str) else section
        learner = DEFAULT_LEARNER if self.learner is None else self.learner
        settings = {
            "data": {"dataset": "cil learn"},
            "stream": {"validation": self.holdout, "test_on": "validation"},
            "learners": [validated(LearnerEntry, as_section(learner), prefix="learner: ")],
            "orders": ["natural"],
            "seeds": [int(self.seed)],
            "inference_batch_size": int(self.batch_size),
            "backbone": validated(BackboneConfig, section, prefix="backbone."),
            "transform": validated(TransformConfig, self.preprocessing or {}, prefix="preprocessing."),
        }
        [plan] = plans(validated(Config, settings))
        backbone = given or load_backbone(plan.config.backbone)
        if self.learner is None:
            [plan] = plans(validated(Config, {**settings, "learners": [default_learner(backbone)]}))
        self._model = MemoryModel(plan, backbone, self.device)
        self.classes_ = np.zeros(0)

    def _learn(self, X: Any, labels: np.ndarray, order: np.ndarray) -> IncrementalClassifier:
        """Learn a task, or raise and be what it was; ``order`` has the classes of ``labels``."""
        self._require_supported(order)
        known = self.classes_ if self.tasks_ else order[:0]
        column = {label: i for i, label in enumerate(order.tolist())}
        positions = np.array([column[label] for label in labels.tolist()], dtype=np.int64)
        self._model.teach(from_given(X, positions, _names(order)))
        self.classes_ = np.concatenate([known, order[~np.isin(order, known)]])
        return self

    def _require_supported(self, order: np.ndarray) -> None:
        """Refuse a further task of the classes ``order`` if the labels or the learner do not allow it."""
        if not self.tasks_:
            return
        cls, known = type(self.learner_), self.classes_
        name = cls.name or cls.__name__
        if _kind(known) != _kind(order):
            raise DataError(
                f"y: labels are {order.dtype} ({order.tolist()[0]!r}, …), those of earlier calls {known.dtype} "
                f"({known.tolist()[0]!r}, …); use one type, e.g. names"
            )
        if cls.stores_images:
            raise StreamError(
                f"{name} keeps old images, which partial_fit does not; use fit on the images of all classes, or "
                "another learner (ncm, ranpac, …)"
            )
        again = order[np.isin(order, known)].tolist()
        if cls.needs_new_classes and again:
            raise StreamError(
                f"{name} is defined for tasks of new classes only, and class {again[0]!r} is known; leave its images "
                "out, or use another learner (ncm, ranpac, …)"
            )

    def _logits(self, X: Any) -> Tensor:
        """Scores [N, C] on the CPU; only one batch of images is in memory at a time."""
        check_is_fitted(self)
        model = Trained(self.learner_, self._model.transforms, _names(self.classes_))
        with torch.inference_mode():
            return torch.cat([model(pixels.to(model.device))[0].cpu() for pixels in self._batches(X)])

    def _batches(self, X: Any) -> Iterator[Tensor]:
        count = count_images(X)
        reader = ImageReader(from_given(X, np.zeros(count, np.int64), [""]), self._model.transforms)
        items = [(i, None) for i in range(count)]
        with ThreadPoolExecutor(2) as pool:  # PIL decodes outside the interpreter lock
            for start in range(0, count, self.batch_size):
                with isolated():
                    pixels = list(pool.map(reader.__getitem__, items[start : start + self.batch_size]))
                yield self._model.transforms.normalize(torch.from_numpy(np.stack(pixels)))


def _names(classes: np.ndarray) -> list[str]:
    return list(map(str, classes.tolist()))


def _kind(labels: np.ndarray) -> str:
    """The kind of labels: two kinds of whole numbers are one."""
    return labels.dtype.kind.replace("u", "i")
