"""The setting of the checks: a three-block ViT, images of 32 pixels, and tasks of 4, 1 and 3 classes."""

from __future__ import annotations

import random
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator

from cil.backbone import Backbone
from cil.config import Augmentation, TransformConfig
from cil.data.images import ImageSet
from cil.data.sources import from_arrays
from cil.data.transforms import Transforms
from cil.features import FeatureCache
from cil.learner import Context, Learner, LearnerConfig
from cil.results import StageRow
from cil.runner import run_stages
from cil.runner.checkpoint import RunFolder
from cil.stream import Stream, TestData
from cil.stream.protocol import ClassIncremental
from cil.testing.drawn_text import drawn_texts
from cil.training import Recipe
from cil.utils import hardware
from cil.utils.randomness import isolated

SIZES = (4, 1, 3)
NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")
PIXELS = 32
SINGLE = 5
"""Position of the class that has only one training image."""


def require(condition: bool, message: str) -> None:
    """Fail the check with ``message`` unless ``condition`` holds.

    Raises:
        AssertionError: It does not hold.
    """
    if not condition:
        raise AssertionError(message)


@lru_cache(maxsize=1)
def model() -> torch.nn.Module:
    """A random three-block timm ViT, the same in every process."""
    with isolated(7):
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=PIXELS, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0
        )


def backbone() -> Backbone:
    """The checks' backbone, with new counters and shared weights."""
    vit: Any = model()
    data_config = {"input_size": (3, PIXELS, PIXELS), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    steps = {**data_config, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    return Backbone(vit, "checks", steps, drawn_texts(vit.num_features, _drawn), source_head=_source_head())


@lru_cache(maxsize=1)
def _source_head() -> torch.nn.Linear:
    """A random classifier of five classes in the place of the one of a pre-training."""
    with isolated(8):
        return torch.nn.Linear(model().num_features, 5).requires_grad_(False)  # type: ignore[arg-type]


@lru_cache(maxsize=len(NAMES))
def _drawn(name: str) -> torch.Tensor | None:
    """The feature [F] of the image of a class without noise; None for other words."""
    if name not in NAMES:
        return None
    pixels = torch.from_numpy(clean_image(NAMES.index(name))).permute(2, 0, 1)[None].float() / 255
    vit: Any = model()
    with torch.no_grad():
        return vit.eval().forward_head(vit.forward_features((pixels - 0.5) / 0.5), pre_logits=True)[0]


def clean_image(label: int) -> np.ndarray:
    """The colour layout of a class, in 0…255, [32, 32, 3]."""
    layouts = np.random.RandomState(0).randint(40, 215, size=(len(NAMES), 4, 4, 3))
    return np.kron(layouts[label], np.ones((8, 8, 1)))


def draw_images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Easy images, uint8 [N, 32, 32, 3], and labels [N]: every class has its own colour layout, with noise added."""
    rng = np.random.RandomState(1 if split == "train" else 2)
    images, labels = [], []
    for c in range(len(NAMES)):
        count = 6 if split == "test" else 1 if c == SINGLE else 12
        noisy = clean_image(c)[None] + rng.normal(0, 20, size=(count, PIXELS, PIXELS, 3))
        images.append(np.clip(noisy, 0, 255).astype(np.uint8))
        labels += [c] * count
    return np.concatenate(images), np.array(labels)


def stream(vit: Backbone, names: tuple[str, ...] = NAMES, sizes: tuple[int, ...] = SIZES) -> Stream:
    """The checks' stream: natural class order, unequal tasks, a task of one class, and a class of one image."""
    transforms = Transforms(vit.data_config, TransformConfig(augment=Augmentation(scale=(0.6, 1.0), flip=0.5)))
    sets = [ImageSet(from_arrays(*draw_images(split), names), transforms) for split in ("train", "test")]
    return Stream(sets[0], sets[1], ClassIncremental("natural", sizes=sizes))


@dataclass
class Case:
    """A learner to check.

    Attributes:
        cls: The learner class.
        parameters: Hyper-parameters, as in a configuration.
    """

    cls: type[Learner]
    parameters: dict[str, Any] = field(default_factory=dict)
    _after: dict[int, Finished] = field(default_factory=dict, repr=False)
    _folders: dict[int, Path] = field(default_factory=dict, repr=False)
    _renamed: Finished | None = field(default=None, repr=False)

    @property
    def config(self) -> LearnerConfig:
        """The validated hyper-parameters, with a small training batch size by default."""
        # tasks here have a dozen images per class: at the usual batch sizes an epoch would be a single step
        small = {"train_batch_size": 4} if issubclass(self.cls.Config, Recipe) else {}
        return self.cls.Config.model_validate({**small, **self.parameters})

    @property
    def finished(self) -> Finished:
        """A complete run, shared by the checks that only read it."""
        return self.after(len(SIZES))

    @property
    def renamed(self) -> Finished:
        """A complete run with other class names, interrupted before the last stage and resumed; shared likewise."""
        if self._renamed is None:
            names = tuple(reversed(NAMES))
            with tempfile.TemporaryDirectory() as place:
                self.run(folder=Path(place), stop_after=len(SIZES) - 1, names=names)
                self._renamed = self.run(folder=Path(place), names=names)
        return self._renamed

    def after(self, stages: int) -> Finished:
        """A run of the first ``stages`` stages, shared by the checks that only read it.

        Once there is a complete run, the learner after an earlier stage is loaded from what that run stored.
        """
        if stages not in self._after:
            place = Path(tempfile.mkdtemp(prefix="cil-check-"))
            weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
            if (complete := self._folders.get(len(SIZES))) is not None:
                RunFolder(shutil.copytree(complete, place, dirs_exist_ok=True)).keep_first(stages)
            self._after[stages] = self.run(folder=place, stop_after=stages)
            self._folders[stages] = place
        return self._after[stages]

    def folder(self, stages: int) -> Path:
        """What that run left on disk."""
        self.after(stages)
        return self._folders[stages]

    def learner(self, vit: Backbone | None = None) -> Learner:
        """A new learner on the checks' backbone."""
        return self.cls(self.config, vit or backbone())

    def run(
        self,
        *,
        vit: Backbone | None = None,
        folder: Path | None = None,
        stop_after: int | None = None,
        seed: int = 0,
        names: tuple[str, ...] = NAMES,
    ) -> Finished:
        """Run a new learner through the checks' stream (or resume in ``folder``).

        Args:
            vit: The backbone; by default a new one of :func:`backbone`.
            folder: Run folder; None for no files.
            stop_after: Number of stages; None for all.
            seed: Seed of the training.
            names: Class names.
        """
        vit = vit or backbone()
        weights, states = {k: v.clone() for k, v in vit.model.state_dict().items()}, random_states()
        learner, tasks = self.learner(vit), stream(vit, names)
        with _closed_reads() as reads:
            rows = run_stages(
                learner,
                tasks,
                accelerator=accelerator(),
                seed=seed,
                batch_size=16,
                folder=RunFolder(folder) if folder is not None else None,
                stop_after=stop_after,
            )
        after, later = vit.model.state_dict(), random_states()
        changed = [k for k in weights | after if k not in weights or k not in after or not after[k].equal(weights[k])]
        return Finished(learner, tasks, rows, changed, [k for k in states if states[k] != later[k]], len(reads))


@dataclass
class Finished:
    """A learner after (part of) the checks' stream.

    Attributes:
        learner: The learner.
        stream: The tasks it was taken through.
        rows: One row per finished stage.
        changed: Entries of the shared backbone's state that differ from before the run.
        drawn_from: Global random states that differ from before the run.
        closed_reads: Number of attempts to read the test split while it was not open for the evaluator.
    """

    learner: Learner
    stream: Stream
    rows: list[StageRow]
    changed: list[str]
    drawn_from: list[str]
    closed_reads: int

    def counts(self) -> list[tuple[list[int], list[int]]]:
        """Numbers of correct predictions by stage and task, (over all classes seen, with the task given)."""
        return [(row["correct"], row["correct_within_task"]) for row in self.rows]

    def state(self) -> dict[str, torch.Tensor]:
        """Detached copies of the tensors of the learner's state."""
        return {k: v.detach().clone() for k, v in self.learner.state_dict().items() if isinstance(v, torch.Tensor)}


@contextmanager
def _closed_reads() -> Iterator[list[TestData]]:
    """Within the block, collects the test splits that are asked for anything while they are not open."""
    reads: list[TestData] = []
    original = TestData._check

    def record(self: TestData) -> None:
        if not self.is_open:
            reads.append(self)
        original(self)

    TestData._check = record  # type: ignore[method-assign]
    try:
        yield reads
    finally:
        TestData._check = original  # type: ignore[method-assign]


def random_states() -> dict[str, Any]:
    """The global random states of Python, numpy and torch, comparable with ==."""
    return {
        "Python's random": random.getstate(),
        "numpy's": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "torch's": torch.get_rng_state().tolist(),
    }


@lru_cache(maxsize=1)
def accelerator() -> Accelerator:
    """The CPU in float32, because checks compare bit for bit."""
    return hardware.accelerator("cpu")


def context(stage: int = 0, seed: int = 0, log: Callable[[str, float], None] | None = None) -> Context:
    """A new context for one stage."""
    return Context(accelerator(), FeatureCache(accelerator(), 16), seed=seed, stage=stage, log=log)


def probe_images() -> torch.Tensor:
    """Normalised test images of all classes, float [48, 3, 32, 32]."""
    vit = backbone()
    images, labels = draw_images("test")
    positions = np.arange(len(labels))
    test = ImageSet(from_arrays(images, labels, NAMES), Transforms(vit.data_config))
    return torch.cat([batch for batch, _ in test.batches(positions, labels, 64)])
