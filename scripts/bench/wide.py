"""Cost of each classifier on wide features, e.g. those of several blocks of a ViT-B; writes JSON.

Synthetic classes of features of each width, 20 images per class. Per width and classifier: seconds to learn 1,000
images and to solve (processor time), bytes kept, and peak memory beside its estimate. With ``--float32``, also how far
the scores of LDA move if its scatter is summed in float32. Each is measured in a process of its own. A classifier is
not run if its estimate is above ``--memory``, or if it decomposes a matrix wider than ``--decomposed``, which can take
hours.

    python -m scripts.bench.wide
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from cil.classifiers import LDA, NCM, Classifier, Mahalanobis, Ridge
from cil.errors import ConfigError
from cil.runner.checkpoint import to_json
from cil.runner.provenance import versions
from cil.utils import hardware
from scripts import ROOT
from scripts.bench.growth import MIB, features, peak_bytes, reset_peak, timed

CLASSES, PER_CLASS = 50, 20
HEADS: dict[str, Callable[[int], Classifier]] = {
    "ncm": NCM,
    "slda": lambda width: LDA(width, 1e-4, "uniform"),
    "slda_gcv": lambda width: LDA(width, "gcv", "uniform"),
    "ridge": Ridge,
    "ridge_gcv": lambda width: Ridge(width, strength="gcv"),
    "fecam": Mahalanobis,
}
DECOMPOSING = "_gcv"
"""End of the names of classifiers that decompose a matrix as wide as the features."""


def estimate(head: str, width: int) -> tuple[float, float]:
    """Bytes that a classifier of 50 classes keeps and its peak, as it estimates them; no matrix is allocated."""
    with torch.device("meta"):
        classifier = HEADS[head](width)
    return tuple(of(CLASSES, classifier.width) for of in (classifier.kept_bytes, classifier.peak_bytes))


def measure(head: str, width: int, in_float32: bool) -> dict[str, Any]:
    """One classifier on 1,000 images of 50 classes, then its solution, in this process alone."""
    x, y = features(range(CLASSES), PER_CLASS, width, 0)
    test, _ = features(range(CLASSES), 1, width, 1)
    base = psutil.Process().memory_info().rss
    reset_peak()
    classifier = HEADS[head](width)
    learned, _ = timed(lambda: classifier.partial_fit(x, y))
    solved, scores = timed(lambda: classifier.logits(test))
    row = {
        "learn": learned,
        "solve": solved,
        "kept_mib": sum(v.nbytes for v in classifier.state_dict().values()) / MIB,
        "peak_mib": (peak_bytes() - base) / MIB,
    }
    if in_float32 and isinstance(classifier, LDA):
        classifier.outer = (x.T @ x).double()  # as a sum in float32 would be
        classifier._forget()
        row["float32_moves"] = float((classifier.logits(test) - scores).abs().max() / scores.std())
    return row


def in_own_process(head: str, width: int, given: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "scripts.bench.wide", "--measure", head, str(width)]
    command += ["--threads", str(given.threads), *(["--float32"] if given.float32 else [])]
    return json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 4608, 9216, 18432])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=float, default=16, metavar="GIB", help="estimates above are not run")
    parser.add_argument("--decomposed", type=int, default=4608, metavar="F", help="wider matrices are not decomposed")
    parser.add_argument("--float32", action="store_true", help="measure LDA with sums in float32 as well")
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/wide.json")
    parser.add_argument("--measure", nargs=2, metavar=("HEAD", "WIDTH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.measure:
        head, width = given.measure
        print(json.dumps(measure(head, int(width), given.float32)))
        return
    rows: dict[str, dict[str, Any]] = {head: {} for head in given.heads}
    for width in given.widths:
        for head in given.heads:
            try:
                kept, peak = (size / MIB for size in estimate(head, width))
            except ConfigError:  # this machine has too little memory even for one class
                rows[head][str(width)] = {"refused": True}
                continue
            row = {"estimate_kept_mib": kept, "estimate_mib": peak}
            if peak <= given.memory * 1024 and not (head.endswith(DECOMPOSING) and width > given.decomposed):
                row |= in_own_process(head, width, given)
            rows[head][str(width)] = row
            print(width, head, row, flush=True)
    facts = {"machine": hardware.facts(hardware.accelerator()), "versions": versions()}
    limits = {"memory_gib": given.memory, "decomposed": given.decomposed}
    setting = {"classes": CLASSES, "per_class": PER_CLASS, **limits}
    given.out.write_text(to_json({**facts, **setting, "heads": rows}), encoding="utf-8")


if __name__ == "__main__":
    main()
