"""The contract between a learner and the rest of the package.

A learner states how it turns images into features (:meth:`Learner.views`), how it scores classes
(:meth:`Learner.logits`) and how it trains on one task (:meth:`Learner.learn`). It does not depend on the runner, the
disk or TensorBoard. The checks that every learner must pass are in :mod:`cil.testing`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cil.backbone import Backbone, Backbones, text_side
from cil.classifiers.base import StatisticsClassifier, match_saved_shapes
from cil.classifiers.joined import Joined
from cil.config import Section
from cil.errors import PluginError, TrainingError
from cil.features import FeatureCache, View, Viewer
from cil.stream import Task, TaskData
from cil.utils import hardware
from cil.utils.randomness import generator

T = TypeVar("T")


class LearnerConfig(Section):
    """Hyper-parameters of a learner. Unknown keys are errors. The defaults are one setting for all datasets."""


class Context:
    """What ``begin`` and ``learn`` receive beside the task: device, random generator, feature cache and logging.

    The runner makes one per stage. ``Context(stage=task.index)`` is enough to use a learner without the runner.

    Args:
        accelerator: Device, mixed precision and processes; by default the CPU in float32.
        cache: Feature cache of the run; by default a new one.
        seed: Training seed of the run.
        stage: Index of the current stage; it seeds the stage's random generator together with ``seed``.
        log: Callback (name, value). The runner writes the values to TensorBoard under ``train/``, numbered per name.
        track: Function that wraps an iterable in a progress bar: (iterable, description, length) → iterable.

    Attributes:
        generator: Source of all random numbers of the stage.
        trainable_parameters: Number of parameters trained in this stage; of several training loops the largest.
        histograms: Counts reported by :meth:`histogram`, by name.
        learner: The learner whose stage this is; ``Learner.begin`` sets it, so that errors can name its tensors.
    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        cache: FeatureCache | None = None,
        *,
        seed: int = 0,
        stage: int = 0,
        log: Callable[[str, float], None] | None = None,
        track: Callable[[Iterable[Any], str, int], Iterable[Any]] | None = None,
    ) -> None:
        self.accelerator = accelerator or hardware.accelerator("cpu")
        self.cache, self.seed, self.stage = cache or FeatureCache(self.accelerator), seed, stage
        self.generator = generator(seed, stage)
        self.trainable_parameters = 0
        self.histograms: dict[str, list[float]] = {}
        self.learner: Learner | None = None
        self._log, self._track = log, track

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def log(self, name: str, value: float) -> None:
        """Report a number of this stage, e.g. the loss of an epoch. The n-th value of a name is plotted at step n."""
        if self._log is not None:
            self._log(name, float(value))

    def track(self, items: Iterable[T], description: str, length: int) -> Iterator[T]:
        """Iterate with a progress bar, if the run displays any."""
        return iter(items if self._track is None else self._track(items, description, length))

    def histogram(self, name: str, counts: Iterable[float]) -> None:
        """Report how often each of several numbered items was used in this stage, e.g. the prompts of a pool.

        The counts are stored with the stage in ``metrics.json`` and plotted as one histogram per stage.
        """
        self.histograms[name] = [float(count) for count in counts]

    def features(self, viewer: Viewer, data: TaskData) -> tuple[Tensor, Tensor]:
        """Features of a task's images under the test transform, and their labels; computed once per image and view.

        Those of a learner on several backbones are joined, see :meth:`Learner.join`.

        Args:
            viewer: The learner, for its own features, or its backbone, for the frozen ones.
            data: Images of the task.

        Returns:
            (float32 [N, F] on the device, int64 [N] on the device).
        """
        images, indices = data.source
        labels = torch.as_tensor(data.labels).to(self.device)
        features = self.cache.get(viewer, images, indices).to(self.device)
        return viewer.join(features, labels) if isinstance(viewer, Learner) else features, labels

    def texts(self, backbone: Backbone, texts: Sequence[str]) -> Tensor:
        """Vectors of a group of texts, e.g. of all sentences about one class, float32 [n, d] on the device.

        Raises:
            BackboneError: The backbone has no text side.
        """
        return self.cache.texts(text_side(backbone), texts).to(self.device)


class Learner(nn.Module, ABC):
    """A class-incremental learner on a frozen backbone.

    A subclass sets :class:`Config` and implements :meth:`learn` and :meth:`logits`. It overrides :meth:`views` if its
    features are not those of the frozen backbone, and :meth:`begin` to add parameters for a task's classes. State that
    must survive a stage is a parameter, a buffer or extra state (JSON); a checkpoint holds these. The backbone is not
    among them: results record its name and hash instead.
    """

    Config: ClassVar[type[LearnerConfig]] = LearnerConfig
    name: ClassVar[str] = ""
    """Name in configurations."""
    summary: ClassVar[str] = ""
    """What the method does, in a phrase for lists; a learner without one is listed by its docstring's first line."""
    trains: ClassVar[str] = ""
    """What is trained, in a few words for lists: nothing, one adapter per task, …"""
    paper: ClassVar[str] = ""
    """Source of the method: authors, title, venue, arXiv number."""
    stores_images: ClassVar[bool] = False
    """True for exemplar methods and upper bounds: they may read images of old tasks, and results say so."""
    trains_backbone: ClassVar[bool] = False
    """True for a method that trains (copies of) the backbone's own weights."""
    needs_text: ClassVar[bool] = False
    """True for a method that compares images with texts; it needs a backbone with a text side."""
    reads_names: ClassVar[bool] = False
    """True for a method whose predictions depend on the names of the classes (of those seen, as all else)."""
    needs_new_classes: ClassVar[bool] = False
    """True for a method that is only defined for tasks of new classes (not for domain-incremental streams)."""
    takes_teachers: ClassVar[bool] = False
    """True for a method that sees images through the first of several backbones, with a tuner or without; the others
    take part in training alone."""

    learns_batches: ClassVar[bool] = False
    """True for a method whose :meth:`learn` may be called many times in a task, each time with a few of its images."""

    backbone: Backbone

    @classmethod
    def uses_texts(cls, parameters: Any) -> bool:
        """Whether the learner compares images with texts under these hyper-parameters, an instance of :class:`Config`.

        An override is for a learner to which texts are an option.
        """
        return cls.needs_text

    @classmethod
    def uses_source_head(cls, parameters: Any) -> bool:
        """Whether the learner uses the classifier that the backbone was pre-trained with, under these parameters."""
        return False

    @classmethod
    def keeps_samples(cls, parameters: Any) -> bool:
        """Whether it keeps old images, or a feature of each, under these hyper-parameters; results say so.

        An override is for a learner to which a memory of features is an option (:attr:`exemplars_kept`).
        """
        return cls.stores_images

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a subclass that states its features outside :meth:`views`.

        Raises:
            PluginError: The class has a ``features`` of its own, or a ``feature_version``.
        """
        super().__init_subclass__(**kwargs)
        changed = ["features"] if cls.features is not Learner.features else []
        changed += ["feature_version"] if hasattr(cls, "feature_version") else []
        if changed:
            raise PluginError(
                f"learner {cls.__qualname__} in {cls.__module__} defines {' and '.join(changed)}, but a learner states "
                "its features in views() only; override views() instead and return {version: function from images to "
                "features}, with a new version whenever the function gives other features"
            )

    def __init__(self, config: Any, backbone: Backbone) -> None:
        """Build the learner before the first task; cheap, without data and without global random numbers.

        Args:
            config: Hyper-parameters, an instance of :class:`Config`.
            backbone: The frozen backbone, shared with other learners.
        """
        super().__init__()
        self.config = config
        object.__setattr__(self, "backbone", backbone)  # not a submodule: it is shared, and not part of the state
        self.joined: Joined | None = None
        if isinstance(backbone, Backbones):
            self.joined = Joined(backbone.widths, backbone.combine.scale, backbone.combine.weights)
        self.seen = 0  # number of classes so far
        self.stages = 0  # number of tasks begun so far
        self._decided = False  # whether the scales of several backbones are those of the first task

    def begin(self, task: Task, ctx: Context) -> None:
        """Make room for a task, e.g. grow a head. An override calls ``super().begin`` first.

        The runner calls it before :meth:`learn`. When it resumes a run, it calls it for every past task before it loads
        the state, so it must not look at images.
        """
        self.seen, self.stages = len(task.seen), task.index + 1
        ctx.learner = self

    @abstractmethod
    def learn(self, task: Task, ctx: Context) -> None:
        """Train on one task, from ``task.train`` alone and with random numbers from ``ctx.generator`` alone."""

    def views(self) -> Mapping[Hashable, View]:
        """The functions from normalised images [B, 3, H, W] to features [B, F] that the learner uses, by version.

        This is the one statement of how a learner sees images. :meth:`features` concatenates the views in this order,
        and the feature cache computes each view once per image and version. By default there is one view, the frozen
        backbone. A learner with several (one tuner per task, or the frozen backbone beside an adapted one) names each
        here, so that a view that did not change is not computed again when another one does.

        * The version of a view changes exactly when its features do. Versions are unique within a learner.
        * The features of an image do not depend on the rest of the batch.
        * A view that is ``self.backbone`` itself or ``partial(self.backbone, tuner=…)`` can be identified across runs,
          so its features are stored on disk if the run has a feature store. Features of any other function are kept in
          memory during the run.
        """
        return self.backbone.views()

    def join(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """The concatenated features of all views [B, F] as the classifier takes them, [B, F].

        They are unchanged with one backbone. With several, each one's features are scaled and weighted
        (:class:`~cil.classifiers.joined.Joined`), as the first features with ``labels`` in the first stage decide.
        """
        if self.joined is None:
            return features
        if labels is not None and self.stages == 1 and not self._decided:
            self.joined.fit(features, labels)
            self._decided = True
        return self.joined(features)

    @final
    def features(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → features [B, F]: those of all :meth:`views` side by side."""
        parts = [view(images) for view in self.views().values()]
        return parts[0] if len(parts) == 1 else self.join(torch.cat(parts, dim=1))

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """Features [B, F] → scores [B, len(task.seen)]; column i is class i in order of appearance."""

    def require_memory(self, classes: int, device: torch.device) -> None:
        """Refuse statistics that cannot fit a device after ``classes`` classes, before an image is read.

        Raises:
            ConfigError: An estimate is above the memory of the device; the message says what fits.
        """
        for part in self.modules():
            if isinstance(part, StatisticsClassifier):
                part.require_memory(classes, device)

    @property
    def statistics(self) -> StatisticsClassifier | None:
        """The classifier made of sums that holds all that the learner knows of each class, beside trained parameters.

        ``cil forget`` removes a class from it, and ``cil join`` adds those of several learners. None for learners that
        keep more of a class than sums.
        """
        return None

    def scaled(self, features: Tensor) -> Tensor:
        """Features [B, F] as the classifier gets them; :meth:`features` itself for most learners."""
        return features

    def predict(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → labels [B] in order of appearance."""
        with torch.inference_mode():
            return self.logits(self.features(images).float()).argmax(1)

    @property
    def exemplars_kept(self) -> Sequence[Tensor]:
        """Buffers with a row per old image, e.g. its feature; they count as exemplars and not as statistics."""
        return []

    @property
    def exemplar_bytes(self) -> int:
        """Size of the old images that the learner keeps, or of what it keeps of each, in bytes."""
        return sum(rows.numel() * rows.element_size() for rows in self.exemplars_kept)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        match_saved_shapes(self, state_dict, prefix, rows_only=False)
        super()._load_from_state_dict(state_dict, prefix, *args)


class RoutedLearner(Learner):
    """A learner with one part per task (e.g. an adapter) that chooses a part for each image without the task id.

    Results then contain how often the choice is the image's task (``router_accuracy``) and the accuracy if it always
    were (``oracle_router_accuracy``). Only the evaluation knows the true task.
    """

    @abstractmethod
    def route(self, features: Tensor) -> Tensor:
        """Features [B, F] → index of the task whose part is used for each image, int64 [B]."""

    @abstractmethod
    def routed_logits(self, features: Tensor, tasks: Tensor) -> Tensor:
        """Scores [B, C] of features [B, F] when image i uses the part of task ``tasks[i]``."""

    def logits(self, features: Tensor) -> Tensor:
        return self.routed_logits(features, self.route(features))


def check_trained(ctx: Context, parameters: Iterable[Tensor] | None = None, rate: str = "lr") -> None:
    """Refuse trained parameters that are not finite, whichever loop trained them; all losses may have been finite.

    Args:
        ctx: Context of the stage.
        parameters: The parameters to check; None: all of the stage's learner.
        rate: The learner's key for the learning rate that trained them.

    Raises:
        TrainingError: A parameter has NaN or infinite entries; with the stage, the learner and the tensor.
    """
    learner = ctx.learner
    names = {} if learner is None else {id(p): name for name, p in learner.named_parameters()}
    tensors = list((() if learner is None else learner.parameters()) if parameters is None else parameters)
    if not tensors or bool(torch.stack([p.detach().isfinite().all() for p in tensors]).all()):
        return
    bad = next(p for p in tensors if not bool(p.detach().isfinite().all()))
    who = "" if learner is None else f"{learner.name or type(learner).__name__}: "
    value = getattr(getattr(learner, "config", None), rate, None)
    raise TrainingError(
        f"stage {ctx.stage}: {who}{names.get(id(bad), 'a temporary tensor')} {list(bad.shape)} has NaN or infinite "
        f"entries after training; lower the learner's {rate}{'' if value is None else f' ({value:g})'} or set its "
        "clip. Earlier stages are kept"
    )
