"""What text adds to few images, with SYNTHETIC text: the "text" of a class is the mean feature of a few images of it.

No weights of CLIP were at hand where this was measured. So images of Split-Tiny-ImageNet-100 that nothing else uses
stand in for language: the vector of a class is their mean feature through the shipped backbone, rotated and shifted as
texts of trained models are (:mod:`cil.testing.drawn_text`). It says how the formulas behave when names are worth
something, and not what CLIP does.

    python -m scripts.studies.synthetic_text --data ../shared/data --out results/bench/synthetic_text.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cil.backbone import load_backbone
from cil.config import HardwareConfig
from cil.data.images import load_images, subset
from cil.data.sources import folder, rank_in_class
from cil.features import FeatureCache
from cil.learners.registry import build_learner
from cil.results import summarise
from cil.runner import run_stages
from cil.runner.provenance import versions
from cil.store import FeatureStore, open_store
from cil.stream import Stream
from cil.stream.protocol import ClassIncremental
from cil.testing.drawn_text import drawn_texts
from cil.utils import hardware
from cil.utils.files import write

LEARNERS: dict[str, dict[str, Any]] = {
    "zero_shot": {"name": "zero_shot"},
    "ncm": {"name": "ncm"},
    "slda": {"name": "slda", "shrinkage": "samples"},
    "clip_gda": {"name": "clip_gda"},
    "clip_gda_first_task": {"name": "clip_gda", "weight": "first_task"},
    "clip_gda_prior": {"name": "clip_gda", "space": "joint", "text_prior": 16},
    "tip_adapter": {"name": "tip_adapter", "shots": None},
}
"""Label → learner."""
POOL = 50
"""Images per class, the last ones, that only make texts; every draw of training images has as many others."""


def texts(train: Any, backbone: Any, store: FeatureStore | None, count: int) -> dict[str, Tensor]:
    """The mean feature of the first ``count`` images per class of the pool, by class name."""
    rank = rank_in_class(train.labels)
    sizes = np.bincount(train.labels)[train.labels]
    pool = subset(train, np.flatnonzero((rank >= sizes - POOL) & (rank < sizes - POOL + count)), "texts")
    images = load_images(pool, "train", backbone)
    features = FeatureCache(hardware.accelerator("cpu"), store=store).get(backbone, images, np.arange(len(pool)))
    return {name: features[torch.from_numpy(pool.labels == c)].mean(0) for c, name in enumerate(pool.class_names)}


def measured(train: Any, test: Any, store: FeatureStore | None, shots: int, draw: int, count: int) -> dict[str, Any]:
    """Average and last accuracy of every learner on ten tasks with ``shots`` images per class."""
    backbone = load_backbone()
    drawn = texts(train, backbone, store, count)
    backbone.text = drawn_texts(backbone.feature_dim, drawn.get, f"{count} images of {train.fingerprint}")
    rank = rank_in_class(train.labels)
    few = subset(train, np.flatnonzero((rank >= draw * POOL) & (rank < draw * POOL + shots)), f"draw {draw}, {shots}")
    found = {}
    for label, section in LEARNERS.items():
        images = [load_images(source, split, backbone) for source, split in ((few, "train"), (test, "test"))]
        stream = Stream(*images, ClassIncremental(1993 + draw, increment=10))
        accelerator = hardware.accelerator("cpu")
        rows = run_stages(build_learner(section, backbone), stream, accelerator=accelerator, store=store)
        summary = summarise(rows)
        found[label] = {"a_avg": summary["accuracy_average"], "a_last": summary["accuracy_last"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the tar files of the stream")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4, 16, 50], help="images per class")
    parser.add_argument("--draws", type=int, default=3, help="draws of training images, each with its class order")
    parser.add_argument("--text-images", type=int, default=8, help="images that make the text of a class")
    options = parser.parse_args()
    train, test = (folder(options.data / f"tiny_imagenet_stream_{split}.tar") for split in ("train", "val"))
    store = open_store(HardwareConfig())
    shots: dict[str, Any] = {}
    for count in options.shots:
        draws = [measured(train, test, store, count, draw, options.text_images) for draw in range(options.draws)]
        shots[str(count)] = {
            label: {
                key: {
                    "mean": float(np.mean([draw[label][key] for draw in draws])),
                    "std": float(np.std([draw[label][key] for draw in draws], ddof=min(1, len(draws) - 1))),
                }
                for key in ("a_avg", "a_last")
            }
            for label in LEARNERS
        }
        print(count, json.dumps(shots[str(count)], indent=1), flush=True)
    facts = {
        "synthetic": "the text of a class is the mean feature of images of it, rotated and shifted; no language model",
        "text_images": options.text_images,
        "draws": options.draws,
        "learners": LEARNERS,
        "shots": shots,
        "versions": versions(),
    }
    write(options.out, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
