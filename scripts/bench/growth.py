"""Cost of a stage as the number of classes and tasks grows; writes JSON and a PNG.

1,000 classes of synthetic features of width 768 in 10, 50 and 100 tasks, learned by the classifiers of ``ncm``,
``slda``, ``ranpac``, ``fecam`` and ``merge`` (statistics corrected by a map at every task), each in a separate process.
Per stage: seconds to learn, to solve the system that is solved once per stage, to predict an image; bytes kept; peak
memory. Seconds are processor time. Also two stages of ``ranpac`` at its published width M = 10,000.

    python -m scripts.bench.growth
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from cil.classifiers import LDA, NCM, Classifier, Mahalanobis, Ridge
from cil.classifiers.drift import ridge_map
from cil.report.figures import CYCLE, new_figure
from cil.runner.checkpoint import to_json
from cil.runner.provenance import versions
from cil.utils import hardware
from scripts import ROOT

HEADS: dict[str, Callable[[int], Classifier]] = {
    "ncm": NCM,
    "slda": LDA,
    "ranpac": lambda width: Ridge(width, RANPAC),
    "fecam": Mahalanobis,
    "merge": lambda width: LDA(2 * width, 1e-2, priors="uniform", blocks=2),
}
RANPAC = 2000
NATURE = {
    "ncm": "keeps F numbers per class",
    "slda": "keeps F numbers per class and F² once; a solve takes F³ + F² C products",
    "ranpac": "keeps M numbers per class and M² once; a solve takes M³/6 + M² C products, growing once C nears M / 6",
    "fecam": "keeps F² numbers per class, twice that once it predicts; an image takes F² products per class",
    "merge": "keeps 2 F numbers per class and 4 F² once; a solve and a map take products of F³ and F² C",
}
MIB = 2**20
PER_CLASS, TESTED = 20, 8
Found = dict[str, Any]


def features(classes: range, count: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian classes at fixed positions: float32 [C · count, F], labels [C · count]."""
    rows = []
    for c in classes:
        generator = torch.Generator().manual_seed(c)
        centre = torch.randn(width, generator=generator)
        generator.manual_seed(10**6 * (seed + 1) + c)
        rows.append(centre + 2 * torch.randn(count, width, generator=generator))
    return torch.cat(rows), torch.arange(classes.start, classes.stop).repeat_interleave(count)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    found = call()
    return time.process_time() - started, found


def reset_peak() -> None:
    """Reset the process's peak of resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """Peak resident memory since :func:`reset_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def learn(classifier: Classifier, x: Tensor, y: Tensor) -> None:
    """One stage; the statistics of a classifier of two views are corrected first, as in ``merge``."""
    classifier.grow(int(y.max()) + 1)
    width = x.shape[1] // 2
    if isinstance(classifier, LDA) and classifier.blocks == 2 and bool(classifier.counts.any()):
        classifier.transport(ridge_map(x[:, :width], x[:, width:], 0.05).beside(width))
    classifier.partial_fit(x, y)


def grow(head: str, tasks: int, classes: int, width: int) -> list[Found]:
    """One row per stage."""
    classifier, step, rows = HEADS[head](width), classes // tasks, []
    base = psutil.Process().memory_info().rss
    for t in range(tasks):
        new = range(t * step, (t + 1) * step)
        x, y = features(new, PER_CLASS, width, 0)
        test, labels = features(range(new.stop), 1, width, 1)
        chosen = torch.randperm(new.stop, generator=torch.Generator().manual_seed(t))[:TESTED]
        test, labels = test[chosen], labels[chosen]
        if head == "merge":  # the merged half of the features changes a little with every task
            noise = 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
            x, test = torch.cat([x, x + noise], 1), torch.cat([test, test], 1)
        reset_peak()
        learned, _ = timed(lambda x=x, y=y: learn(classifier, x, y))
        first, scores = timed(lambda test=test: classifier.logits(test))
        again, _ = timed(lambda test=test: classifier.logits(test))
        rows.append(
            {
                "classes": new.stop,
                "learn": learned,
                "solve": max(0.0, first - again),
                "predict_per_image": again / len(test),
                "accuracy": float((scores.argmax(1) == labels).double().mean()),
                "kept_mib": sum(v.nbytes for v in classifier.state_dict().values()) / MIB,
                "peak_mib": (peak_bytes() - base) / MIB,
            }
        )
    return rows


def flatness(rows: list[Found]) -> Found:
    """Seconds of a stage's learning, and of learning and solving, per class: the last fifth over the first (median)."""
    fifth, new = max(1, len(rows) // 5), rows[0]["classes"]

    def ratio(*parts: str) -> float:
        per_class = [sum(row[p] for p in parts) / new for row in rows[1:]]
        return statistics.median(per_class[-fifth:]) / statistics.median(per_class[:fifth])

    return {"learn": ratio("learn"), "learn_and_solve": ratio("learn", "solve")}


def ridge(width: int, projection: int, classes: int) -> Found:
    """Two stages of random-feature ridge regression: number of solves, time and memory."""
    classifier, solves = Ridge(width, projection), 0
    solve = classifier._solve

    def counted() -> Tensor:
        nonlocal solves
        solves += 1
        return solve()

    classifier._solve = counted  # type: ignore[method-assign]
    base, stages = psutil.Process().memory_info().rss, []
    reset_peak()
    for t in range(2):
        x, y = features(range(t * classes, (t + 1) * classes), 10, width, 0)
        test, _ = features(range((t + 1) * classes), 1, width, 1)
        learned, _ = timed(lambda x=x, y=y: classifier.partial_fit(x, y))
        first, _ = timed(lambda test=test: classifier.logits(test))
        again, _ = timed(lambda test=test: classifier.logits(test))
        stages.append({"images": len(y), "learn": learned, "solve": first - again, "predict": again, "solves": solves})
    return {"projection": projection, "stages": stages, "peak_mib": (peak_bytes() - base) / MIB, "base_mib": base / MIB}


def in_own_process(arguments: argparse.Namespace, *what: object) -> Any:
    """The measurement in a separate process, so that the memory is only its own."""
    size = ["--classes", arguments.classes, "--width", arguments.width, "--threads", arguments.threads]
    command = [sys.executable, "-m", "scripts.bench.growth", "--measure", *what, *size]
    found = subprocess.run([str(c) for c in command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout)


def draw_growth(result: Found, path: Path) -> None:
    found: dict[str, dict[str, list[Found]]] = result["heads"]
    figure = new_figure(13, 6.4)
    panels = (
        ("learn", "ms per class to learn"),
        ("solve", "ms per class to solve"),
        ("predict_per_image", "ms to predict an image"),
        ("kept_mib", "MiB kept"),
        ("peak_mib", "peak memory, MiB"),
    )
    for place, (key, label) in enumerate(panels, 1):
        axes = figure.add_subplot(2, 3, place)
        for colour, (head, runs) in zip(CYCLE, found.items(), strict=False):
            for style, (tasks, rows) in zip((":", "--", "-"), runs.items(), strict=False):
                scale = 1 if key.endswith("mib") else 1000 / rows[0]["classes"] if "class" in label else 1000
                drawn = rows[1:]  # the first stage warms up
                axes.plot(
                    [r["classes"] for r in drawn],
                    [scale * r[key] for r in drawn],
                    style,
                    color=colour,
                    lw=0.9,
                    label=f"{head}, {tasks} tasks",
                )
        axes.set(xlabel="classes seen", ylabel=label, yscale="log")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, fontsize=7, ncols=2, loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=768, help="width of the features")
    parser.add_argument("--projection", type=int, default=10_000, help="M of the wide ridge regression")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small numbers, to check the script")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        what, *numbers = arguments.measure
        if what == "ridge":
            found: Any = ridge(arguments.width, int(numbers[0]), int(numbers[1]))
        else:
            found = grow(what, int(numbers[0]), arguments.classes, arguments.width)
        print(json.dumps(found))
        return
    if arguments.quick:
        arguments.tasks, arguments.classes, arguments.width, arguments.projection = [2, 4], 16, 8, 32
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = "growth_quick" if arguments.quick else "growth"
    result: Found = {
        "classes": arguments.classes,
        "width": arguments.width,
        "ranpac_projection": RANPAC,
        "images_a_class": PER_CLASS,
        "machine": hardware.facts(hardware.accelerator("cpu")),
        "versions": versions(),
        "ridge": in_own_process(arguments, "ridge", arguments.projection, 2 if arguments.quick else 50),
        "heads": {},
        "last_over_first": {},
        "by_nature": NATURE,
    }
    print(f"ridge: {json.dumps(result['ridge'])}", flush=True)
    for head in arguments.heads:
        runs = result["heads"][head] = {str(tasks): in_own_process(arguments, head, tasks) for tasks in arguments.tasks}
        flat = result["last_over_first"][head] = {tasks: flatness(rows) for tasks, rows in runs.items()}
        print(f"{head:7} {json.dumps(flat)}; {NATURE[head]}", flush=True)
        # after every classifier, so that an interrupted run has some results
        (arguments.out / f"{stem}.json").write_text(to_json(result), encoding="utf-8")
        draw_growth(result, arguments.out / f"{stem}.png")


if __name__ == "__main__":
    main()
