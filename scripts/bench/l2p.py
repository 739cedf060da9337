"""Overhead of the training loop over L2P's two passes: one stage of ``l2p`` compared with the bare calls in one run.

Bare: per batch, the frozen forward under inference mode, the forward with prompts, and the backward, on normalised
images in memory; no choice of prompts, no optimiser, no data loading. Ours: ``L2P.learn`` on the same number of images:
augmentation, choice of prompts and key loss, clipping, Adam, and logging.

    python -m scripts.bench.l2p [--rounds 5] [--out results/bench/l2p_overhead.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from cil import load_backbone, load_config
from cil.data.images import LoadedSplit
from cil.data.transforms import Transforms
from cil.features import FeatureCache
from cil.learner import Context
from cil.learners.l2p import L2P
from cil.runner import make_stream
from cil.tuning import PooledPrompts
from cil.utils import hardware


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of measurements")
    parser.add_argument("--per-class", type=int, default=64, help="images per class, for two classes")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    accelerator = hardware.accelerator("auto")
    backbone = load_backbone(device=accelerator.device)
    config = load_config("quickstart", [f"data.per_class={args.per_class}"])
    transforms = Transforms(backbone.data_config, config.transform)
    splits = [LoadedSplit(config.data, split, config.hardware).images(transforms) for split in ("train", "test")]
    task = make_stream(config, *splits).tasks[0]
    l2p = L2P(L2P.Config(), backbone)
    size, epochs = l2p.config.train_batch_size, l2p.config.epochs
    batches = list(task.train.batches(size, device=accelerator.device))

    def bare() -> float:
        head = torch.nn.Linear(backbone.feature_dim, len(task.seen), device=accelerator.device)
        prompts = l2p.prompts.detach().clone().requires_grad_()[: l2p.config.top].flatten(0, 1)
        return seconds(lambda: [one_step(head, prompts, *batch) for _ in range(epochs) for batch in batches])

    def one_step(head: torch.nn.Linear, prompts: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.inference_mode():
            backbone(images)
        features = backbone(images, PooledPrompts(backbone, prompts.expand(len(images), -1, -1)))
        F.cross_entropy(head(features), labels).backward(retain_graph=True)

    def ours() -> float:
        learner = L2P(L2P.Config(), backbone)
        ctx = Context(accelerator, FeatureCache(accelerator, config.inference_batch_size))
        learner.begin(task, ctx)
        learner.to(accelerator.device)
        return seconds(lambda: learner.learn(task, ctx))

    bare(), ours()  # warm up
    pairs = [(bare(), ours()) for _ in range(args.rounds)]
    ratios = [b / a for a, b in pairs]
    images = epochs * len(task.train)
    found = {
        "images": images,
        "batch": size,
        "rounds": args.rounds,
        "bare_ms_per_image": 1000 * statistics.median(a for a, _ in pairs) / images,
        "ours_ms_per_image": 1000 * statistics.median(b for _, b in pairs) / images,
        "overhead": statistics.median(ratios) - 1,
        "overhead_min_max": [min(ratios) - 1, max(ratios) - 1],
        "machine": hardware.facts(accelerator),
        "torch": torch.__version__,
    }
    print(json.dumps(found, indent=2))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
