"""Cost of a step of OPCM on a ViT-B/16 with thin SVDs and with full bases in the same formula; writes JSON and a PNG.

Seconds: both forms do the same second step alternately, several times, in one process. Memory: each does that step in a
separate process; reported is the peak above the memory in use before it. Then the thin form continues to the last task.
Weights are random, with timm's shapes: the time of an SVD hardly depends on the values.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import timm
import torch
from torch import Tensor

from cil.merging import OPCM
from cil.report.figures import CYCLE, new_figure
from cil.runner.checkpoint import to_json
from cil.utils import hardware
from scripts import ROOT

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}
MIB = 2**20
State = dict[str, Tensor]


def pretrained(small: bool) -> State:
    """Random weights of the shapes of timm's vit_base_patch16_224."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0, **(SMALL if small else {}))
    generator = torch.Generator().manual_seed(0)
    return {name: 0.02 * torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}


def finetuned(base: State, task: int) -> State:
    generator = torch.Generator().manual_seed(1000 + task)
    return {name: value + 1e-3 * torch.randn(value.shape, generator=generator) for name, value in base.items()}


class FullSVD:
    """OPCM as in its formula: U [m, m] and V [n, n], C = UᵀΔV, zeros in C, and back; diagonal removed."""

    def __init__(self, base: State, alpha: float = 0.5) -> None:
        self.base, self.alpha, self.norms = base, alpha, []
        self.linear = {entry.name: entry.fused for entry in OPCM().start(base).layout.entries if entry.linear}
        self.sum: State = {name: torch.zeros_like(value) for name, value in base.items()}

    def add(self, task: State) -> None:
        tau = {name: task[name] - value for name, value in self.base.items()}
        self.norms.append(math.sqrt(sum(float(value.double().square().sum()) for value in tau.values())))
        for name, value in tau.items():
            if len(self.norms) > 1 and name in self.linear:
                pairs = zip(
                    *(part.chunk(3 if self.linear[name] else 1) for part in (value, self.sum[name])), strict=True
                )
                value = torch.cat([self.project(delta, merged) for delta, merged in pairs])
            self.sum[name] = self.sum[name] + value

    def project(self, delta: Tensor, merged: Tensor) -> Tensor:
        u, s, vt = torch.linalg.svd(merged, full_matrices=True)
        r = int((s.cumsum(0) / s.sum() > self.alpha).float().argmax())
        c = u.T @ delta @ vt.T
        c.diagonal().zero_()
        c[:r, :r] = 0
        return u @ c @ vt

    def merged(self) -> State:
        norm = math.sqrt(sum(float(value.double().square().sum()) for value in self.sum.values()))
        scale = sum(self.norms) / len(self.norms) / norm
        return {name: value + scale * self.sum[name] for name, value in self.base.items()}


def form(name: str, base: State) -> OPCM | FullSVD:
    return OPCM(0.5, "diag_zeroed").start(base) if name == "thin" else FullSVD(base)


def seconds(rule: OPCM | FullSVD, task: State) -> float:
    start = time.perf_counter()
    rule.add(task)
    return time.perf_counter() - start


def compare_steps(base: State, repeats: int) -> dict[str, object]:
    """The second step of both forms, alternately."""
    tasks = [finetuned(base, t) for t in (1, 2)]
    found: dict[str, list[float]] = {"thin": [], "full": []}
    last = {}
    for _ in range(repeats):
        for name, times in found.items():
            rule = form(name, base)
            rule.add(tasks[0])
            times.append(seconds(rule, tasks[1]))
            last[name] = rule.merged()
    gap = max(float((last["thin"][k] - last["full"][k]).abs().max()) for k in base)
    largest = max(float((last["full"][k] - base[k]).abs().max()) for k in base)
    ratio = statistics.median(found["full"]) / statistics.median(found["thin"])
    return {"seconds": found, "speedup": ratio, "largest_difference": gap, "largest_update": largest}


def stream(base: State, tasks: int) -> dict[str, object]:
    """The thin form from the first task to the last."""
    rule, adding, reading = OPCM(0.5, "diag_zeroed").start(base), [], []
    for t in range(1, tasks + 1):
        adding.append(seconds(rule, finetuned(base, t)))
        start = time.perf_counter()
        for _ in rule.items():
            pass
        reading.append(time.perf_counter() - start)
    return {"add": adding, "read": reading, "last_over_second": adding[-1] / adding[1]}


def peak_of_step(name: str, small: bool) -> None:
    """In a separate process: print the memory in use before the second step and its peak, in bytes."""
    base = pretrained(small)
    rule = form(name, base)
    rule.add(finetuned(base, 1))
    task = finetuned(base, 2)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    rule.add(task)
    print(json.dumps({"before": before, "peak": peak_bytes()}))


def peak_bytes() -> int:
    """Peak resident memory since it was last reset."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "scripts.bench.merge", "--peak", name, "--threads", str(arguments.threads)]
    small = ["--small"] if arguments.small else []
    found = subprocess.run([*command, *small], cwd=ROOT, capture_output=True, text=True, check=True)
    measured = json.loads(found.stdout)
    return {"before_mib": measured["before"] / MIB, "step_mib": (measured["peak"] - measured["before"]) / MIB}


def draw(result: dict[str, object], path: Path) -> None:
    steps: dict = result["second_step"]
    run: dict = result["stream"]
    figure = new_figure(10, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[1, 2])
    names = ["thin", "full"]
    left.bar(names, [statistics.median(steps["seconds"][n]) for n in names], color=CYCLE[:2])
    left.set(title=f"second task: {steps['speedup']:.1f} times faster", ylabel="seconds")
    for i, name in enumerate(names):
        left.text(i, 0, f"{result['memory'][name]['step_mib']:.0f} MiB", ha="center", va="bottom", color="white")
    right.plot(range(1, len(run["add"]) + 1), run["add"], "o-", color=CYCLE[0], label="add")
    right.plot(range(1, len(run["read"]) + 1), run["read"], "s-", color=CYCLE[2], label="read out")
    right.set(title="thin SVDs, task after task", xlabel="task", ylabel="seconds", ylim=(0, None))
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a small ViT, to check the script")
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench")
    parser.add_argument("--peak", choices=["thin", "full"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        peak_of_step(arguments.peak, arguments.small)
        return
    base = pretrained(arguments.small)
    result = {
        "model": "small ViT" if arguments.small else "vit_base_patch16_224",
        "weights": sum(value.numel() for value in base.values()),
        "machine": {**hardware.processor(), "threads": arguments.threads, "torch": torch.__version__},
        "second_step": compare_steps(base, arguments.repeats),
        "memory": {name: memory(name, arguments) for name in ("thin", "full")},
        "stream": stream(base, arguments.tasks),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = "merge_small" if arguments.small else "merge"
    (arguments.out / f"{stem}.json").write_text(to_json(result), encoding="utf-8")
    draw(result, arguments.out / f"{stem}.png")
    step, run = result["second_step"], result["stream"]
    print(f"second task: {step['speedup']:.2f} times faster, largest difference {step['largest_difference']:.1e}")
    print(f"memory above the models: {json.dumps(result['memory'])}")
    print(f"task {arguments.tasks} over task 2: {run['last_over_second']:.2f}")


if __name__ == "__main__":
    main()
