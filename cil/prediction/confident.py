"""Models that say how sure they are: calibrated probabilities, and images that look like no known class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cil import history, results
from cil.backbone import FROZEN
from cil.errors import ConfigError, RunError, nearest
from cil.prediction.model import Trained, restore
from cil.rows import REJECT_BY, SCORES
from cil.runner.checkpoint import RunFolder
from cil.runner.confidence import FILE, Calibration, Confidence
from cil.utils import hardware


class Confident(Trained):
    """A learner with what was calibrated on the images held out of its tasks.

    Args:
        confidence: The calibration.
        reject: Fraction of images of known classes that may be rejected, in (0, 1); None: nothing is rejected.
        score: One of :data:`cil.rows.SCORES`, by which images are rejected; the calibration must have it.
        parts: Arguments of :class:`Trained`.

    Raises:
        ConfigError: ``reject`` or ``score`` is out of range.
    """

    def __init__(self, confidence: Calibration, reject: float | None, score: str, *parts: Any) -> None:
        super().__init__(*parts)
        if reject is not None and not 0 < reject < 1:
            raise ConfigError(f"reject: {reject:g}; allowed: above 0 and below 1, e.g. 0.05")
        if score not in SCORES:
            raise ConfigError(f"reject: unknown score {score!r}{nearest(score, SCORES)}; allowed: {', '.join(SCORES)}")
        if reject is not None and score not in confidence.names:
            raise ConfigError(
                f"reject: the score {score} needs statistics of frozen features, and only a run with confidence: true "
                f"keeps them; allowed here: {', '.join(confidence.names)}"
            )
        self.confidence, self.reject, self.score = confidence, reject, score

    def judged(self, images: Tensor) -> tuple[Tensor, np.ndarray | None]:
        """Calibrated probabilities float64 [B, C] on the CPU, and whether each image looks like a known class [B]."""
        logits, features = self(images)
        logits = logits.cpu()
        probabilities = self.confidence.probabilities(logits)
        if self.reject is None:
            return probabilities, None
        frozen = None
        if self.confidence.sees_frozen:
            frozen = (features if set(self.learner.views()) == {FROZEN} else self.backbone(images).float()).cpu()
        scores = self.confidence.scores(logits, frozen)
        return probabilities, ~self.confidence.rejected(scores, self.reject, self.score)


def open_confident(
    folder: Path,
    device: str = "cpu",
    *,
    reject: float | None = None,
    score: str = REJECT_BY,
    weights: Path | None = None,
    code: Sequence[Path] = (),
) -> Confident:
    """A run with ``confidence: true``, or a saved estimator that holds out images, as a model that says how sure it is.

    Args:
        folder: A run folder.
        device: As ``hardware.device``.
        reject: Fraction of images of known classes that may be rejected; None: nothing is rejected.
        score: By which score images are rejected.
        weights: New place of the backbone's weights, if they were moved.
        code: New places of the files of custom classes, if they were moved.

    Raises:
        RunError: Nothing was calibrated there, or no longer holds; or as :func:`cil.prediction.open_run` raises it.
        ConfigError: ``reject`` or ``score`` is out of range.
    """
    header, run = results.read_header(folder), RunFolder(folder)
    if gone := history.absent(header):
        name = header["class_names"][gone[0]]
        raise RunError(f"{folder}: was calibrated while it predicted {name!r}; leave out --reject and --probabilities")
    last = min(run.finished(), len(header["tasks"])) - 1
    if last >= 0 and FILE not in results.read_stage(folder, last).files:
        raise RunError(
            f"{folder}: holds no held-out images to be sure by; run it with confidence=true and stream.validation=0.1"
        )
    parts = restore(folder, hardware.accelerator(device), weights=weights, code=code)
    confidence = Confidence(parts[0].backbone.feature_dim)
    run.load_module(confidence, last, FILE)
    return Confident(confidence, reject, score, *parts)
