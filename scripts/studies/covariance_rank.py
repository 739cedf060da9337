"""Accuracy with few directions of each class's covariance, on features of the frozen backbone; writes JSON.

FeCAM, and a cosine head that is aligned on class Gaussians as by SSIAT (from random rows, without its training), learn
all classes of a configuration's data with each rank and with whole covariances (``all``). The numbers are accuracies as
fractions. Results for other data in the file are kept.

    python -m scripts.studies.covariance_rank digits/frozen
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cil import load_backbone, load_config
from cil.classifiers import CosineHead, Gaussians, Mahalanobis
from cil.data.images import LoadedSplit
from cil.data.transforms import Transforms
from cil.features import FeatureCache
from cil.learner import Context
from cil.learners.bases.alignment import AlignedRecipe, align, softmax_of
from cil.runner import provenance
from cil.runner.checkpoint import to_json
from cil.training import ParamGroup
from cil.utils import hardware
from scripts import ROOT

ALIGNMENT = AlignedRecipe(alignment_epochs=20, alignment_lr=0.05, samples=64)


def fecam(x: Tensor, y: Tensor, test: Tensor, rank: int | None) -> Tensor:
    """Scores of test features [B, F]."""
    return Mahalanobis(x.shape[1], rank=rank).partial_fit(x, y).logits(test)


def aligned(x: Tensor, y: Tensor, test: Tensor, rank: int | None) -> Tensor:
    """Scores of test features [B, F]."""
    gaussians = Gaussians(x.shape[1], 1e-3, rank).partial_fit(x, y)
    head = CosineHead(x.shape[1], 20.0)
    head.grow(gaussians.num_classes, torch.Generator().manual_seed(0))
    align(softmax_of(head), ParamGroup([head.weight]), gaussians, None, ALIGNMENT, Context())
    with torch.no_grad():
        return head.logits(test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="configuration that names data and backbone, as for cil run")
    parser.add_argument("overrides", nargs="*", help="key=value, as for cil run")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 4, 10, 19])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "covariance_rank.json")
    given = parser.parse_intermixed_args()
    config = load_config(given.config, given.overrides)
    backbone = load_backbone(config.backbone)
    transforms, cache = Transforms(backbone.data_config, config.transform), FeatureCache(hardware.accelerator("cpu"))
    splits = [LoadedSplit(config.data, split, config.hardware).images(transforms) for split in ("train", "test")]
    x, test = (cache.get(backbone, images, np.arange(len(images.labels))) for images in splits)
    y, answers = (torch.as_tensor(images.labels) for images in splits)
    found: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    values: dict[str, Any] = {"images_per_class": float(y.bincount().double().mean())}
    for score in (fecam, aligned):
        for rank in (None, *given.ranks):
            accuracy = float((score(x, y, test, rank).argmax(1) == answers).double().mean())
            values.setdefault(score.__name__, {})[str(rank or "all")] = accuracy
            print(score.__name__, rank, accuracy, flush=True)
    found = {**found, given.config.split("/")[0]: values, "versions": provenance.versions()}
    given.out.write_text(to_json(found), encoding="utf-8")


if __name__ == "__main__":
    main()
