"""Compare CODA-Prompt and fine-tuning with another toolbox's choices, one departure at a time, on a short stream.

The stream is the first 5 tasks of 4 classes of ``configs/split_tiny_imagenet100``, with 40 training images per class,
3 epochs and batches of 32; fine-tuning masks old logits (``loss: local``). Each method runs with this package's
choices, with one of LAMDA-PILOT's choices in their place, with all of them, and with all but the start of the head. The
numbers are A_last as a fraction, one per class order, in the order of ``orders``.

    python -m scripts.studies.departures data.root=../shared/data --out results/bench/departures.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cil import Stream, learners, load_backbone, load_config, run_stages
from cil.backbone import Backbone
from cil.classifiers import LinearHead
from cil.config import Config
from cil.data.images import LoadedSplit
from cil.data.transforms import Transforms
from cil.results import curves
from cil.runner import make_stream, provenance
from cil.runner.checkpoint import to_json
from cil.utils import hardware

TASKS = 5
SHORT = {"epochs": 3, "train_batch_size": 32}
STREAM = ["data.per_class=40", "stream.increment=4", "learners=[ncm]"]

Departure = dict[str, Any]
"""Keys of the learner; ``kaiming``: start of the head's rows; ``transform``: keys of that section."""

METHODS: dict[str, tuple[Departure, dict[str, Departure]]] = {
    "coda_prompt": (
        {"name": "coda_prompt"},
        {
            "head_start": {"head_start": "uniform"},
            "pixels": {"transform": {"normalize": "none"}},
            "components": {"components": 20},  # 100 over 5 tasks
        },
    ),
    "finetune": (
        {"name": "finetune", "loss": "local"},
        {
            "head_start": {"kaiming": True},
            "pixels": {"transform": {"normalize": "none"}},
            "optimiser": {"optimizer": "sgd", "lr": 1e-3, "weight_decay": 2e-4, "schedule": "constant", "warmup": 0},
        },
    ),
}
"""Method → this package's choices, and those of LAMDA-PILOT that differ, by name."""


class KaimingHead(LinearHead):
    """A linear head whose new rows are drawn from U(±√(3/F)), Kaiming's distribution for a linear map; biases are 0."""

    def _new_rows(self, new: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.empty(new, self.feature_dim).uniform_(-1, 1, generator=generator)
        return {"weight": math.sqrt(3 / self.feature_dim) * rows, "bias": torch.zeros(new)}


def variants(departures: Mapping[str, Departure]) -> dict[str, Departure]:
    """The settings to run, by name: no departure, each alone, all, and all but the start of the head."""
    found: dict[str, list[str]] = {"ours": [], **{name: [name] for name in departures}, "theirs": list(departures)}
    found["theirs_but_head_start"] = [name for name in departures if name != "head_start"]
    return {
        title: {key: value for name in names for key, value in departures[name].items()}
        for title, names in found.items()
    }


class Streams:
    """Streams over the decoded images, by class order and transform."""

    def __init__(self, config: Config, backbone: Backbone) -> None:
        self.config, self.backbone = config, backbone
        self.splits = [LoadedSplit(config.data, split, config.hardware) for split in ("train", "test")]

    def make(self, order: int, transform: Mapping[str, Any]) -> Stream:
        section = self.config.transform.model_validate({**self.config.transform.model_dump(), **transform})
        transforms = Transforms(self.backbone.data_config, section)
        images = [split.images(transforms) for split in self.splits]
        return make_stream(self.config.model_copy(update={"orders": [order]}), *images)


def accuracy(settings: Departure, streams: Streams, order: int) -> float:
    """A_last of one setting on one class order, a fraction."""
    settings = dict(settings)
    stream = streams.make(order, settings.pop("transform", {}))
    kaiming = settings.pop("kaiming", False)
    learner: Any = learners.build_learner({**settings, **SHORT}, streams.backbone)
    if kaiming:
        learner.head = KaimingHead(streams.backbone.feature_dim)
    rows = run_stages(learner, stream, accelerator=hardware.accelerator("cpu"), stop_after=TASKS)
    return float(np.asarray(curves(rows)["accuracy/seen"])[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value, as for cil run")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--orders", nargs="+", type=int, default=[1993, 1994, 1995])
    parser.add_argument("--variants", nargs="+", help="names of variants; default: all")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; what it already holds is not run again")
    args = parser.parse_intermixed_args()

    config = load_config("split_tiny_imagenet100/ncm", [*STREAM, *args.overrides])
    backbone = load_backbone(config.backbone)
    streams = Streams(config, backbone)
    found: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    orders: list[int] = found.setdefault("orders", args.orders)
    for number, order in enumerate(orders):
        for method in args.methods:
            base, departures = METHODS[method]
            for title, settings in variants(departures).items():
                values = found.setdefault(method, {}).setdefault(title, [])
                if len(values) == number and (args.variants is None or title in args.variants):
                    values.append(accuracy({**base, **settings}, streams, order))
                    print(method, title, order, round(100 * values[-1], 1), flush=True)
                    args.out.write_text(to_json({**found, "versions": provenance.versions()}), encoding="utf-8")


if __name__ == "__main__":
    main()
