"""Cost of heavy heads at many classes: ``ranpac``, ``fecam``, ``slca``, ``ssiat`` and ``mos``; writes JSON.

Synthetic classes of width 768 in five tasks, 20 images per class, on the classifiers alone: no images, no backbone. Of
the learners that train, the part that grows with the classes is measured: their Gaussians, one epoch of alignment, and
for ``ssiat`` the correction of old Gaussians. Rows ``…_rank_10`` keep ten directions of every covariance. Every case
runs in its own process. ``--against`` measures another checkout of this repository in turn with this one, and compares
what both predict; rows with a rank are measured here alone.

    python -m scripts.bench.heads
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cil.classifiers import CosineHead, Gaussians, LinearHead, Mahalanobis, Ridge
from cil.classifiers.heads import Head
from cil.learner import Context
from cil.learners.bases.alignment import AlignedRecipe, align, mean_scales, normalized_cross_entropy, softmax_of
from cil.runner.checkpoint import to_json, write_state
from cil.runner.provenance import versions
from cil.training import ParamGroup
from cil.utils import hardware
from scripts import ROOT
from scripts.bench.growth import features, timed

MIB = 2**20
TASKS, RANK = 5, 10
Found = dict[str, Any]


class Gaussed(nn.Module):
    """The heavy part of a learner that trains a head on class Gaussians.

    Args:
        width: Width of the features.
        head: The head.
        ridge: Ridge of the Gaussians.
        per_class: Vectors drawn per class and epoch.
        normalised: Whether the loss is SLCA's, with normalised logits.
        shifted: Whether old Gaussians are shifted in every task, as SSIAT does.
        low_rank: ``rank`` of the covariances, which another checkout may not know.
    """

    def __init__(
        self, width: int, head: Head, ridge: float, per_class: int, normalised: bool, shifted: bool, **low_rank: int
    ) -> None:
        super().__init__()
        self.head, self.gaussians, self.shifted = head, Gaussians(width, ridge, **low_rank), shifted
        self.normalised, self.recipe = normalised, AlignedRecipe(alignment_epochs=1, samples=per_class)

    def partial_fit(self, x: Tensor, y: Tensor) -> None:
        if self.shifted and self.gaussians.num_classes:
            shifts = 0.01 * torch.randn(self.gaussians.sums.shape, generator=torch.Generator().manual_seed(0))
            self.gaussians.translate(shifts)
        self.gaussians.partial_fit(x, y)
        self.head.grow(int(y.max()) + 1, torch.Generator().manual_seed(0))

    def align(self, stage: int) -> None:
        tasks = torch.arange(self.head.num_classes) * TASKS // self.head.num_classes
        loss = softmax_of(self.head)
        if self.normalised:

            def loss(features: Tensor, labels: Tensor, reduction: str = "mean") -> tuple[Tensor, Tensor]:
                logits = self.head(features)
                return normalized_cross_entropy(logits, labels, tasks, reduction=reduction), logits

        group = ParamGroup(self.head.rows)
        align(loss, group, self.gaussians, mean_scales(tasks), self.recipe, Context(stage=stage))

    def logits(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.head.logits(x)


HEADS: dict[str, Callable[[int, int], Any]] = {
    "ranpac": lambda width, projection: Ridge(width, projection),
    "fecam": lambda width, projection: Mahalanobis(width),
    "slca": lambda width, projection: Gaussed(width, LinearHead(width), 1e-4, 256, True, False),
    "ssiat": lambda width, projection: Gaussed(width, CosineHead(width, 20.0), 1e-3, 256, False, True),
    "mos": lambda width, projection: Gaussed(width, LinearHead(width), 1e-4, 240, False, False),
    "fecam_rank_10": lambda width, projection: Mahalanobis(width, rank=RANK),
    "slca_rank_10": lambda width, projection: Gaussed(width, LinearHead(width), 1e-4, 256, True, False, rank=RANK),
}


def peak_mib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def measure(head: str, classes: int, per_class: int, width: int, projection: int, tested: int) -> Found:
    """The last of five stages, in parts of seconds, the bytes of its checkpoint, and the peak of this process."""
    base = peak_mib()
    model, step = HEADS[head](width, projection), classes // TASKS
    seconds: dict[str, float] = {}
    for task in range(TASKS):
        x, y = features(range(task * step, (task + 1) * step), per_class, width, 0)
        seconds["learn"], _ = timed(partial(model.partial_fit, x, y))
    if isinstance(model, Gaussed):
        seconds["align"], _ = timed(lambda: model.align(TASKS - 1))
    test, labels = features(range(step * TASKS), 1, width, 1)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:tested]
    test, labels = test[chosen], labels[chosen]
    first, scores = timed(lambda: model.logits(test))
    seconds["predict_per_image"] = timed(lambda: model.logits(test))[0] / len(test)
    seconds["solve"] = max(0.0, first - seconds["predict_per_image"] * len(test))
    with tempfile.TemporaryDirectory() as folder:
        seconds["write"], _ = timed(lambda: write_state(model, Path(folder)))
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {
        "classes": step * TASKS,
        "seconds": seconds,
        "checkpoint_mib": size / MIB,
        "peak_mib": peak_mib() - base,
        "base_mib": base,
        "accuracy": float((scores.argmax(1) == labels).double().mean()),
        "scores": hashlib.sha256(scores.numpy().tobytes()).hexdigest()[:16],
        "mean_score": float(scores.double().mean()),
    }


def in_own_process(head: str, classes: int, given: argparse.Namespace, checkout: Path) -> Found:
    """A measurement with the ``cil`` of a checkout, in a process whose memory is only its own."""
    numbers = [head, classes, given.per_class, given.width, given.projection, given.tested]
    command = [sys.executable, str(Path(__file__).resolve()), "--threads", given.threads, "--measure", *numbers]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [str(c) for c in command], cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--classes", type=int, nargs="+", default=[200, 1000], help="multiples of 5")
    parser.add_argument("--per-class", type=int, default=20, help="training images per class")
    parser.add_argument("--width", type=int, default=768, help="width of the features")
    parser.add_argument("--projection", type=int, default=10_000, help="M of ranpac")
    parser.add_argument("--tested", type=int, default=64, help="test images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--against", type=Path, help="another checkout of this repository, measured in turn")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "heads.json")
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.measure:
        print(json.dumps(measure(given.measure[0], *map(int, given.measure[1:]))))
        return
    sides = {"ours": ROOT} | ({"against": given.against.resolve()} if given.against else {})
    result: Found = {"machine": hardware.facts(hardware.accelerator("cpu")), "versions": versions(), "heads": {}}
    if given.out.exists():  # heads that are not measured now keep what was measured of them
        result["heads"] = json.loads(given.out.read_text(encoding="utf-8"))["heads"]
    for head in given.heads:
        for classes in given.classes:
            for side, checkout in sides.items():
                if side == "against" and head.endswith(f"_rank_{RANK}"):
                    continue
                found = in_own_process(head, classes, given, checkout)
                result["heads"].setdefault(head, {}).setdefault(str(found["classes"]), {})[side] = found
                print(head, side, json.dumps(found), flush=True)
                # after every measurement, so that an interrupted run has some results
                given.out.write_text(to_json(result), encoding="utf-8")


if __name__ == "__main__":
    main()
