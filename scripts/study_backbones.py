#!/usr/bin/env python
"""Do scores on the first task's training images rank backbones as the whole stream does?

One small architecture with weights that differ: the shipped ones, none, and some trained here in minutes on CIFAR-10 or
the digits, from scratch or from the shipped ones (``pretrain_backbone.py``; none is an image of the stream, though
CIFAR-10's classes have relatives there). They are scored as ``cil rank-backbones`` does it, and then taken through the
whole stream by ``ncm`` and ``ranpac``, tested on training images held out. What is finished in ``--work`` is not done
again.

    python scripts/study_backbones.py data.root=../shared/data --out results/bench/backbones.json
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
from cil.checkpoint import to_json
from cil.config import DataConfig
from cil.console import Display
from cil.data.opening import open_source
from cil.report.files import write
from cil.transferability import SCORES, agreement

CONFIG = "split_tiny_imagenet100/ncm"
LEARNERS = ("ncm", "ranpac")
SIDE = 64
QUICK = ["precision=bf16"]
"""With explicit attention what is fastest on a CPU; see docs/speed.md."""
HELD_OUT = ["stream.validation=0.2", "stream.test_on=validation"]
"""A way of choosing is judged before the test split is opened, too."""
SCRATCH = ["--plan", "0.6:32,0.9:48,1.0:64"]
TUNED = ["--plan", "0.5:48,1.0:64", "--muon-lr", "0.002", "--lr", "0.0002"]
VARIANTS: dict[str, tuple[str, int, list[str]]] = {
    "cifar10_3": ("cifar10", 15_000, SCRATCH),
    "shipped_cifar10_1": ("cifar10", 5_000, TUNED),
    "digits_4": ("digits", 5_400, SCRATCH),
    "cifar10_1": ("cifar10", 5_000, SCRATCH),
}
"""Name → (training images, how many are seen with repetition, arguments). The number in a name: epochs, about."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=["data.root=../shared/data"], help="key=value, for all runs")
    parser.add_argument(
        "--work", type=Path, default=Path("results/backbones"), help="weights, ranking and runs, of one configuration"
    )
    parser.add_argument("--per-class", type=int, default=50, help="training images of each class in the whole stream")
    parser.add_argument("--projection", type=int, default=2000, help="width of RanPAC's random projection")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS, help="which to train")
    parser.add_argument("--only-train", action="store_true", help="stop after training")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = parser.parse_intermixed_args()

    files = {name: trained(name, args.work, load_config(CONFIG, args.overrides).data.root) for name in args.variants}
    if args.only_train:
        return
    weights = {"shipped": None, "random": "random", **{name: str(file) for name, file in files.items()}}
    candidates = {
        name: {"name": EMBEDDED, "attention": "explicit", **({"weights": given} if given else {})}
        for name, given in weights.items()
    }
    display = Display(Console())
    record = ranked(list(candidates.values()), [*args.overrides, *QUICK], args.work, display)
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
            for found in map(results.load, folders)
        }
        rows.append({"candidate": name, **row_of(scored, section), "trained": told(name), "stream": streams})
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


def ranked(candidates: list[dict[str, Any]], overrides: list[str], work: Path, display: Display) -> dict[str, Any]:
    """What ``cil rank-backbones`` records of these candidates; read where it is there already."""
    config = load_config(CONFIG, overrides)
    file = work / config.name / "backbones.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"ranked": []}
    if not all(candidate in [one["candidate"] for one in found["ranked"]] for candidate in candidates):
        rank_backbones(config, candidates, work, display=display)
        found = json.loads(file.read_text(encoding="utf-8"))
    return found


def row_of(scored: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
    """A candidate's scores as they were recorded."""
    keep = (*SCORES, "ridge_strength", "sha256", "feature_dim")
    return {key: scored[json.dumps(section, sort_keys=True)][key] for key in keep}


def told(name: str) -> dict[str, Any] | None:
    """How a backbone was trained here; None if it was not."""
    if name not in VARIANTS:
        return None
    data, images, arguments = VARIANTS[name]
    start = "shipped" if arguments is TUNED else "scratch"
    return {"data": data, "images_seen": images, "start": start, "arguments": arguments}


def trained(name: str, work: Path, root: Path | None) -> Path:
    """The weights of a variant, trained if they are not there yet."""
    file = work / f"{name}.safetensors"
    if file.exists():
        return file
    data, images, arguments = VARIANTS[name]
    packed = pack(data, work, root)
    shape = ["--data", str(packed), "--workers", "1", "--batch", "64", "--micro", "64", "--cutmix", "0"]
    if arguments is TUNED:
        embedded = Path(__file__).parent.parent / "cil" / "weights" / f"{EMBEDDED}.safetensors"
        arguments = [*arguments, "--init", str(embedded)]
    command = [sys.executable, str(Path(__file__).parent / "pretrain_backbone.py"), "train", "--out", str(work / name)]
    subprocess.run([*command, *shape, "--images", str(images), *arguments], check=True)
    averaged = torch.load(work / name / "last.pt", weights_only=True)["ema"]
    prefix = "backbone."
    state = {key.removeprefix(prefix): value for key, value in averaged.items() if key.startswith(prefix)}
    half = file.with_suffix(".half")
    save_file({key: value.contiguous() for key, value in state.items()}, half)
    half.replace(file)
    return file


def pack(name: str, work: Path, root: Path | None) -> Path:
    """Pictures as ``pretrain_backbone.py`` wants them, at the size of the backbone's input."""
    file = work / f"{name}.pt"
    if file.exists():
        return file
    folder = DataConfig(dataset="folder", root=root, train="cifar10_train.tar", test="cifar10_test.tar")
    config = folder if name == "cifar10" else DataConfig()
    packed = {}
    for split, key in (("train", "pre_train"), ("test", "pre_val")):
        source = open_source(config, split)
        pictures = [source.read(i).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for i in range(len(source))]
        pixels = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures])
        images = pixels.view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2).contiguous()
        packed[key] = images, torch.from_numpy(source.labels)
    work.mkdir(parents=True, exist_ok=True)
    torch.save(packed, file)
    return file


if __name__ == "__main__":
    main()
