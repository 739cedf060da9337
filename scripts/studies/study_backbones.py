"""Do scores on the first task's training images rank backbones as the whole stream does?

One small architecture with different weights: the shipped ones, random ones, and some trained here in minutes on
CIFAR-10 or the digits, from scratch or from the shipped ones (by ``pretrain_backbone.py``; no image is of the stream,
though CIFAR-10 has similar classes). They are scored as in ``cil rank-backbones``, and then ``ncm`` and ``ranpac`` run
through the whole stream with each, tested on held-out training images. Finished parts in ``--work`` are reused.

    python -m scripts.studies.study_backbones data.root=../shared/data --out results/bench/backbones.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from cil import load_config, rank_backbones, results, run
from cil.backbone import EMBEDDED
from cil.config import DataConfig
from cil.data.opening import open_source
from cil.runner.checkpoint import to_json
from cil.runner.display import Display
from cil.selection.transferability import SCORES, agreement
from cil.utils.files import write
from scripts import ROOT

CONFIG = "split_tiny_imagenet100/ncm"
LEARNERS = ("ncm", "ranpac")
SIDE = 64
QUICK = ["precision=bf16"]
"""Fastest on a CPU together with explicit attention; see docs/speed.md."""
HELD_OUT = ["stream.validation=0.2", "stream.test_on=validation"]
"""Methods of choosing a backbone are compared without the test split, too."""
SCRATCH = ["--plan", "0.6:32,0.9:48,1.0:64"]
TUNED = ["--plan", "0.5:48,1.0:64", "--muon-lr", "0.002", "--lr", "0.0002"]
VARIANTS: dict[str, tuple[str, int, list[str]]] = {
    "cifar10_3": ("cifar10", 15_000, SCRATCH),
    "shipped_cifar10_1": ("cifar10", 5_000, TUNED),
    "digits_4": ("digits", 5_400, SCRATCH),
    "cifar10_1": ("cifar10", 5_000, SCRATCH),
}
"""Name → (data, number of images seen with repetition, arguments). The number in a name: epochs, about."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=["data.root=../shared/data"], help="key=value for all runs")
    parser.add_argument(
        "--work", type=Path, default=Path("results/backbones"), help="folder for weights and runs of one configuration"
    )
    parser.add_argument("--per-class", type=int, default=50, help="training images per class in the whole stream")
    parser.add_argument("--projection", type=int, default=2000, help="width of RanPAC's random projection")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS, help="variants to train")
    parser.add_argument("--only-train", action="store_true", help="stop after training")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_intermixed_args()

    files = {name: train(name, args.work, load_config(CONFIG, args.overrides).data.root) for name in args.variants}
    if args.only_train:
        return
    weights = {"shipped": None, "random": "random", **{name: str(file) for name, file in files.items()}}
    candidates = {
        name: {"name": EMBEDDED, "attention": "explicit", **({"weights": given} if given else {})}
        for name, given in weights.items()
    }
    display = Display(Console())
    record = rank(list(candidates.values()), [*args.overrides, *QUICK], args.work, display)
    scored = {json.dumps(one["candidate"], sort_keys=True): one for one in record["ranked"]}
    rows: list[dict[str, Any]] = []
    for name, section in candidates.items():
        overrides = [
            *args.overrides,
            *QUICK,
            *HELD_OUT,
            f"name={name}",
            f"data.per_class={args.per_class}",
            f"backbone={json.dumps(section)}",
            f"learners=[ncm, {{name: ranpac, projection: {args.projection}}}]",
            "hardware.checkpoints=last",
        ]
        folders = run(load_config(CONFIG, overrides), args.work / "runs", display=display)
        streams = {
            found["learner"]: {key: found["summary"][key] for key in ("accuracy_last", "accuracy_average")}
            for found in map(results.read_run, folders)
        }
        rows.append({"candidate": name, **row_of(scored, section), "trained": training_of(name), "stream": streams})
        outcomes = {f"{key} stream": [row["stream"][key]["accuracy_last"] for row in rows] for key in LEARNERS}
        found = {
            "config": CONFIG,
            "overrides": [*args.overrides, *QUICK],
            "first_task": {key: record[key] for key in ("tasks", "images", "order", "data")},
            "stream": {"overrides": HELD_OUT, "per_class": args.per_class, "projection": args.projection},
            "candidates": rows,
            "agreement": agreement({**{k: [row[k] for row in rows] for k in SCORES}, **outcomes}),
            "versions": record["versions"],
            "machine": record["machine"],
        }
        if args.out:
            write(args.out, to_json(found))


def rank(candidates: list[dict[str, Any]], overrides: list[str], work: Path, display: Display) -> dict[str, Any]:
    """The record of ``cil rank-backbones`` for these candidates; an existing one is reused."""
    config = load_config(CONFIG, overrides)
    file = work / config.name / "backbones.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"ranked": []}
    if not all(candidate in [one["candidate"] for one in found["ranked"]] for candidate in candidates):
        rank_backbones(config, candidates, work, display=display)
        found = json.loads(file.read_text(encoding="utf-8"))
    return found


def row_of(scored: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
    """A candidate's recorded scores."""
    keep = (*SCORES, "ridge_strength", "sha256", "feature_dim")
    return {key: scored[json.dumps(section, sort_keys=True)][key] for key in keep}


def training_of(name: str) -> dict[str, Any] | None:
    """How a backbone was trained here; None if it was not trained here."""
    if name not in VARIANTS:
        return None
    data, images, arguments = VARIANTS[name]
    start = "shipped" if arguments is TUNED else "scratch"
    return {"data": data, "images_seen": images, "start": start, "arguments": arguments}


def train(name: str, work: Path, root: Path | None) -> Path:
    """The file with the weights of a variant, which are trained if it does not exist."""
    file = work / f"{name}.safetensors"
    if file.exists():
        return file
    data, images, arguments = VARIANTS[name]
    packed = pack(data, work, root)
    shape = ["--data", str(packed.resolve()), "--workers", "1", "--batch", "64", "--micro", "64", "--cutmix", "0"]
    if arguments is TUNED:
        embedded = ROOT / "cil" / "weights" / f"{EMBEDDED}.safetensors"
        arguments = [*arguments, "--init", str(embedded)]
    command = [sys.executable, "-m", "scripts.pretraining.pretrain_backbone", "train"]
    subprocess.run(
        [*command, "--out", str((work / name).resolve()), *shape, "--images", str(images), *arguments],
        cwd=ROOT,
        check=True,
    )
    averaged = torch.load(work / name / "last.pt", weights_only=True)["ema"]
    prefix = "backbone."
    state = {key.removeprefix(prefix): value for key, value in averaged.items() if key.startswith(prefix)}
    half = file.with_suffix(".half")
    save_file({key: value.contiguous() for key, value in state.items()}, half)
    half.replace(file)
    return file


def pack(name: str, work: Path, root: Path | None) -> Path:
    """File with the images in the form for ``pretrain_backbone.py``, at the size of the backbone's input."""
    file = work / f"{name}.pt"
    if file.exists():
        return file
    folder = DataConfig(dataset="folder", root=root, train="cifar10_train.tar", test="cifar10_test.tar")
    config = folder if name == "cifar10" else DataConfig()
    packed = {}
    for split, key in (("train", "pre_train"), ("test", "pre_val")):
        source = open_source(config, split)
        resized = [source.read(i).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for i in range(len(source))]
        pixels = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in resized])
        images = pixels.view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2).contiguous()
        packed[key] = images, torch.from_numpy(source.labels)
    work.mkdir(parents=True, exist_ok=True)
    torch.save(packed, file)
    return file


if __name__ == "__main__":
    main()
