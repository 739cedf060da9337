"""What a model knows of how sure it may be: a temperature, and the scores of held-out images of known classes.

All of it comes from training images of the tasks so far. Held-out images (``stream.validation``) are never learned; of
them the features are kept, and no image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cil import metrics
from cil.classifiers.base import match_saved_shapes
from cil.classifiers.calibration import fit_temperature
from cil.classifiers.distances import ClassDistances
from cil.errors import RunError
from cil.features import FeatureCache
from cil.learner import Learner
from cil.results import ConfidenceRow
from cil.rows import SCORES
from cil.stream import Stream, Task, TestData

FILE = "confidence.safetensors"
"""Its state, in the folder of a stage."""
BATCH = 1024


class Calibration(nn.Module):
    """Calibrates scores, and tells images that look like no known class, from the scores of held-out images alone.

    Probabilities are softmax(z/T) with one temperature T for all classes. Images are scored by how much they look like
    known classes, larger for known ones:

    * ``max_probability``: max_c softmax(z/T)_c (Hendrycks and Gimpel, ICLR 2017).
    * ``energy``: T log Σ_c exp(z_c/T) (Liu et al., NeurIPS 2020, arXiv 2010.03759).

    Buffers:
        temperature: float64 scalar, T. known: float64 [S, N], the scores of the held-out images, in the order of
        :attr:`names`.
    """

    names: ClassVar[tuple[str, ...]] = SCORES[:2]
    """Names of the scores."""
    sees_frozen: ClassVar[bool] = False
    """Whether :meth:`scores` needs features of the frozen backbone."""
    temperature: Tensor
    known: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))
        self.register_buffer("known", torch.zeros(len(self.names), 0, dtype=torch.float64))

    def fit(self, logits: Tensor, labels: Tensor, frozen: Tensor | None = None) -> Calibration:
        """Calibrate on held-out images.

        Args:
            logits: Their scores, [N, C]; −∞ for classes that are not predicted.
            labels: Their classes, int64 [N].
            frozen: Features of the frozen backbone, [N, D], where they are needed.
        """
        self.temperature.fill_(fit_temperature(logits, labels))
        self.known = torch.stack(list(self.scores(logits, frozen).values()))
        return self

    def probabilities(self, logits: Tensor) -> Tensor:
        """Calibrated probabilities of scores [B, C], float64 [B, C]."""
        return (logits.double() / self.temperature.to(logits.device)).softmax(1)

    def scores(self, logits: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        """How much images look like known classes, by name of the score, float64 [B] each.

        Args:
            logits: The learner's scores, [B, C].
            frozen: Features of the frozen backbone, [B, D], where they are needed.
        """
        if not len(logits):
            return {name: torch.zeros(0, dtype=torch.float64) for name in self.names}
        scaled = logits.double() / self.temperature.to(logits.device)
        return dict(zip(SCORES, (scaled.softmax(1).amax(1), self.temperature * scaled.logsumexp(1)), strict=False))

    def rejected(self, scores: Mapping[str, Tensor], rate: float, score: str) -> np.ndarray:
        """Which images look like no known class, bool [B]; see :func:`cil.metrics.rejected`.

        Raises:
            RunError: Too few images are held out to reject so few known ones.
        """
        held_out = self.known[self.names.index(score)].numpy()
        if rate * (1 + len(held_out)) < 1 - 1e-9:
            raise RunError(
                f"reject: {rate:g} of the known images cannot be told from {len(held_out)} held-out ones; allowed: "
                f"{1 / (1 + len(held_out)):.2g} and more; hold out more images, or raise the rate"
            )
        return metrics.rejected(scores[score].cpu().numpy(), held_out, rate)


class Confidence(Calibration):
    """Calibrates a learner after every task, and scores images by the frozen backbone's features, too.

    Beside the scores of :class:`Calibration`:

    * ``mahalanobis``: −min_c d_c on the frozen backbone's features (:class:`ClassDistances`).
    * ``relative_mahalanobis``: d_0 − min_c d_c, which leaves out what all images have in common.

    The held-out images of earlier tasks count as long as the learner's features do not change: their images are closed,
    so features that change cannot be computed again. A learner that trains its features on every task is therefore
    calibrated on the newest task alone.

    Buffers:
        features: float32 [N, F], the learner's features of the held-out images. frozen: float32 [N, D], those of the
        frozen backbone; [0, D] where they are the same. labels, tasks: int64 [N].
    """

    names = SCORES
    sees_frozen = True
    features: Tensor
    frozen: Tensor
    labels: Tensor
    tasks: Tensor

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.classes = ClassDistances(feature_dim)
        self.register_buffer("features", torch.zeros(0, 0))
        self.register_buffer("frozen", torch.zeros(0, feature_dim))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("tasks", torch.zeros(0, dtype=torch.int64))

    def learn(self, learner: Learner, task: Task, cache: FeatureCache, since: int) -> None:
        """Learn from an open task that ``learner`` has learned, and calibrate again.

        Args:
            learner: The learner after the task.
            task: The task; its ``validation`` images are the held-out ones.
            cache: The run's features.
            since: Stage since which no view of the learner has changed.
        """
        images, indices = task.train.source
        labels = torch.as_tensor(task.train.labels)
        self.classes.partial_fit(cache.get(learner.backbone, images, indices), labels)
        kept = self.tasks >= since
        features, frozen = self.features[kept], self.frozen[kept] if len(self.frozen) else self.frozen
        self.labels, self.tasks = self.labels[kept], self.tasks[kept]
        if task.validation is not None:
            images, indices = task.validation.source
            new = cache.get(learner, images, indices)
            features = torch.cat([features, new]) if len(features) else new
            if learner.views().keys() != learner.backbone.views().keys():
                frozen = torch.cat([frozen, cache.get(learner.backbone, images, indices)])
            self.labels = torch.cat([self.labels, torch.as_tensor(task.validation.labels)])
            self.tasks = torch.cat([self.tasks, torch.full((len(new),), task.index)])
        self.features, self.frozen = features, frozen
        logits = scores_of(learner, self.features, cache.accelerator)
        self.fit(logits, self.labels, self.frozen if len(self.frozen) else self.features)

    def scores(self, logits: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        found = super().scores(logits)
        if frozen is None or not len(logits):
            return found
        nearest, background = self.classes.distances(frozen)
        return {**found, "mahalanobis": -nearest, "relative_mahalanobis": background - nearest}

    def measure(self, learner: Learner, stream: Stream, stage: int, cache: FeatureCache) -> ConfidenceRow:
        """Test it after ``stage`` on the test images of all tasks: classes of later tasks are the unknown ones.

        Args:
            learner: The learner after the stage; it sees no test image.
            stream: The tasks.
            stage: Number of the stage, from 0.
            cache: Features of test images, apart from those of the run, which count as costs of the method.
        """
        seen = stream.tasks[stage].seen
        later = [task.index for task in stream.tasks[stage + 1 :] if set(stream.groups[task.index]).isdisjoint(seen)]
        with stream.open_test() as test:
            known, logits, truth = self._tested(learner, test, range(stage + 1), cache)
            unknown, *_ = self._tested(learner, test, later, cache)
        right = logits.argmax(1).numpy() == truth
        plain, calibrated = (p.amax(1).numpy() for p in (logits.double().softmax(1), self.probabilities(logits)))

        def by_score(metric: Callable[[np.ndarray, np.ndarray], float]) -> dict[str, float | None]:
            both = len(truth) and len(unknown[SCORES[0]])
            return {s: metric(known[s].numpy(), unknown[s].numpy()) if both else None for s in SCORES}

        return {
            "held_out_images": len(self.labels),
            "temperature": float(self.temperature),
            "calibration_error": metrics.calibration_error(calibrated, right) if len(truth) else None,
            "calibration_error_uncalibrated": metrics.calibration_error(plain, right) if len(truth) else None,
            "unknown_auroc": by_score(metrics.unknown_auroc),
            "unknown_fpr95": by_score(metrics.unknown_fpr95),
        }

    def _tested(
        self, learner: Learner, test: TestData, tasks: Sequence[int], cache: FeatureCache
    ) -> tuple[dict[str, Tensor], Tensor, np.ndarray]:
        """Scores of known classes, the learner's scores, and labels, of the test images of some tasks."""
        members = [test.task(j)[0] for j in tasks]
        index = np.concatenate([np.zeros(0, np.int64), *members])
        if not len(index):
            return self.scores(torch.zeros(0, 1), torch.zeros(0)), torch.zeros(0, 1), index
        cache.fill(learner, test.images, {version: members for version in learner.views()})
        logits = scores_of(learner, cache.get(learner, test.images, index), cache.accelerator)
        frozen = cache.get(learner.backbone, test.images, index)
        return self.scores(logits, frozen), logits, test.labels[index]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        match_saved_shapes(self, state_dict, prefix, rows_only=False)
        super()._load_from_state_dict(state_dict, prefix, *args)


def scores_of(learner: Learner, features: Tensor, accelerator: Accelerator) -> Tensor:
    """The learner's scores of features [N, F], float32 [N, C] on the CPU."""
    if not len(features):
        return torch.zeros(0, 1)
    with torch.inference_mode(), accelerator.autocast():
        parts = [
            learner.logits(learner.join(part.to(accelerator.device))).float().cpu() for part in features.split(BATCH)
        ]
    return torch.cat(parts)
