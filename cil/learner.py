"""The contract between a learner and everything else.

A learner answers three questions: how do I *see* (:meth:`Learner.features`), how do I *decide*
(:meth:`Learner.logits`), how do I *learn* (:meth:`Learner.learn`). It knows neither the runner, nor the disk, nor
TensorBoard. What is checked of every learner is in :mod:`cil.testing`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cil import hardware
from cil.backbone import FROZEN, Backbone
from cil.classifiers.base import match_saved_shapes
from cil.config import Section
from cil.features import Eyes, FeatureCache, View
from cil.randomness import generator
from cil.stream import Task, TaskData

T = TypeVar("T")


class LearnerConfig(Section):
    """Hyper-parameters of a learner; unknown keys are refused. Defaults are one setting for all datasets."""


class Context:
    """What a learner is given to learn with: a device, a generator, features, and somewhere to report to.

    The runner makes one for every stage; ``Context(stage=task.index)`` is enough to use a learner without it.

    Args:
        accelerator: Device, mixed precision and processes; by default the CPU in float32.
        cache: Feature cache of the run; by default one of its own.
        seed: The run's training seed.
        stage: The current stage; with ``seed`` it decides everything that is random in it.
        log: Receives (name, value); what arrives ends in TensorBoard under ``train/``, with a step of its own per name.
        track: Wraps an iterable in a progress bar: (iterable, description, length) → iterable.
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
        self.cache, self.stage = cache or FeatureCache(self.accelerator), stage
        self.generator = generator(seed, stage)
        self.trainable_parameters = 0
        self.histograms: dict[str, list[float]] = {}
        self._log, self._track = log, track

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def log(self, name: str, value: float) -> None:
        """Report a number of this stage, e.g. the loss of an epoch; the n-th report of a name is drawn at step n."""
        if self._log is not None:
            self._log(name, float(value))

    def track(self, items: Iterable[T], description: str, length: int) -> Iterator[T]:
        """Iterate with a progress bar where there is a screen."""
        return iter(items if self._track is None else self._track(items, description, length))

    def histogram(self, name: str, counts: Iterable[float]) -> None:
        """Report how often each of some numbered things was used in this stage, e.g. the prompts of a pool.

        Kept with the stage in ``metrics.json`` and drawn as a histogram over the numbers 0, 1, …, one a stage.
        """
        self.histograms[name] = [float(count) for count in counts]

    def features(self, eyes: Eyes, data: TaskData) -> tuple[Tensor, Tensor]:
        """Features of a task under the test transform, and the labels; computed once per image and view.

        Args:
            eyes: The learner, for its own features, or its backbone, for the frozen ones.
            data: The task's images.

        Returns:
            (float32 [N, F] on the device, int64 [N] on the device).
        """
        images, indices = data.source
        labels = torch.as_tensor(data.labels)
        return self.cache.get(eyes, images, indices).to(self.device), labels.to(self.device)


class Learner(nn.Module, ABC):
    """A class-incremental learner on a frozen backbone.

    Everything that must survive a crash is a parameter, a buffer or extra state (JSON). The backbone is none of these:
    results record its name and hash instead. Subclass, set :class:`Config`, implement :meth:`learn` and
    :meth:`logits`; override :meth:`features` (and then :attr:`feature_version`) if the eyes change, and :meth:`begin`
    to add a module for every task.
    """

    Config: ClassVar[type[LearnerConfig]] = LearnerConfig
    name: ClassVar[str] = ""
    """Registered name."""
    paper: ClassVar[str] = ""
    """Where the method comes from."""
    stores_images: ClassVar[bool] = False
    """True for exemplar methods and upper bounds: old tasks' images stay open to them, and results say so."""
    trains_backbone: ClassVar[bool] = False
    """True where (copies of) the backbone's own weights are trained."""
    needs_new_classes: ClassVar[bool] = False
    """True for a method that is not defined where a task shows old classes again (domain-incremental streams)."""

    backbone: Backbone

    def __init__(self, config: Any, backbone: Backbone) -> None:
        """Cheap, without data and without global random numbers. ``config`` is an instance of :class:`Config`."""
        super().__init__()
        self.config = config
        object.__setattr__(self, "backbone", backbone)  # not a submodule: it is shared, and not part of the state
        self.seen = 0  # classes so far
        self.stages = 0  # tasks begun so far

    def begin(self, task: Task, ctx: Context) -> None:
        """Make room for a task: grow heads, add a module. Called before :meth:`learn`, and again for every past task
        when a run resumes, before the state is loaded; so it may not look at images. Call ``super().begin`` first."""
        self.seen, self.stages = len(task.seen), task.index + 1

    @abstractmethod
    def learn(self, task: Task, ctx: Context) -> None:
        """One stage: learn ``task`` from ``task.train`` alone, drawing random numbers from ``ctx.generator`` alone."""

    def features(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → features [B, F]. No image's result may depend on the rest of the batch."""
        return self.backbone(images)

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """Features [B, F] → scores [B, len(task.seen)]; column i is class i in order of appearance."""

    @property
    def feature_version(self) -> Hashable:
        """Changes exactly when :meth:`features` would answer differently; constant while the eyes are frozen."""
        return FROZEN

    def views(self) -> Mapping[Hashable, View]:
        """What :meth:`features` puts side by side, by version; one view by default.

        A learner that sees through several tuners (one a task, or the frozen backbone beside an adapted one) names
        each here: then a view that did not change is not computed again when another one does. Versions are unique;
        ``features`` is the concatenation in this order, and ``feature_version`` must change when any of them does.

        A view that is ``self.backbone`` itself or ``partial(self.backbone, tuner=…)`` can be told from others, so the
        runner keeps its features on disk, for later runs; any other function is the learner's own and lasts a run.
        """
        return {self.feature_version: self.backbone if self._sees_as(Learner) else self.features}

    def _sees_as(self, base: Any) -> bool:
        """Whether ``features`` is the base class's own: a subclass that has another sees in a way nobody else knows."""
        return getattr(self.features, "__func__", None) is base.features

    def predict(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → labels [B] in order of appearance."""
        with torch.inference_mode():
            return self.logits(self.features(images).float()).argmax(1)

    @property
    def exemplar_bytes(self) -> int:
        """Bytes of old images the learner keeps; 0 unless it declares ``stores_images``."""
        return 0

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        match_saved_shapes(self, state_dict, prefix, rows_only=False)
        super()._load_from_state_dict(state_dict, prefix, *args)


class RoutedLearner(Learner):
    """A learner with a part for every task that chooses one of them for each image by itself.

    Results then say how often the choice is the image's task (``router_accuracy``) and how well the learner would do
    if it always were (``oracle_router_accuracy``). The true task is known to the evaluation only.
    """

    @abstractmethod
    def route(self, features: Tensor) -> Tensor:
        """Features [B, F] → the index of the task whose part each image takes, int64 [B]."""

    @abstractmethod
    def routed_logits(self, features: Tensor, tasks: Tensor) -> Tensor:
        """Scores [B, C] of features [B, F] when image i takes the part of task ``tasks[i]``."""

    def logits(self, features: Tensor) -> Tensor:
        return self.routed_logits(features, self.route(features))
