"""Our side of a comparison with LAMDA-PILOT: processor seconds of twelve learners on one short stream; writes JSON.

20 synthetic classes of 64 × 64 pixels in 5 tasks of 4, 3 epochs per task, on the shipped backbone and one thread. Every
learner is a run of its own, without stored features, after a small run that pays for imports. Learning and testing are
what the run's results call so, in processor seconds in place of elapsed ones; the rest is loading the backbone and the
images, checkpoints, records and TensorBoard. ``--images FOLDER`` writes the images as class folders of PNG files, for
the other side.

    python -m scripts.bench.pilot
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import cil
from cil import results
from cil.config import Config
from cil.data.sources import ImageSource, from_arrays
from cil.runner import stages
from cil.runner.checkpoint import to_json
from cil.runner.provenance import versions
from cil.utils import hardware
from scripts import ROOT

CLASSES, TASKS, SIZE = 20, 5, 64
SHORT = {"epochs": 3, "train_batch_size": 32}
LEARNERS: dict[str, dict[str, Any]] = {
    "simplecil": {"name": "ncm"},
    "slca": {"name": "slca", **SHORT},
    "ranpac": {"name": "ranpac", "projection": 2000},
    "aper": {"name": "aper", **SHORT},
    "fecam": {"name": "fecam"},
    "mos": {"name": "mos", **SHORT},
    "coda_prompt": {"name": "coda_prompt", **SHORT},
    "ease": {"name": "ease", **SHORT},
    "finetune": {"name": "finetune", "loss": "local", **SHORT},
    "lae": {"name": "lae", "frozen_epochs": 1, **SHORT},
    "dualprompt": {"name": "dualprompt", **SHORT},
    "l2p": {"name": "l2p", **SHORT},
}
"""Name as LAMDA-PILOT has it → our learner; what is not given here is our default."""
Found = dict[str, Any]


def pictures(split: str, per_class: int, size: int) -> ImageSource:
    """Classes of one coarse pattern each, under noise: ``per_class`` training images, half as many test images."""
    count = per_class if split == "train" else max(1, per_class // 2)
    labels = np.arange(CLASSES).repeat(count)
    coarse = np.random.RandomState(0).randint(64, 192, (CLASSES, 8, 8, 3))
    patterns = coarse.repeat(size // 8, axis=1).repeat(size // 8, axis=2)
    noise = np.random.RandomState(1 + (split == "test")).randint(-64, 64, (len(labels), size, size, 3))
    images = (patterns[labels] + noise).astype(np.uint8)
    return from_arrays(images, labels, [f"class {i:02d}" for i in range(CLASSES)])


def export(folder: Path, options: dict[str, int]) -> None:
    """Write the images as ``FOLDER/train/<class>/<number>.png`` and ``FOLDER/test/…``."""
    for split in ("train", "test"):
        source = pictures(split, **options)
        for i, label in enumerate(source.labels):
            place = folder / split / source.class_names[label]
            place.mkdir(parents=True, exist_ok=True)
            source.read(i).save(place / f"{i:04d}.png")


def measure(learner: dict[str, Any], options: dict[str, int], backbone: dict[str, Any]) -> Found:
    """Processor seconds of one run in three parts, and its last accuracy."""
    config = Config.model_validate(
        {
            "name": "pilot",
            "data": {"dataset": f"{Path(__file__).resolve()}:pictures", "options": options},
            "backbone": backbone,
            "stream": {"increment": CLASSES // TASKS},
            "learners": [learner],
            "orders": [1993],
            "hardware": {"device": "cpu", "feature_store": "off", "workers": 0},
        }
    )
    with tempfile.TemporaryDirectory() as root:
        started = time.process_time()
        [folder] = cil.run(config, root)
        whole = time.process_time() - started
        run = results.read_run(folder)
    learning, testing = (sum(row["costs"][part] for row in run["stages"]) for part in ("seconds_learn", "seconds_test"))
    found = {"learning": learning, "testing": testing, "rest": whole - learning - testing, "total": whole}
    return {**found, "accuracy_last": run["curves"]["accuracy/seen"][-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, default=list(LEARNERS))
    parser.add_argument("--per-class", type=int, default=10, help="training images per class; half as many are tested")
    parser.add_argument("--images", type=Path, help="only write the images below this folder")
    parser.add_argument("--small", action="store_true", help="16 pixels and an untrained backbone of 48 features")
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/pilot.json")
    given = parser.parse_args()
    options = {"per_class": given.per_class, "size": 16 if given.small else SIZE}
    if given.images:
        export(given.images, options)
        return
    torch.set_num_threads(1)
    # learning and testing are timed by the clock of that module
    stages.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 3}
    small = {"name": "vit_tiny_patch16_224", "weights": "random", "options": sizes}
    backbone: dict[str, Any] = small if given.small else {}
    found: Found = {"machine": hardware.facts(hardware.accelerator("cpu")), "versions": versions(), **options}
    known = json.loads(given.out.read_text(encoding="utf-8"))["learners"] if given.out.exists() else {}
    found["learners"] = known  # learners that are not measured now keep what was measured of them
    if not given.small:
        measure({"name": "finetune", "epochs": 1}, {"per_class": 1, "size": SIZE}, backbone)  # pays for imports
    for name in given.learners:
        known[name] = {"settings": LEARNERS[name], **measure(LEARNERS[name], options, backbone)}
        print(name, json.dumps(known[name]), flush=True)
        given.out.write_text(to_json(found), encoding="utf-8")


if __name__ == "__main__":
    main()
