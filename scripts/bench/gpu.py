"""What docs/speed.md promises for GPUs, measured on one in ten minutes; writes JSON after every part.

    python -m scripts.bench.gpu

The parts, in this order; what no time is left for is listed under ``left_out``:

- ``equality``: the largest difference between accuracies on the CPU and on the GPU, in float32, on the digits.
- ``shares``: evaluation and training as shares of plain torch (``scripts.bench.throughput``), for ViT-S and ViT-B, in
  bfloat16 and float32, without and with ``torch.compile``.
- ``input``: images per second that JPEG files of 224 pixels arrive on the device with, by number of worker processes.
- ``memory``: peak memory of two tasks of one step for each learner (``scripts.bench.steps``), on a ViT-B.
- ``two_processes``: images per second of frozen forward passes in one process, and in two at a time on the same GPU.

Without CUDA the script says so and measures nothing. ``--device cpu --quick`` checks the script itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

import cil
from cil import results
from cil.backbone import load_backbone
from cil.config import BackboneConfig, Config, TransformConfig
from cil.data.images import ImageSet
from cil.data.transforms import Transforms
from cil.runner.checkpoint import to_json
from cil.runner.provenance import versions
from cil.utils import hardware
from scripts import ROOT
from scripts.bench import steps, throughput
from scripts.bench.records import BACKBONE

SMALL_BACKBONE = {"img_size": 32, "depth": 2}
EQUAL = ["ncm", "slda", {"name": "ranpac", "projection": 500}, {"name": "linear_probe", "epochs": 2}]
QUICK_LEARNERS = ["linear_probe"]
WORKERS = (0, 1, 2, 4, 8)
Found = dict[str, Any]
Part = tuple[str, str, Callable[[], Any]]
"""Name of a part, what of it, and the function that measures it."""


class Kit:
    """All measurements on one device.

    Args:
        given: The arguments of the script.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.quick = given, given.quick
        self.device: torch.device = self.accelerator("fp32").device

    def accelerator(self, precision: str) -> Accelerator:
        return hardware.accelerator(self.given.device, precision)

    def parts(self) -> Iterator[Part]:
        """Everything that there is to measure, in order."""
        yield "equality", "", self.equality
        for compiled in (False, True)[: 1 if self.quick else 2]:
            for size in ("small", "base")[: 1 if self.quick else 2]:
                for precision in ("bf16", "fp32"):
                    what = f"{size} {precision}{' compiled' if compiled else ''}"
                    yield "shares", what, lambda s=size, p=precision, c=compiled: self.shares(s, p, c)  # type: ignore[misc]
        for workers in WORKERS[: 2 if self.quick else None]:
            yield "input", str(workers), lambda w=workers: self.input(w)  # type: ignore[misc]
        for name in QUICK_LEARNERS if self.quick else steps.LEARNERS:
            yield "memory", name, lambda n=name: self.memory(n)  # type: ignore[misc]
        yield "two_processes", "", self.two_processes

    def equality(self) -> Found:
        """The largest difference between two accuracy matrices, as a fraction, by learner."""
        found = {}
        with tempfile.TemporaryDirectory() as root:
            for learner in EQUAL[: 1 if self.quick else None]:
                matrices = []
                for device in ("cpu", self.given.device):
                    config = Config.model_validate(
                        {
                            "name": device.replace(":", "-"),
                            "backbone": BACKBONE if self.quick else {},
                            "stream": {"increment": 2},
                            "learners": [learner],
                            "hardware": {"device": device, "feature_store": "off"},
                        }
                    )
                    [folder] = cil.run(config, root)
                    run = results.read_run(folder)
                    matrices.append(np.array(run["accuracy_matrix"], dtype=float))
                found[run["learner"]] = float(np.nanmax(np.abs(matrices[0] - matrices[1])))
        return found

    def shares(self, size: str, precision: str, compiled: bool) -> Found:
        """Our loops as shares of plain torch: evaluation, and training with each of a few tuners."""
        images, batch, pairs = (8, 4, 1) if self.quick else (1024, 256, 3)
        given = argparse.Namespace(batch=batch, pairs=pairs, quick=self.quick, compile=compiled)
        bench = throughput.Bench(size, given, self.accelerator(precision), images)
        tuners = throughput.FEW[: 1 if self.quick else None]
        return {"evaluation": bench.evaluation(), **{tuner: bench.training(tuner) for tuner in tuners}}

    def input(self, workers: int) -> float:
        """Images per second from JPEG files to the device, where nothing is computed on them."""
        count = 64 if self.quick else 4096
        source = throughput.jpegs(count, 256)
        config = BackboneConfig(name=throughput.SIZES["small"], weights="random", options=SMALL_BACKBONE)
        facts = {**load_backbone(config).data_config, "input_size": (3, 224, 224)}
        images = ImageSet(
            source, Transforms(facts, TransformConfig()), in_memory=False, memory_bytes=0, workers=workers
        )
        order, started = torch.Generator().manual_seed(0), time.perf_counter()
        everything = np.arange(count)
        for batch, _ in images.batches(
            everything, source.labels, 128, generator=order, augment=True, device=self.device
        ):
            last = batch
        last.sum().item()  # it has arrived
        return count / (time.perf_counter() - started)

    def memory(self, name: str) -> Found:
        """Peak memory in MiB above the backbone, and what is kept, of a learner on two tasks of one step."""
        model, images = ("vit_tiny_patch16_224", 2) if self.quick else (throughput.SIZES["base"], 32)
        last: Found = steps.measure(name, model, images, self.given.device)["tasks"][-1]
        return last

    def two_processes(self) -> Found:
        """Images per second of one process, and of two at a time, each for itself."""
        command = [sys.executable, "-m", "scripts.bench.gpu", "--device", self.given.device, "--forwards"]
        command += ["--quick"] if self.quick else []
        found: Found = {}
        for count in (1, 2):
            started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(count)]
            printed = [process.communicate(timeout=300)[0] for process in started]
            found[str(count)] = [json.loads(text.splitlines()[-1]) for text in printed]
        return found

    def forwards(self) -> float:
        """Images per second of frozen forward passes in bfloat16, for some seconds after a warm-up."""
        options, seconds, batch = (SMALL_BACKBONE, 0.1, 2) if self.quick else ({}, 10.0, 128)
        config = BackboneConfig(name=throughput.SIZES["base"], weights="random", options=options)
        backbone = load_backbone(config, self.device)
        images = torch.zeros(batch, *backbone.input_size, device=self.device)
        count, started = -3, 0.0  # passes that warm up
        with torch.inference_mode(), self.accelerator("bf16").autocast():
            while count <= 0 or time.perf_counter() - started < seconds:
                if count == 0:
                    started = time.perf_counter()
                backbone(images).sum().item()
                count += 1
        return count * batch / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--minutes", type=float, default=10.0, help="no part is begun after them")
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/gpu.json")
    parser.add_argument("--quick", action="store_true", help="small models and few images, to check the script")
    parser.add_argument("--forwards", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("torch finds no CUDA device here: nothing is measured. Run this on a machine with one.")
        return
    kit, started = Kit(given), time.monotonic()
    if given.forwards:
        print(json.dumps(kit.forwards()))
        return
    facts = {"machine": hardware.facts(kit.accelerator("fp32")), "versions": versions(), "quick": given.quick}
    found: Found = {**facts, "left_out": []}
    for part, what, measure in kit.parts():
        title = f"{part} {what}".strip()
        if time.monotonic() - started > 60 * given.minutes:
            found["left_out"].append(title)
        else:
            measured = measure()
            found |= {part: {**found.get(part, {}), what: measured} if what else measured}
            print(title, measured, flush=True)
        given.out.write_text(to_json(found), encoding="utf-8")


if __name__ == "__main__":
    main()
