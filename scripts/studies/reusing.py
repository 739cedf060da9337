"""Which ways of holding a tuner to what it was help finetune and ssiat, paired with the plain learner per class order.

The streams are the digits and Split-Tiny-ImageNet-100, in five tasks, with few images per class of 32 × 32 pixels, so
that two cores can train all cells. The plain learner has three rates, and each way three weights at the plain learner's
rate. Those with the highest accuracy on other training images of the first two tasks of the first class order are used
for all class orders; no later task and no test image takes part in the choice. A finished cell is in ``--out`` and is
not computed again.

    python -m scripts.studies.reusing --data ../shared/data --out results/bench/reusing.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cil.backbone import load_backbone
from cil.config import Augmentation, BackboneConfig, TransformConfig
from cil.data.images import ImageSet, load_images, subset
from cil.data.sources import ImageSource, digits, folder, rank_in_class
from cil.errors import TrainingError
from cil.learners.registry import build_learner
from cil.results import summarise
from cil.runner import run_stages
from cil.runner.provenance import versions
from cil.stream import Stream
from cil.stream.protocol import ClassIncremental
from cil.utils import hardware
from cil.utils.files import write

ORDERS = (1993, 1994, 1995)
TASKS, FIRST = 5, 2
"""Number of tasks, and of those on which weights are chosen."""
IMAGES = (20, 20, 20)
"""Images per class to train on, those after them to choose weights on, and to test on."""
LEARNERS: dict[str, dict[str, Any]] = {
    "finetune": {"loss": "local", "optimizer": "sgd", "warmup": 0, "train_batch_size": 16, "epochs": 3},
    "ssiat": {"first_epochs": 4, "epochs": 3, "train_batch_size": 16},
}
PLAIN = "plain"
WAYS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    PLAIN: ({"lr": None}, (0.003, 0.01, 0.03)),
    "anchor: l2": ({"anchor": {"norm": "l2", "beta": 0, "alpha": None}}, (0.1, 1, 10)),
    "anchor: l1": ({"anchor": {"norm": "l1", "beta": 0, "alpha": None}}, (1e-4, 1e-3, 1e-2)),
    "anchor: fisher": ({"anchor": {"norm": "fisher", "beta": 0, "alpha": None}}, (0.1, 1, 10)),
    "anchor: mars": ({"anchor": {"norm": "mars", "beta": 0, "bound": None}}, (0.03, 0.1, 0.3)),
    "distill: logits": ({"distill": {"what": "logits", "weight": None}}, (0.3, 1, 3)),
    "distill: features": ({"distill": {"what": "features", "weight": None}}, (1, 10, 100)),
    "distill: blocks": ({"distill": {"what": "blocks", "weight": None}}, (0.1, 1, 10)),
    "distill: relations": ({"distill": {"what": "relations", "weight": None}}, (1, 10, 100)),
    "bss": ({"bss": None}, (1e-4, 1e-3, 1e-2)),
}
"""Way → section in which None stands for the weight, for the plain learner for the rate, and those to choose from."""


def weighted(section: dict[str, Any], weight: float) -> dict[str, Any]:
    """A section with its weight set."""
    return {k: weight if v is None else weighted(v, weight) if isinstance(v, dict) else v for k, v in section.items()}


class Setting:
    """The images of one stream, and the accuracies of learners on them.

    Args:
        name: ``digits`` or ``tiny``.
        data: Folder with the tar files of the stream.
        images: Images per class to train on, to choose weights on, and to test on.
    """

    def __init__(self, name: str, data: Path, images: Sequence[int]) -> None:
        self.backbone = load_backbone(BackboneConfig(options={"img_size": 32}))
        sources = (digits(split) for split in ("train", "test"))
        augment = Augmentation()
        if name == "tiny":
            sources = (folder(data / f"tiny_imagenet_stream_{split}.tar") for split in ("train", "val"))
        else:  # a mirrored digit is another digit
            augment = Augmentation(scale=(0.6, 1.0), ratio=(0.9, 1.1), flip=0)
        train, test = sources
        trained, held_out, tested = images
        self.transform = TransformConfig(augment=augment)
        self.train = self._images(train, "train", 0, trained)
        self.held_out = self._images(train, "test", trained, trained + held_out)
        self.test = self._images(test, "test", 0, tested)
        self.classes = len(train.class_names)

    def _images(self, source: ImageSource, split: str, first: int, end: int) -> ImageSet:
        """The images from ``first`` to before ``end`` of each class."""
        rank = rank_in_class(source.labels)
        part = subset(source, np.flatnonzero((rank >= first) & (rank < end)), f"{first} to {end}")
        return load_images(part, split, self.backbone, self.transform)

    def measure(self, learner: str, section: dict[str, Any], order: int, *, choosing: bool = False) -> dict[str, Any]:
        """Accuracies and seconds of one run; for a choice of weights, of its first tasks on held-out images.

        A training that fails has the reason, and no accuracies.
        """
        started = time.perf_counter()
        tested = self.held_out if choosing else self.test
        stream = Stream(self.train, tested, ClassIncremental(order, increment=self.classes // TASKS))
        built = build_learner({"name": learner, **LEARNERS[learner], **section}, self.backbone)
        accelerator, stages = hardware.accelerator("cpu"), FIRST if choosing else None
        try:
            summary = summarise(run_stages(built, stream, accelerator=accelerator, stop_after=stages))
        except TrainingError as error:
            return {"failed": str(error), "seconds": time.perf_counter() - started}
        keys = ("accuracy_last", "accuracy_average", "forgetting")
        return {key: summary[key] for key in keys} | {"seconds": time.perf_counter() - started}


def cells(streams: list[str], learners: list[str]) -> Iterator[tuple[str, str, str, int | float | None]]:
    """(stream, learner, way, None) for the choice of a weight, and (stream, learner, way, order) for a run."""
    return itertools.product(streams, learners, WAYS, (None, *ORDERS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the tar files of the stream")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; what it already holds is not run again")
    parser.add_argument("--streams", nargs="+", choices=["digits", "tiny"], default=["digits", "tiny"])
    parser.add_argument("--learners", nargs="+", choices=list(LEARNERS), default=list(LEARNERS))
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop at the end of a cell after so many seconds"
    )
    parser.add_argument(
        "--images", nargs=3, type=int, default=IMAGES, metavar=("TRAIN", "CHOOSE", "TEST"), help="images per class"
    )
    options = parser.parse_args()
    started, settings = time.perf_counter(), {}
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"choices": {}, "runs": {}}
    for stream, learner, way, order in cells(options.streams, options.learners):
        key = f"{stream} {learner} {way}"
        if key in found["choices"] if order is None else str(order) in found["runs"].get(key, {}):
            continue
        if stream not in settings:
            settings[stream] = Setting(stream, options.data, options.images)
        setting, (section, weights), choices = settings[stream], WAYS[way], found["choices"]
        rate = {} if way == PLAIN else {"lr": choices[f"{stream} {learner} {PLAIN}"]["weight"]}
        sections = {w: rate | weighted(section, w) for w in weights}
        if order is None:
            tried = {str(w): setting.measure(learner, s, ORDERS[0], choosing=True) for w, s in sections.items()}
            best = max(weights, key=lambda w: tried[str(w)].get("accuracy_last", -1.0))
            choices[key] = {"weight": best, "tried": tried}
        else:
            chosen = sections[choices[key]["weight"]]
            found["runs"].setdefault(key, {})[str(order)] = setting.measure(learner, chosen, order)
        print(key, order, round(time.perf_counter() - started), flush=True)
        images = dict(zip(("train", "held_out", "test"), options.images, strict=True))
        facts = {"orders": ORDERS, "learners": LEARNERS, "images": images}
        write(options.out, json.dumps({**facts, "versions": versions(), **found}, indent=1) + "\n")
        if time.perf_counter() - started > options.seconds:
            break


if __name__ == "__main__":
    main()
