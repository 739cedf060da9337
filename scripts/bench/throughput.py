"""Throughput of our loops as a share of plain torch and timm, measured side by side; writes JSON and a PNG.

Evaluation: ``vit(images)`` under inference mode on normalised tensors, compared with ``evaluate`` of ``ncm`` with an
empty feature cache (uint8 pixels in memory, and JPEG files with decoding and resizing).
Training: a hand-written loop of forward, backward and step on normalised tensors, compared with ``cil.training.fit``
with the same tuner, head and optimiser, without and with the default augmentation. For ``full`` the hand-written loop
trains a copy of the timm model itself. Attention: torch's fused kernel compared with the explicit softmax.

Images are synthetic. Both sides are measured alternately, in changing order; reported are medians of the pairs' ratios.

    python -m scripts.bench.throughput                                               # this machine's CPU
    python -m scripts.bench.throughput --device cuda --precision bf16 --compile --images 2048 --batch 256
"""

from __future__ import annotations

import argparse
import copy
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from cil.backbone import EMBEDDED, Backbone, feature_width, load_backbone
from cil.classifiers import CosineHead
from cil.config import BackboneConfig, TransformConfig
from cil.data.images import ImageSet
from cil.data.sources import ImageSource, from_arrays
from cil.data.transforms import Transforms
from cil.errors import CilError
from cil.features import FeatureCache
from cil.learner import Context
from cil.learners.ncm import NCMLearner
from cil.runner.checkpoint import to_json
from cil.runner.evaluation import evaluate
from cil.runner.provenance import versions
from cil.stream import Stream, TaskData
from cil.stream.protocol import ClassIncremental
from cil.training import ParamGroup, Recipe, build_optimizer, cross_entropy, fit
from cil.tuning import build_tuner
from cil.tuning.configs import TunerSection
from cil.utils import hardware
from cil.utils.randomness import isolated
from scripts import ROOT
from scripts.bench.throughput_figure import GOALS, draw

SIZES = {"tiny": EMBEDDED, "small": "vit_small_patch16_224", "base": "vit_base_patch16_224"}
FEW = ["adapter", "lora", "full"]
TUNERS = {
    "tiny": [get_args(section.model_fields["name"].annotation)[0] for section in get_args(TunerSection)],
    "small": FEW,
    "base": FEW,
}
CLASSES = 2
Found = dict[str, Any]


def jpegs(count: int, size: int) -> ImageSource:
    """Smooth synthetic images as JPEG files in memory, decoded at every read."""
    rng, files = np.random.default_rng(0), []
    for _ in range(min(count, 32)):  # repeated: the content does not matter
        coarse = Image.fromarray(rng.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return ImageSource(
        lambda i: Image.open(io.BytesIO(files[i % len(files)])).convert("RGB"),
        np.arange(count) % CLASSES,
        [f"class {c}" for c in range(CLASSES)],
        describe=str,
        fingerprint="synthetic",
    )


class Bench:
    """One backbone, its images in every form, and the two sides of each comparison."""

    def __init__(self, name: str, arguments: argparse.Namespace, accelerator: Accelerator, count: int) -> None:
        self.accelerator, self.batch, self.pairs = accelerator, min(arguments.batch, count // 2), arguments.pairs
        options = {"img_size": 32, "depth": 2} if arguments.quick and name != "tiny" else {}
        config = BackboneConfig(name=SIZES[name], weights=None if name == "tiny" else "random", options=options)
        self.backbone: Backbone = load_backbone(config, accelerator.device)
        if arguments.compile:
            self.backbone.compile()
        size = self.backbone.data_config["input_size"][-1]
        self.files = jpegs(count, size + size // 7 // 8 * 8)  # 64 → 72, 224 → 256
        pixels = np.stack([np.asarray(self.files.read(i)) for i in range(count)])
        self.held = from_arrays(pixels, self.files.labels, self.files.class_names)
        self.sets = {
            augment: ImageSet(self.held, Transforms(self.backbone.data_config, TransformConfig(**chosen)))
            for augment, chosen in (("none", {"augment": "none"}), ("default", {}))
        }
        plain = self.sets["none"]
        everything = np.arange(count)
        self.ready = list(plain.batches(everything, self.held.labels, self.batch, device=accelerator.device))

    def seconds(self, call: Callable[[], object]) -> float:
        """Processor time on a CPU, as it depends less on other load; elapsed time, with synchronisation, on a GPU."""
        gpu = self.accelerator.device.type == "cuda"
        clock = time.perf_counter if gpu else time.process_time
        started = clock()
        call()
        if gpu:
            torch.cuda.synchronize()
        return clock() - started

    def compare(self, bare: Callable[[], object], **ours: Callable[[], object]) -> Found:
        """Images per second of every side, and ours as a share of the bare one: median, lowest, highest pair."""
        calls = {"bare": bare, **ours}
        for call in calls.values():
            call()  # warm up
        times: dict[str, list[float]] = {name: [] for name in calls}
        for pair in range(self.pairs):
            for name in list(calls)[:: 1 if pair % 2 else -1]:
                times[name].append(self.seconds(calls[name]))
        found: Found = {
            name: {"images_per_second": len(self.held) / statistics.median(values)} for name, values in times.items()
        }
        for name in ours:
            shares = [b / o for b, o in zip(times["bare"], times[name], strict=True)]
            found[name] |= {"share": statistics.median(shares), "lowest": min(shares), "highest": max(shares)}
        return found

    def evaluation(self) -> Found:
        learner = NCMLearner(NCMLearner.Config(), self.backbone)
        learner.to(self.accelerator.device)
        tasks = ClassIncremental("natural", sizes=(CLASSES,))
        plain = self.sets["none"]

        def stream(images: ImageSet) -> Stream:
            return Stream(plain, images, tasks)

        warm = stream(plain)
        context = Context(self.accelerator, FeatureCache(self.accelerator, self.batch))
        learner.begin(warm.tasks[0], context)
        learner.learn(warm.tasks[0], context)

        def tested(of: Stream) -> None:
            evaluate(learner, of, 0, FeatureCache(self.accelerator, self.batch))

        def bare() -> None:
            model = self.backbone.model
            with torch.inference_mode(), self.accelerator.autocast():
                for images, _ in self.ready:
                    model.forward_head(model.forward_features(images), pre_logits=True)

        return self.compare(
            bare,
            steady=lambda: tested(warm),
            decoding=lambda: tested(stream(ImageSet(self.files, plain.transforms))),
        )

    def training(self, name: str) -> Found:
        recipe = Recipe(epochs=1, train_batch_size=self.batch, optimizer="adamw", lr=1e-4)
        tuner = build_tuner(name, self.backbone)
        head = CosineHead(feature_width(self.backbone, tuner))
        head.grow(CLASSES, torch.Generator().manual_seed(0))
        head.to(self.accelerator.device)
        model = copy.deepcopy(self.backbone.model) if name == "full" else None

        def see(images: Tensor) -> Tensor:
            return self.backbone(images, tuner)

        def directly(images: Tensor) -> Tensor:
            assert model is not None
            return model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]

        def bare() -> None:
            seeing: nn.Module = tuner if model is None else model
            forward = see if model is None else directly
            parameters = [*seeing.parameters(), *head.parameters()]
            for p in parameters:
                p.requires_grad_(True)
            optimizer = build_optimizer([ParamGroup(parameters)], recipe)
            with isolated(0):  # dropout
                for images, labels in self.ready:
                    with self.accelerator.autocast():
                        loss = F.cross_entropy(head(forward(images)), labels)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            for p in parameters:
                p.requires_grad_(False)

        def ours(augment: str) -> None:
            data = TaskData(self.sets[augment], np.arange(len(self.held)), self.held.labels)
            context = Context(self.accelerator, FeatureCache(self.accelerator, self.batch))
            loss = cross_entropy(lambda images: head(see(images)), recipe)
            fit(loss, [ParamGroup([*tuner.parameters(), *head.parameters()])], data, recipe, context)

        tuner.train()
        return self.compare(bare, plain=lambda: ours("none"), augmented=lambda: ours("default"))

    def attention(self, training: bool) -> Found:
        """Explicit softmax against torch's fused attention (bare): forward, or with backward through every weight."""
        model: Any = copy.deepcopy(self.backbone.model).requires_grad_(training)

        def passed(fused: bool) -> None:
            for block in model.blocks:
                block.attn.fused_attn = fused
            with torch.inference_mode(not training):
                for images, _ in self.ready:
                    with self.accelerator.autocast():
                        features = model.forward_head(model.forward_features(images), pre_logits=True)
                    if training:
                        features.float().square().mean().backward()
                        model.zero_grad()

        return self.compare(lambda: passed(True), explicit=lambda: passed(False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--parts", nargs="+", choices=["evaluation", "training", "attention"])
    parser.add_argument("--tuners", nargs="+", choices=TUNERS["tiny"], help="default: all for tiny, else some")
    parser.add_argument("--images", type=int, nargs="+", default=[192], help="images: one number, or one per size")
    parser.add_argument("--batch", type=int, default=64, help="at most half of the images")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each side")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the backbone for both sides")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small models and few images, to check the script")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.images, arguments.batch, arguments.pairs = [8], 4, 1
    if len(arguments.images) not in (1, len(arguments.sizes)):
        parser.error(f"--images: give one number, or one for each of {' '.join(arguments.sizes)}")
    if min(arguments.images) < CLASSES:
        parser.error(f"--images: give at least {CLASSES}")
    counts = arguments.images * (1 if len(arguments.images) > 1 else len(arguments.sizes))
    try:
        accelerator = hardware.accelerator(arguments.device, arguments.precision)
    except CilError as error:
        parser.error(str(error).replace("hardware.device", "--device"))
    parts = arguments.parts or ["evaluation", "training"]
    result: Found = {
        "batch": arguments.batch,
        "pairs": arguments.pairs,
        "precision": arguments.precision,
        "compiled": arguments.compile,
        "goals": GOALS,
        "machine": hardware.facts(accelerator),
        "versions": versions(),
        "sizes": {},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = "attention" if parts == ["attention"] else "throughput"
    kind = f"{accelerator.device.type}_{arguments.precision}{'_compiled' if arguments.compile else ''}"
    stem = f"{stem}_quick" if arguments.quick else f"{stem}_{kind}"

    def keep(size: str, part: str, what: str, measured: Found) -> None:
        """Write the results after every comparison, so that an interrupted run has some."""
        sides = [
            f"{k} {m['share']:.3f} ({m['lowest']:.3f} to {m['highest']:.3f})"
            for k, m in measured.items()
            if "share" in m
        ]
        print(f"{size:6} {what:12} bare {measured['bare']['images_per_second']:8.1f}/s, {', '.join(sides)}", flush=True)
        result["sizes"][size].setdefault(part, {})[what] = measured
        (arguments.out / f"{stem}.json").write_text(to_json(result), encoding="utf-8")
        draw(result, arguments.out / f"{stem}.png")

    for size, count in zip(arguments.sizes, counts, strict=True):
        bench = Bench(size, arguments, accelerator, count)
        result["sizes"][size] = {"backbone": bench.backbone.name, "images": count, "batch": bench.batch}
        if "evaluation" in parts:
            keep(size, "evaluation", "evaluation", bench.evaluation())
        for tuner in (arguments.tuners or TUNERS[size]) if "training" in parts else []:
            keep(size, "training", tuner, bench.training(tuner))
        for what in ("forward", "backward") if "attention" in parts else ():
            keep(size, "attention", what, bench.attention(what == "backward"))


if __name__ == "__main__":
    main()
