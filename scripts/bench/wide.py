"""Cost of linear discriminants on wide features, e.g. those of several blocks; writes JSON.

Synthetic classes of features of each width, 20 images per class. Per width: seconds to learn 1,000 images and to solve,
with a fixed shrinkage and with ``gcv`` (processor time), peak memory beside its estimate, and how far scores move if
the scatter matrix is summed in float32 instead of float64.

    python -m scripts.bench.wide
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from cil.classifiers import LDA
from cil.runner.checkpoint import to_json
from cil.runner.provenance import versions
from cil.utils import hardware
from scripts import ROOT
from scripts.bench.growth import MIB, features, peak_bytes, reset_peak, timed

CLASSES, PER_CLASS = 50, 20


def measure(width: int, shrinkage: Any) -> dict[str, Any]:
    """One classifier on 1,000 images of 50 classes, then its solution, in this process alone."""
    x, y = features(range(CLASSES), PER_CLASS, width, 0)
    test, _ = features(range(CLASSES), 1, width, 1)
    base = psutil.Process().memory_info().rss
    reset_peak()
    lda = LDA(width, shrinkage, "uniform")
    learned, _ = timed(lambda: lda.partial_fit(x, y))
    solved, scores = timed(lambda: lda.logits(test))
    row = {
        "learn": learned,
        "solve": solved,
        "shrinkage": lda.shrinkages[0],
        "kept_mib": sum(v.nbytes for v in lda.state_dict().values()) / MIB,
        "peak_mib": (peak_bytes() - base) / MIB,
        "estimate_mib": lda.peak_bytes(CLASSES, width) / MIB,
    }
    if shrinkage != "gcv":
        lda.outer = (x.T @ x).double()  # as a sum in float32 would be
        lda._forget()
        row["float32_moves"] = float((lda.logits(test) - scores).abs().max() / scores.std())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 1152, 2304, 4608])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/wide.json")
    parser.add_argument("--measure", nargs=2, metavar=("WIDTH", "SHRINKAGE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.measure:
        width, shrinkage = given.measure
        print(json.dumps(measure(int(width), shrinkage if shrinkage == "gcv" else float(shrinkage))))
        return
    rows: dict[str, dict[str, Any]] = {}
    for width in given.widths:
        rows[str(width)] = {}
        for title, shrinkage in (("fixed", 1e-4), ("gcv", "gcv")):
            command = [sys.executable, "-m", "scripts.bench.wide", "--measure", str(width), str(shrinkage)]
            command += ["--threads", str(given.threads)]
            found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            rows[str(width)][title] = json.loads(found.stdout)
            print(width, title, rows[str(width)][title], flush=True)
    machine = hardware.facts(hardware.accelerator())
    given.out.write_text(to_json({"machine": machine, "versions": versions(), "widths": rows}), encoding="utf-8")


if __name__ == "__main__":
    main()
