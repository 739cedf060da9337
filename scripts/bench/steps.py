"""What learners cost on a ViT-B/16 at 224 pixels, by one training step on each of two tasks; writes JSON.

The backbone has random weights. The images are a folder of JPEG files of noise, two classes per task. Each learner has
its defaults, but one epoch of one step, and one short epoch of alignment if it aligns. It runs in a process of its own.
Per task: elapsed seconds in all and of the training step (with decoding), peak resident memory above that of the
backbone, and bytes kept. Rows of learners that are not asked for stay in the file.

    python -m scripts.bench.steps --learners loda inflora
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from cil.backbone import load_backbone
from cil.config import BackboneConfig, TransformConfig
from cil.data.images import ImageSet
from cil.data.sources import folder
from cil.data.transforms import Transforms
from cil.features import FeatureCache
from cil.learner import Context
from cil.learners import registry
from cil.runner.checkpoint import state_bytes, to_json
from cil.runner.provenance import versions
from cil.stream import Stream
from cil.stream.protocol import ClassIncremental
from cil.training import Recipe
from cil.utils import hardware
from scripts import ROOT
from scripts.bench.growth import MIB, Found, peak_bytes, reset_peak

LEARNERS = ["e2_lora", "loda", "inflora", "cds", "min", "moal", "care", "care_ensemble", "acmap", "cofima", "duct"]
LEARNERS += ["acil", "ds_al", "air", "gkeal", "ssiat", "macil", "ranpac", "slca", "sd_lora", "cl_lora"]
SHORT = {"epochs": 1, "first_epochs": 1, "head_epochs": 1, "alignment_epochs": 1, "samples": 16}
TASKS = 2


def draw_folder(root: Path, images: int, pixels: int) -> None:
    """Classes of ``images`` / 2 JPEG files each, two per task."""
    random = np.random.RandomState(0)
    for c in range(2 * TASKS):
        place = root / f"class_{c}"
        place.mkdir(parents=True)
        for i in range(images // 2):
            noise = random.randint(0, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(noise).resize((pixels, pixels)).save(place / f"{i}.jpg")


def measure(name: str, model: str, images: int, device: str = "cpu") -> Found:
    """One learner on the tasks, in this process alone."""
    cls = registry.resolve(name)
    defaults = cls.Config().model_dump()
    short = {key: value for key, value in SHORT.items() if defaults.get(key)}
    if issubclass(cls.Config, Recipe):
        short["train_batch_size"] = images
    accelerator = hardware.accelerator(device)
    backbone = load_backbone(BackboneConfig(name=model, weights="random"), accelerator.device)
    gpu = accelerator.device if accelerator.device.type == "cuda" else None
    rows: list[Found] = []
    with tempfile.TemporaryDirectory() as place:
        draw_folder(Path(place), images, backbone.input_size[1])
        data = ImageSet(folder(Path(place)), Transforms(backbone.data_config, TransformConfig()))
        stream = Stream(data, data, ClassIncremental("natural", sizes=(2,) * TASKS))
        base = psutil.Process().memory_info().rss if gpu is None else torch.cuda.memory_allocated(gpu)
        learner = registry.instantiate(cls, cls.Config.model_validate(short), backbone).to(accelerator.device)
        cache = FeatureCache(accelerator, images)
        for task in stream.tasks:
            logged: dict[str, float] = {}
            ctx = Context(accelerator, cache, stage=task.index, log=logged.__setitem__)
            passes, started = backbone.passes, time.perf_counter()
            reset_peak() if gpu is None else torch.cuda.reset_peak_memory_stats(gpu)
            learner.begin(task, ctx)
            learner.learn(task, ctx)
            row: Found = {"seconds": time.perf_counter() - started, "passes": (backbone.passes - passes) / images}
            rate = logged.get("images_per_second")
            row["seconds_step"] = None if rate is None else images / rate
            peak = peak_bytes() if gpu is None else torch.cuda.max_memory_allocated(gpu)
            row["peak_mib"] = (peak - base) / MIB
            row["trained"] = ctx.trainable_parameters
            rows.append({**row, "kept_mib": sum(state_bytes(learner).values()) / MIB})  # type: ignore[call-overload]
    return {"settings": short, "tasks": rows, "grows_mib": rows[-1]["kept_mib"] - rows[-2]["kept_mib"]}


def in_own_process(name: str, arguments: argparse.Namespace) -> Found:
    command = [sys.executable, "-m", "scripts.bench.steps", "--measure", name, "--model", arguments.model]
    command += ["--images", str(arguments.images), "--threads", str(arguments.threads)]
    found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    row: Found = json.loads(found.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learners", nargs="+", default=LEARNERS)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--images", type=int, default=4, help="training images per task, all in one step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/steps.json")
    parser.add_argument("--measure", metavar="LEARNER", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.measure:
        print(json.dumps(measure(given.measure, given.model, given.images)))
        return
    known: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    rows = known.get("learners", {})
    for name in given.learners:
        rows[name] = in_own_process(name, given)
        print(name, rows[name]["tasks"][-1], flush=True)
        found = {
            "machine": hardware.facts(hardware.accelerator()),
            "versions": versions(),
            "model": given.model,
            "images": given.images,
        }
        given.out.write_text(to_json({**found, "learners": rows}), encoding="utf-8")


if __name__ == "__main__":
    main()
