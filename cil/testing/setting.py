"""The small world the checks run in: a three-block ViT, 32-pixel images, tasks of 4, 1 and 3 classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator

from cil import hardware
from cil.backbone import Backbone
from cil.checkpoint import RunFolder
from cil.config import Augmentation, TransformConfig
from cil.data.images import ImageSet
from cil.data.sources import from_arrays
from cil.data.transforms import Transforms
from cil.features import FeatureCache
from cil.learner import Context, Learner, LearnerConfig
from cil.protocol import ClassIncremental
from cil.randomness import isolated
from cil.runner import Row, run_stages
from cil.stream import Stream
from cil.training import Recipe

SIZES = (4, 1, 3)
NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")
PIXELS = 32
SINGLE = 5
"""The class that has one training image."""


@lru_cache(maxsize=1)
def model() -> torch.nn.Module:
    """A random three-block timm ViT, the same in every process."""
    with isolated(7):
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=PIXELS, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0
        )


def backbone() -> Backbone:
    """The checks' backbone; fresh counters, shared weights."""
    data_config = {"input_size": (3, PIXELS, PIXELS), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return Backbone(
        model(), "checks", {**data_config, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    )


def pictures(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Easy images: every class has a colour layout of its own, plus noise. uint8 [N, 32, 32, 3], labels [N]."""
    layouts = np.random.RandomState(0).randint(40, 215, size=(len(NAMES), 4, 4, 3))
    rng = np.random.RandomState(1 if split == "train" else 2)
    images, labels = [], []
    for c, layout in enumerate(layouts):
        count = 6 if split == "test" else 1 if c == SINGLE else 12
        clean = np.kron(layout, np.ones((8, 8, 1)))
        noisy = clean[None] + rng.normal(0, 20, size=(count, PIXELS, PIXELS, 3))
        images.append(np.clip(noisy, 0, 255).astype(np.uint8))
        labels += [c] * count
    return np.concatenate(images), np.array(labels)


def stream(vit: Backbone, names: tuple[str, ...] = NAMES, sizes: tuple[int, ...] = SIZES) -> Stream:
    """The checks' stream: natural class order, uneven tasks, a one-class task, a one-image class."""
    transforms = Transforms(vit.data_config, TransformConfig(augment=Augmentation(scale=(0.6, 1.0), flip=0.5)))
    sets = [ImageSet(from_arrays(*pictures(split), names), transforms) for split in ("train", "test")]
    return Stream(sets[0], sets[1], ClassIncremental("natural", sizes=sizes))


@dataclass
class Case:
    """A learner to check: its class and hyper-parameters.

    Attributes:
        cls: The learner class.
        parameters: Hyper-parameters, as a configuration would give them.
    """

    cls: type[Learner]
    parameters: dict[str, Any] = field(default_factory=dict)
    _after: dict[int, Finished] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> LearnerConfig:
        # tasks here have a dozen images a class: at the usual batch sizes an epoch would be a single step
        small = {"train_batch_size": 4} if issubclass(self.cls.Config, Recipe) else {}
        return self.cls.Config.model_validate({**small, **self.parameters})

    @property
    def finished(self) -> Finished:
        """One whole run, shared by the checks that only look at it."""
        return self.after(len(SIZES))

    def after(self, stages: int) -> Finished:
        """A run of so many stages, shared by the checks that only look at it."""
        if stages not in self._after:
            self._after[stages] = self.run(stop_after=stages)
        return self._after[stages]

    def learner(self, vit: Backbone | None = None) -> Learner:
        """A fresh learner on the checks' backbone."""
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
        """Take a fresh learner through the checks' stream (or go on in ``folder``)."""
        vit = vit or backbone()
        learner, tasks = self.learner(vit), stream(vit, names)
        rows = run_stages(
            learner,
            tasks,
            accelerator=accelerator(),
            seed=seed,
            batch_size=16,
            folder=RunFolder(folder) if folder is not None else None,
            stop_after=stop_after,
        )
        return Finished(learner, tasks, rows)


@dataclass
class Finished:
    """A learner after (part of) the checks' stream."""

    learner: Learner
    stream: Stream
    rows: list[Row]

    def counts(self) -> list[tuple[list[int], list[int]]]:
        """What a matrix is made of: correct counts by stage, without and with the task given."""
        return [(row["correct"], row["correct_within_task"]) for row in self.rows]

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors of the learner's state, detached copies."""
        return {k: v.detach().clone() for k, v in self.learner.state_dict().items() if isinstance(v, torch.Tensor)}


@lru_cache(maxsize=1)
def accelerator() -> Accelerator:
    """The CPU in float32: checks compare bits."""
    return hardware.accelerator("cpu")


def context(stage: int = 0, seed: int = 0) -> Context:
    return Context(accelerator(), FeatureCache(accelerator(), 16), seed=seed, stage=stage)


def probe_images() -> torch.Tensor:
    """Test images of all classes as the backbone wants them, float [48, 3, 32, 32]."""
    vit = backbone()
    images, labels = pictures("test")
    chosen = np.arange(len(labels))
    found = ImageSet(from_arrays(images, labels, NAMES), Transforms(vit.data_config))
    return torch.cat([batch for batch, _ in found.batches(chosen, labels, 64)])
