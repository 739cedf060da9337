"""How sure a growing model may be, from the features of held-out images that its lessons keep.

Nothing of it is stored but what a lesson reports: a calibration is a function of the learner and the kept features, and
so it is right after every lesson, undoing, forgetting and renaming.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from cil import history, metrics, results
from cil.errors import RunError
from cil.growing import events
from cil.growing.records import Kept, key, read_kept
from cil.learner import Learner
from cil.prediction.confident import Confident, open_confident
from cil.prediction.model import Trained, open_run
from cil.results import ConfidenceRow
from cil.rows import GROWING_BY, REJECT_BY
from cil.runner.confidence import FILE, Calibration, scores_of
from cil.utils import hardware

Scored = Mapping[int, tuple[Tensor, np.ndarray]]
"""By lesson: scores float32 [N, C] of the held-out images that can be tested, and their labels, int64 [N]."""


def scored(learner: Learner, kept: Sequence[Kept], absent: Sequence[int], accelerator: Accelerator) -> Scored:
    """The scores of held-out images from their kept features, −∞ for absent classes.

    Lessons without such an image are left out, and so are those of which features of a current view are not kept.

    Args:
        learner: The learner.
        kept: What each lesson holds out.
        absent: Labels that are not predicted, and whose images are not tested.
        accelerator: Device and precision.
    """
    views, gone = [key(version) for version in learner.views()], torch.tensor(absent, dtype=torch.int64)
    found = {}
    for lesson, one in enumerate(kept):
        rows = np.flatnonzero(~np.isin(one.label, absent))
        if len(rows) and all(view in one.features for view in views):
            features = torch.cat([one.features[view] for view in views], dim=1)[torch.from_numpy(rows)]
            scores = scores_of(learner, features, accelerator).index_fill(1, gone, float("-inf"))
            found[lesson] = scores, one.label[rows]
    return found


def together(found: Scored) -> tuple[Tensor, Tensor]:
    """Scores [N, C] and labels [N] of all lessons; there is at least one."""
    scores, labels = zip(*found.values(), strict=True)
    return torch.cat(scores), torch.from_numpy(np.concatenate(labels))


def report(found: Scored) -> ConfidenceRow:
    """What a lesson records of the calibration on the held-out images of all lessons so far, at least one.

    The calibration error is that of images by which the temperature was not chosen: every second image is scored at the
    temperature of the others. The temperature itself is that of all images.
    """
    logits, labels = together(found)
    halves = torch.arange(len(labels)) % 2
    cross = [Calibration().fit(logits[halves != half], labels[halves != half]) for half in (0, 1)]
    sure = torch.stack([one.probabilities(logits).amax(1) for one in cross])[halves, torch.arange(len(labels))]
    plain, right = logits.double().softmax(1).amax(1), (logits.argmax(1) == labels).numpy()
    return {
        "held_out_images": len(labels),
        "temperature": float(Calibration().fit(logits, labels).temperature),
        "calibration_error": metrics.calibration_error(sure.numpy(), right) if len(labels) > 1 else None,
        "calibration_error_uncalibrated": metrics.calibration_error(plain.numpy(), right),
        "unknown_auroc": {},
        "unknown_fpr95": {},
    }


def open_sure(
    folder: Path,
    device: str = "cpu",
    *,
    reject: float | None = None,
    score: str | None = None,
    weights: Path | None = None,
    code: Sequence[Path] = (),
) -> tuple[Trained, str]:
    """A model with calibrated probabilities, and ""; or without, and in one line why they cannot be calibrated.

    Args:
        folder: The model's folder.
        device: As ``hardware.device``.
        reject: Fraction of images of known classes that may be rejected; None: nothing is rejected.
        score: By which score; None: :data:`cil.rows.GROWING_BY`, or of a saved estimator :data:`cil.rows.REJECT_BY`.
        weights: New place of the backbone's weights, if they were moved.
        code: New places of the files of custom classes, if they were moved.

    Raises:
        RunError: The model cannot be opened.
        ConfigError: ``reject`` or ``score`` is out of range.
    """
    header = events.read(folder)
    stages, gone = len(header["tasks"]), history.absent(header)
    if stages and not gone and FILE in results.read_stage(folder, stages - 1).files:  # of a saved estimator
        by = REJECT_BY if score is None else score
        return open_confident(folder, device, reject=reject, score=by, weights=weights, code=code), ""
    model = open_run(folder, device, weights=weights, code=code)
    found = scored(model.learner, read_kept(folder, stages), gone, hardware.accelerator(device))
    if not found:
        held_out = any(lesson["held_out"] for lesson in header["lessons"])
        changed = "the learner's features have changed since images were held out"
        reason = changed if held_out else "its lessons hold out no images (--holdout)"
        return model, f"{folder}: scores are not calibrated, because {reason}"
    calibration = Calibration().fit(*together(found))
    parts = (model.learner, model.transforms, model.names, model.columns)
    return Confident(calibration, reject, GROWING_BY if score is None else score, *parts), ""


def require_sure(model: Trained, reason: str) -> Confident:
    """The first of :func:`open_sure`, if its probabilities are calibrated.

    Raises:
        RunError: They are not.
    """
    if not isinstance(model, Confident):
        raise RunError(f"{reason}, so it cannot say how sure it is")
    return model
